from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cvfp import Experiment, ParameterError, corpora, data
from cvfp.corpora import Texts, load_corpus, read

SAMPLES = [f"sample number {i} of the file" for i in range(20)]

FromFile = Callable[..., Experiment]
WriteJsonl = Callable[..., str]


def test_chitchat_holds_3549_samples_of_250_characters() -> None:
    corpus = load_corpus(Experiment(samples=2999, validation_samples=50, fitting_samples=500))
    assert (len(corpus.train), len(corpus.validation), len(corpus.fitting)) == (2999, 50, 500)
    texts = corpus.train + corpus.validation + corpus.fitting
    assert len(set(texts)) == 3549  # so the three are disjoint, too
    assert min(map(len, texts)) >= 250


def test_chitchat_texts_are_the_conversations_turns_joined_by_line_breaks() -> None:
    spec = importlib.util.find_spec("chitchat_dataset")
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


def test_sample_of_one_token_is_refused(
    gpt2_folder: Path, from_file: FromFile, write_jsonl: WriteJsonl
) -> None:
    path = write_jsonl(*SAMPLES[:3], "a", *SAMPLES[3:])
    with pytest.raises(ParameterError, match=r"^dataset: .*at least 2 tokens .*for train is 'a'"):
        data.load(from_file(path, str(gpt2_folder)))


@pytest.mark.parametrize("row", ["", " \n", {"text": None}, {"id": 3}, {"messages": []}])
def test_rows_without_text_are_skipped_and_counted(
    row: Any, gpt2_folder: Path, from_file: FromFile, write_jsonl: WriteJsonl
) -> None:
    path = write_jsonl(*SAMPLES[:3], row, *SAMPLES[3:], row)
    assert read(path) == Texts(SAMPLES, 2)
    experiment = from_file(path, str(gpt2_folder))
    corpus = load_corpus(experiment)
    assert corpus.validation + corpus.train == SAMPLES[:6]
    assert corpus.skipped == data.load(experiment).skipped == 1  # the last row is not needed
    # The same from what a larger run has cached.
    load_corpus(experiment.replace(samples=18))
    assert load_corpus(experiment.replace(samples=2)).skipped == 1
    assert load_corpus(experiment.replace(samples=1)).skipped == 0


def test_too_many_rows_without_text_are_refused(
    write_jsonl: WriteJsonl, gpt2_folder: Path, from_file: FromFile
) -> None:
    path = write_jsonl(*[row for text in SAMPLES[:5] for row in (text, {"text": None})])
    words = r"^dataset: got '.*corpus\.jsonl'; .*5 of 10 have none; row 2: 'text' is None"
    with pytest.raises(ParameterError, match=words):
        read(path)
    with pytest.raises(ParameterError, match=words):
        load_corpus(from_file(path, str(gpt2_folder), samples=1, validation_samples=1))
    # Two at the very beginning of a corpus that goes on are no reason to refuse it.
    path = write_jsonl("", "", *SAMPLES, name="begins badly")
    assert read(path) == Texts(SAMPLES, 2)
    assert load_corpus(from_file(path, str(gpt2_folder))).train == SAMPLES[2:6]


