from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from cvfp import Experiment, ParameterError, cache, data, embeddings
from cvfp.data import Stream, load_corpus

SAMPLES = [f"sample number {i} of the file" for i in range(20)]

FromFile = Callable[..., Experiment]
WriteJsonl = Callable[..., str]


@pytest.fixture(scope="session")
def bpe(tiny: Experiment) -> data.Tokenizer:
    return data.load(tiny).tokenizer


@pytest.fixture(scope="session")
def gpt2(gpt2_folder: Path) -> data.Tokenizer:
    return data.load_tokenizer(Experiment(tokenizer=str(gpt2_folder), vocab_size=None), fitting=[])


def test_chitchat_holds_3549_samples_of_250_characters() -> None:
    corpus = load_corpus(Experiment(samples=2999, validation_samples=50, fitting_samples=500))
    assert (len(corpus.train), len(corpus.validation), len(corpus.fitting)) == (2999, 50, 500)
    texts = corpus.train + corpus.validation + corpus.fitting
    assert len(set(texts)) == 3549  # so the three are disjoint, too
    assert min(map(len, texts)) >= 250


def test_chitchat_texts_are_the_conversations_turns_joined_by_line_breaks() -> None:
    spec = data.importlib.util.find_spec("chitchat_dataset")
    assert spec is not None
    assert spec.origin is not None
    conversations = json.loads(Path(spec.origin).with_name("dataset.json").read_text("utf-8"))
    wanted = set()
    for conversation in conversations.values():
        turns = []
        for turn in conversation["messages"]:
            turns.append(" ".join([utterance["text"] for utterance in turn]))
        wanted.add("\n".join(turns))
    wanted = {text for text in wanted if len(text) >= 250}
    corpus = load_corpus(Experiment(samples=2999, validation_samples=50))
    assert set(corpus.train + corpus.validation + corpus.fitting) == wanted


def test_chitchat_sizes_are_nested_and_the_seed_moves_nothing() -> None:
    large = load_corpus(Experiment(samples=40, validation_samples=50, fitting_samples=500))
    small = load_corpus(Experiment(samples=7, validation_samples=5, fitting_samples=30, seed=1))
    assert small.train == large.train[:7]
    assert small.validation == large.validation[:5]
    assert small.fitting == large.fitting[:30]


@pytest.mark.parametrize(
    ("field", "most"), [("samples", 2999), ("validation_samples", 50), ("fitting_samples", 500)]
)
def test_chitchat_names_the_size_that_exceeds_it(field: str, most: int) -> None:
    with pytest.raises(ParameterError, match=rf"^{field}: got {most + 1}; .*\b{most}\b"):
        load_corpus(Experiment().replace(**{field: most + 1}))


@pytest.mark.parametrize(
    ("field", "value"), [("column", "text"), ("dataset_config", "a"), ("validation_split", "b")]
)
def test_chitchat_refuses_the_hubs_fields(field: str, value: str) -> None:
    with pytest.raises(ParameterError, match=f"^{field}: got '{value}'"):
        load_corpus(Experiment().replace(**{field: value}))


def test_tail_is_the_last_tenth_of_the_stream(tiny: Experiment) -> None:
    whole = data.load(tiny).train
    tail = data.load(tiny.replace(validation="tail"))
    assert len(tail.validation) == len(whole) // 10
    assert torch.equal(torch.cat([tail.train.tokens, tail.validation.tokens]), whole.tokens)
    starts = torch.cat([tail.train.starts, tail.validation.starts + len(tail.train)])
    assert set(starts.tolist()) == {*whole.starts.tolist(), len(tail.train)}
    assert tail.validation.starts[0] == 0


@pytest.mark.parametrize(
    ("starts", "train", "tail"),
    [
        ([0, 5, 17], [0, 5, 17], [0]),
        ([0, 5, 18], [0, 5], [0]),
        ([0, 5, 19], [0, 5], [0, 1]),
    ],
)
def test_starts_of_the_tail_at_its_border(
    starts: list[int], train: list[int], tail: list[int]
) -> None:
    first, last = data._split_tail(Stream(torch.arange(20), torch.tensor(starts)))
    assert first.tokens.tolist() == list(range(18))
    assert last.tokens.tolist() == [18, 19]
    assert (first.starts.tolist(), last.starts.tolist()) == (train, tail)


