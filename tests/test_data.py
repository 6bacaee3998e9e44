from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers

import cvfp
from cvfp import Experiment, ParameterError, cache, data
from cvfp.analysis import readings
from cvfp.corpora import load_corpus
from cvfp.data import Stream

FromFile = Callable[..., Experiment]
WriteJsonl = Callable[..., str]


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


def test_bytes_of_the_text_follow_the_streams(tiny: Experiment) -> None:
    held_out, tail = data.load(tiny), data.load(tiny.replace(validation="tail"))
    whole = len("".join(load_corpus(tiny).train).encode())
    assert held_out.train.text_bytes.sum() == whole
    assert tail.train.text_bytes.sum() + tail.validation.text_bytes.sum() == whole
    assert len(tail.validation.text_bytes) == len(tail.validation)
    assert (held_out.loses_text, tail.loses_text) == (False, False)


@pytest.fixture
def lossy_folder(tmp_path: Path) -> str:
    """A tokeniser of words that knows two, as transformers saves it."""
    backend = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "yes": 1, "no": 2}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "t")
    return str(tmp_path / "t")


@pytest.mark.parametrize("validation", ["held_out", "tail"])
def test_a_tokeniser_that_loses_text_says_so(
    validation: str, lossy_folder: str, from_file: FromFile, write_jsonl: WriteJsonl
) -> None:
    path = write_jsonl("yes I do no", *[f"no yes {i}" for i in range(9)])
    experiment = from_file(
        path, lossy_folder, validation=validation, validation_samples=1, samples=9
    )
    made = data.load(experiment)
    assert made.loses_text
    if validation == "held_out":
        assert made.validation.text_bytes.tolist() == [3, 2, 3, 3]
    result = cvfp.run(experiment.replace(phase1_max_iterations=2, phase2_epochs=1))
    bits = math.log2(result.val_ppl) * (result.val_tokens - 1)
    assert result.val_bpb == pytest.approx(bits / int(made.validation.text_bytes[1:].sum()))
    assert result.loses_text
    assert "does not give back" in readings.quickstart(result)


def test_the_same_tokens_of_another_text_are_other_data(
    lossy_folder: str, from_file: FromFile, write_jsonl: WriteJsonl
) -> None:
    made = []
    for word in ("perhaps", "maybe"):
        path = write_jsonl(f"yes {word}", "no yes", "no no", name=word)
        made.append(data.load(from_file(path, lossy_folder, validation_samples=1, samples=2)))
    assert torch.equal(made[0].validation.tokens, made[1].validation.tokens)
    assert made[0].fingerprint != made[1].fingerprint


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