def test_a_corpus_without_text_is_refused_early(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    rows = ({"body": taken.append(number)} for number in range(10_000))
    with pytest.raises(ParameterError, match=r"^column: got None; accepted: one of body "):
        list(corpora._texts(rows, "endless", None, None, 5))
    assert len(taken) == corpora.LOOK


def test_messages_without_text_and_lists_of_parts(write_jsonl: WriteJsonl) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1"}]}
    said = [{"content": "add 1 and 2"}, call, {"role": "tool"}, {"content": "three"}]
    image = {"type": "image_url", "image_url": {"url": "x"}}
    parts = [{"type": "text", "text": "look "}, image, {"type": "text", "text": "here"}]
    path = write_jsonl({"messages": said}, {"messages": [{"content": parts}, {"content": "seen"}]})
    assert read(path).texts == ["add 1 and 2\nthree", "look here\nseen"]


def test_columns_that_are_not_read_do_not_decide(write_jsonl: WriteJsonl) -> None:
    rows = [{"text": "x" * 12_000, "source": None} for _ in range(1000)]
    path = write_jsonl(*rows, {"text": "last", "source": {"name": ["late"]}, "new": 1})
    assert read(path).texts[-1] == "last"
    assert read(path).skipped == 0


NAMES = ["t[1].jsonl", "y*.jsonl", "a::b.jsonl", "what?.jsonl", "{x,y}.jsonl", "UPPER.JSONL"]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_that_exists_is_that_path(
    name: str, tmp_path: Path, gpt2_folder: Path, from_file: FromFile, write_jsonl: WriteJsonl
) -> None:
    for neighbour in ("t1", "y1", "whatx", "x", "b"):
        write_jsonl(*["of another file"] * 20, name=neighbour)
    path = Path(write_jsonl(*SAMPLES, name="moved")).rename(tmp_path / name)
    assert read(path).texts == SAMPLES
    assert load_corpus(from_file(str(path), str(gpt2_folder))).train == SAMPLES[2:6]
    folder = tmp_path / "folders" / name
    folder.mkdir(parents=True)
    path.rename(folder / "train.jsonl")
    assert read(folder).texts == SAMPLES
    assert load_corpus(from_file(str(folder), str(gpt2_folder))).train == SAMPLES[2:6]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'\xef\xbb\xbf{"text": "one, two"}\r\n\r\n{"text": "th\xe2\x80\xa8ree"}\r\n'),
        # No time of now: pytest-xdist's workers must collect the same parameters.
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "one, two"}\n{"text": "th\xe2\x80\xa8ree"}', mtime=0),
        ),
        ("a.json", b'[{"text": "one, two"},\n {"text": "th\\u2028ree"}]'),
        ("a.csv", b'id,text\n1,"one, two"\n2,th\xe2\x80\xa8ree\n'),
        ("a.tsv", b"id\ttext\n1\tone, two\n2\tth\xe2\x80\xa8ree\n"),
    ],
)
def test_formats(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == Texts(["one, two", "th\u2028ree"], 0)


def test_text_files_are_one_text_each(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a whole file\nis one sample\n")
    (tmp_path / "b.txt").write_text("another")
    assert read(tmp_path).texts == ["a whole file\nis one sample", "another"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}', r"UTF-8 \(line 2, byte 14 "),
        ("a.jsonl", b'{"text": "a"}\n{"text": ' + b"[" * 100_000, r"JSON \(line 2: "),
        ("a.jsonl", b'"a"', r"objects \(line 1: 'a'\)"),
        ("a.jsonl", b"", "not empty"),
        ("a.jsonl.gz", b"plain", "can be read"),
        ("a.parquet", b"PAR1", "can be read"),
        ("a.docx", b"x", r"one of \.jsonl, "),
    ],
)
def test_refusals_name_file_and_cause(
    name: str, content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ParameterError, match=rf"^dataset: got '.*{name}'; .*{words}"):
        read(tmp_path / name)


def test_only_duplicates_of_held_out_samples(
    write_jsonl: WriteJsonl, gpt2_folder: Path, from_file: FromFile
) -> None:
    path = write_jsonl(*["again"] * 6)
    with pytest.raises(ParameterError, match=r"^samples: got 4; .*at most 0 .*4 duplicates"):
        load_corpus(from_file(path, str(gpt2_folder)))
    path = write_jsonl(*SAMPLES[:5], name="fits just")
    fitted = from_file(path, str(gpt2_folder), embedding="bigram", fitting_samples=3)
    with pytest.raises(ParameterError, match=r"^samples: got 4; .*at most 0 "):
        load_corpus(fitted)


def test_own_format_gets_rows_or_lines(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    path = write_jsonl(*[{"id": n, "body": text.upper()} for n, text in enumerate(SAMPLES)])

    def of_dict(row: dict[str, Any]) -> str | None:
        return None if row["id"] == 3 else row["body"].lower()

    assert read(path, corpus_format=of_dict) == Texts(SAMPLES[:3] + SAMPLES[4:], 1)

    lines = tmp_path / "lines.txt"
    lines.write_text("".join(f"Ann: {text} / Bob: yes\r\n" for text in SAMPLES))

    def of_line(row: str) -> str:
        return "\n".join(turn.split(": ")[1] for turn in row.split(" / "))

    assert read(lines, corpus_format=of_line).texts == [f"{text}\nyes" for text in SAMPLES]


def test_own_format_that_does_not_fit_is_named(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(*SAMPLES)
    with pytest.raises(ParameterError, match=r"^corpus_format: .*row 1: int"):
        read(path, corpus_format=len)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match=r"^corpus_format: .*nine of ten.*20 of 20"):
        read(path, corpus_format=lambda row: None)


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
    with pytest.raises(ParameterError, match=r"^column: got ''; .*body, number"):
        read(path, column="")
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
