from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cvfp import Experiment, ParameterError, cache, data
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