def test_tail_too_short_is_refused(
    from_file: FromFile, gpt2_folder: Path, write_jsonl: WriteJsonl
) -> None:
    path = write_jsonl("one two three four five")
    with pytest.raises(ParameterError, match=r"^samples: got 1; .*tail"):
        data.load(from_file(path, str(gpt2_folder), samples=1, validation="tail"))


def test_streams_are_the_samples_one_after_the_other(tiny: Experiment) -> None:
    corpus, made = load_corpus(tiny), data.load(tiny)
    for texts, stream in (
        (corpus.train, made.train),
        (corpus.validation, made.validation),
        (corpus.fitting, made.fitting),
    ):
        assert stream.tokens.dtype == torch.int64
        pieces = stream.tokens.tensor_split(stream.starts[1:])
        assert [made.tokenizer.decode(piece.tolist()) for piece in pieces] == texts


def test_messages_are_joined_by_line_breaks(
    ultrachat_folder: Path,
    gpt2_folder: Path,
    from_file: FromFile,
    conversations: list[list[dict[str, str]]],
) -> None:
    experiment = from_file(
        str(ultrachat_folder),
        str(gpt2_folder),
        train_split="train_sft",
        validation_split="test_sft",
    )
    corpus = load_corpus(experiment)
    texts = ["\n".join(m["content"] for m in messages) for messages in conversations]
    assert corpus.train == texts[:4]
    assert corpus.validation == texts[60:62]
    assert corpus.fitting == []


def test_without_validation_split_the_first_samples_are_held_out(
    ultrachat_folder: Path, gpt2_folder: Path, from_file: FromFile
) -> None:
    settings = dict(train_split="train_sft", fitting_samples=3, embedding="bigram")
    small = load_corpus(from_file(str(ultrachat_folder), str(gpt2_folder), **settings))
    large = load_corpus(from_file(str(ultrachat_folder), str(gpt2_folder), samples=9, **settings))
    prompts = load_corpus(
        from_file(str(ultrachat_folder), str(gpt2_folder), column="prompt", **settings)
    )
    assert large.train[:4] == small.train
    assert large.validation == small.validation
    assert large.fitting == small.fitting
    assert not {*small.validation} & {*large.train, *large.fitting}
    assert [t.split("\n")[0] for t in small.validation] == prompts.validation


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_local_layouts(
    kind: str, tmp_path: Path, gpt2_folder: Path, from_file: FromFile, write_jsonl: WriteJsonl
) -> None:
    if kind == "parquet":
        path = str(tmp_path / "corpus.parquet")
        pd.DataFrame({"text": SAMPLES}).to_parquet(path)
    else:
        path = write_jsonl(*SAMPLES, name="train")
        path = str(tmp_path) if kind == "folder" else path
    corpus = load_corpus(from_file(path, str(gpt2_folder)))
    assert corpus.validation == SAMPLES[:2]
    assert corpus.train == SAMPLES[2:6]


def test_samples_and_validation_samples_beyond_a_file_are_named(
    gpt2_folder: Path, from_file: FromFile, write_jsonl: WriteJsonl
) -> None:
    path = write_jsonl(*SAMPLES)
    with pytest.raises(ParameterError, match=r"^samples: got 19; .*at most 18 "):
        load_corpus(from_file(path, str(gpt2_folder), samples=19))
    with pytest.raises(ParameterError, match=r"^validation_samples: got 21; .*at most 20 "):
        load_corpus(from_file(path, str(gpt2_folder), validation_samples=21))
    with pytest.raises(ParameterError, match=r"^fitting_samples: got 30; .*at most 18 "):
        load_corpus(from_file(path, str(gpt2_folder), embedding="bigram", fitting_samples=30))


def test_copies_of_held_out_samples_are_dropped_from_training(
    gpt2_folder: Path, from_file: FromFile, write_jsonl: WriteJsonl
) -> None:
    rows = [*SAMPLES[:3], SAMPLES[1], *SAMPLES[3:5], SAMPLES[0], *SAMPLES[5:]]
    corpus = load_corpus(from_file(write_jsonl(*rows), str(gpt2_folder), samples=18))
    assert corpus.validation == SAMPLES[:2]
    assert corpus.train == SAMPLES[2:]


@pytest.mark.parametrize(
    ("row", "parameter", "words"),
    [
        ("", "dataset", "not empty"),
        ("a", "dataset", "at least 2 tokens"),
        ({"text": None}, "column", "text"),
    ],
)
def test_sample_that_cannot_be_used(
    row: Any,
    parameter: str,
    words: str,
    gpt2_folder: Path,
    from_file: FromFile,
    write_jsonl: WriteJsonl,
) -> None:
    path = write_jsonl(*SAMPLES[:3], row, *SAMPLES[3:])
    with pytest.raises(ParameterError, match=f"^{parameter}: .*{words}"):
        data.load(from_file(path, str(gpt2_folder)))


def test_missing_column_lists_those_there(
    gpt2_folder: Path, from_file: FromFile, write_jsonl: WriteJsonl
) -> None:
    path = write_jsonl(*[{"body": text, "number": 3} for text in SAMPLES])
    with pytest.raises(ParameterError, match=r"^column: got None; .*body, number"):
        load_corpus(from_file(path, str(gpt2_folder)))
    with pytest.raises(ParameterError, match=r"^column: got 'text'; .*body, number"):
        load_corpus(from_file(path, str(gpt2_folder), column="text"))
    with pytest.raises(ParameterError, match=r"^column: got 'number'"):
        load_corpus(from_file(path, str(gpt2_folder), column="number"))
    assert load_corpus(from_file(path, str(gpt2_folder), column="body")).train == SAMPLES[2:6]


def test_missing_split_is_named(
    ultrachat_folder: Path, gpt2_folder: Path, from_file: FromFile
) -> None:
    path, tokenizer = str(ultrachat_folder), str(gpt2_folder)
    with pytest.raises(ParameterError, match=r"^train_split: got 'train'; .*train_sft"):
        load_corpus(from_file(path, tokenizer))
    with pytest.raises(ParameterError, match=r"^validation_split: got 'dev'; .*test_sft"):
        load_corpus(from_file(path, tokenizer, train_split="train_sft", validation_split="dev"))


@pytest.mark.parametrize("name", ["no-such.jsonl", "./no-such-folder", "/no/such/folder", "a/b/c"])
def test_missing_file_or_folder_is_named(name: str, gpt2_folder: Path, from_file: FromFile) -> None:
    with pytest.raises(ParameterError, match=f"^dataset: got '{name}'; .*exists"):
        load_corpus(from_file(name, str(gpt2_folder)))


@pytest.mark.parametrize("content", ["", "{not json", '{"text": "fine text"}\n{broken\n'])
def test_file_that_cannot_be_read_is_named(
    content: str, tmp_path: Path, gpt2_folder: Path, from_file: FromFile
) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(content)
    with pytest.raises(ParameterError, match=r"^dataset: got '.*broken\.jsonl'"):
        load_corpus(from_file(str(path), str(gpt2_folder)))


def spy_on_downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that were asked of the hub, by any of the three libraries' ways."""
    asked: list[str] = []

    def load_dataset(path: str, **arguments: Any) -> None:
        asked.append(path)
        raise OSError("not reached")

    def from_pretrained(name: str, local_files_only: bool) -> None:
        if not local_files_only:
            asked.append(name)
        raise OSError("not in the cache")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for auto in (transformers.AutoTokenizer, transformers.AutoModel):
        monkeypatch.setattr(auto, "from_pretrained", from_pretrained)
    return asked


HUB_NAMES = [("dataset", "no/such"), ("tokenizer", "no-such-model"), ("embedding", "no-such-model")]


def ask_hub(tiny: Experiment, field: str, name: str) -> None:
    free = {"tokenizer": "vocab_size", "embedding": "embedding_dim"}
    changes: dict[str, Any] = {field: name, **({free[field]: None} if field in free else {})}
    experiment = tiny.replace(**changes)
    embeddings.load(experiment, data.load(experiment))


@pytest.mark.parametrize(("field", "name"), HUB_NAMES)
def test_unreachable_hub_is_told_without_asking_twice(
    field: str,
    name: str,
    tiny: Experiment,
    unreachable_hub: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = spy_on_downloads(monkeypatch)
    with pytest.raises(ParameterError, match=f"^{field}: got '{name}'; .*a hub that can be rea"):
        ask_hub(tiny, field, name)
    assert asked == []


@pytest.mark.parametrize(("field", "name"), HUB_NAMES)
def test_unreachable_hub_with_the_real_clients(
    field: str, name: str, tiny: Experiment, unreachable_hub: None
) -> None:
    with pytest.raises(ParameterError, match=f"^{field}: got '{name}'; .*a hub that can be rea"):
        ask_hub(tiny, field, name)


@pytest.mark.parametrize(("field", "name"), HUB_NAMES)
def test_offline_is_told_by_its_variable(
    field: str, name: str, tiny: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = spy_on_downloads(monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ParameterError, match=f"^{field}: got '{name}'; .*HF_HUB_OFFLINE"):
        ask_hub(tiny, field, name)
    assert asked == []


def test_local_folders_need_no_hub(
    ultrachat_folder: Path,
    gpt2_folder: Path,
    from_file: FromFile,
    unreachable_hub: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    experiment = from_file(
        str(ultrachat_folder), str(gpt2_folder), train_split="train_sft", embedding=str(gpt2_folder)
    ).replace(embedding_dim=None)
    embeddings.load(experiment, data.load(experiment))


def serve(monkeypatch: pytest.MonkeyPatch, rows: int) -> list[int]:
    """`datasets.load_dataset` replaced by a stream of `rows` texts; the rows taken from it."""
    taken: list[int] = []

    def texts() -> Iterator[dict[str, str]]:
        for number in range(rows):
            taken.append(number)
            yield {"text": f"text number {number}"}

    def load_dataset(path: str, streaming: bool, **arguments: Any) -> datasets.IterableDataset:
        assert streaming
        features = datasets.Features({"text": datasets.Value("string")})
        return datasets.IterableDataset.from_generator(texts, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return taken


def test_streaming_takes_no_more_rows_than_asked_for(
    tmp_path: Path, gpt2_folder: Path, from_file: FromFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = serve(monkeypatch, rows=10_000)
    corpus = load_corpus(from_file(str(tmp_path), str(gpt2_folder)))
    assert corpus.train == [f"text number {number}" for number in range(2, 6)]
    assert max(taken) in (5, 6)  # datasets itself looks one row ahead


def test_hub_texts_are_kept(
    home: Path, gpt2_folder: Path, from_file: FromFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "require_hub", lambda parameter, name: None)
    taken = serve(monkeypatch, rows=12)
    experiment = from_file("someone/something", str(gpt2_folder))
    first = load_corpus(experiment)
    assert taken
    taken.clear()
    assert load_corpus(experiment) == first
    assert load_corpus(experiment.replace(samples=3)).train == first.train[:3]
    assert taken == []
    # What is kept ends where the split does not: more is asked for, and taken from the start.
    assert load_corpus(experiment.replace(samples=10)).train[:4] == first.train
    assert max(taken) == 11
    with pytest.raises(ParameterError, match=r"^samples: got 11; .*at most 10 "):
        load_corpus(experiment.replace(samples=11))
    taken.clear()
    with pytest.raises(ParameterError, match=r"^samples: got 12; .*at most 10 "):
        load_corpus(experiment.replace(samples=12))
    assert taken == []  # the split is known to end there
    for other in (dict(train_split="b"), dict(dataset_config="b"), dict(dataset="someone/else")):
        taken.clear()
        load_corpus(experiment.replace(**other))
        assert taken, other


@given(st.lists(st.text(min_size=1), min_size=1, max_size=4))
@settings(deadline=None, max_examples=40)
def test_bytes_and_roundtrip(bpe: data.Tokenizer, gpt2: data.Tokenizer, texts: list[str]) -> None:
    for tokenizer in (bpe, gpt2):
        stream = tokenizer.encode(texts)
        assert tokenizer.decode(stream.tokens.tolist()) == "".join(texts)
        assert tokenizer.count_bytes(stream.tokens) == len("".join(texts).encode())


def test_bytes_at_a_cut_within_a_character(bpe: data.Tokenizer, gpt2: data.Tokenizer) -> None:
    text = "👩‍🚀 naïve 東京 <|endoftext|>\n\tok"
    for tokenizer in (bpe, gpt2):
        tokens = tokenizer.encode([text]).tokens
        assert tokenizer.count_bytes(tokens) == len(text.encode())
        single = [tokenizer.count_bytes(tokens[i : i + 1]) for i in range(len(tokens))]
        assert sum(single) == len(text.encode())
        assert min(single) >= 1


def test_pretrained_tokens_are_those_of_transformers(
    gpt2: data.Tokenizer, gpt2_folder: Path
) -> None:
    reference = transformers.AutoTokenizer.from_pretrained(gpt2_folder)
    texts = ["Hello there, how are you?\nFine 🙂", "x " * 3000]
    stream = gpt2.encode(texts)
    wanted = [reference(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert stream.tokens.tolist() == wanted[0] + wanted[1]
    assert stream.starts.tolist() == [0, len(wanted[0])]
    assert gpt2.vocab_size == 50257


def test_vocab_size_that_is_not_the_pretrained_one(tiny: Experiment, gpt2_folder: Path) -> None:
    right = tiny.replace(tokenizer=str(gpt2_folder), vocab_size=50257)
    assert data.load_tokenizer(right, []).vocab_size == 50257
    with pytest.raises(ParameterError, match=r"^vocab_size: got 400; .*None, or 50257"):
        data.load_tokenizer(right.replace(vocab_size=400), [])


def test_bpe_has_the_vocabulary_asked_for(bpe: data.Tokenizer) -> None:
    assert bpe.vocab_size == 400 == len(bpe.backend.get_vocab())


def test_bpe_with_too_large_a_vocabulary_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"^vocab_size: got 5000; .*at most \d+ "):
        data.fit_bpe(["a few words only"], 5000)


def test_bpe_is_deterministic(tiny: Experiment, tmp_path: Path, monkeypatch: Any) -> None:
    fitting = load_corpus(tiny).fitting
    made = []
    for name in ("first", "second"):
        monkeypatch.setenv("CVFP_HOME", str(tmp_path / name))
        made.append(data.fit_bpe(fitting, 600).backend.to_str())
    assert made[0] == made[1]


def test_bpe_is_fitted_on_the_fitting_set_alone(tiny: Experiment) -> None:
    other = tiny.replace(samples=9, validation_samples=8, validation="tail", seed=9)
    assert data.load(other).tokenizer.fingerprint == data.load(tiny).tokenizer.fingerprint
    fewer = data.load(tiny.replace(fitting_samples=50)).tokenizer
    assert fewer.fingerprint != data.load(tiny).tokenizer.fingerprint


def test_tokenizer_survives_pickle(bpe: data.Tokenizer) -> None:
    import pickle

    copy = pickle.loads(pickle.dumps(bpe))
    assert copy.fingerprint == bpe.fingerprint
    assert torch.equal(copy.encode(SAMPLES).tokens, bpe.encode(SAMPLES).tokens)


def test_fingerprint_is_that_of_tokens_roles_and_borders(
    gpt2_folder: Path, from_file: FromFile, write_jsonl: WriteJsonl
) -> None:
    def fingerprint(name: str, *rows: str) -> str:
        path = write_jsonl(*rows, name=name)
        experiment = from_file(path, str(gpt2_folder), samples=1, validation_samples=2)
        return data.load(experiment).fingerprint

    one = fingerprint("a", "one two three", " four five", "six seven")
    assert fingerprint("b", "one two three", " four five", "six seven") == one
    assert fingerprint("c", "one two three", " four five", "six eight") != one
    assert fingerprint("d", "one two three", " four five six", " seven eight") != one
    # The same tokens, but other conversations: Result.val_conversations is another.
    assert fingerprint("e", "one two", " three four five", "six seven") != one


def test_tokens_are_read_from_the_cache(tiny: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    first = data.load(tiny)

    def encode(self: data.Tokenizer, texts: list[str]) -> Stream:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(data.Tokenizer, "encode", encode)
    second = data.load(tiny)
    assert torch.equal(first.train.tokens, second.train.tokens)
    assert second.train.tokens.dtype == torch.int64
    assert second.fingerprint == first.fingerprint
    assert list((cache.home() / "tokens").iterdir())
