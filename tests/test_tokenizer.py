from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from cvfp import Experiment, ParameterError, data
from cvfp.corpora import load_corpus
from cvfp.tokenizer import Tokenizer, fit_bpe, load_tokenizer


@pytest.fixture(scope="session")
def bpe(tiny: Experiment) -> Tokenizer:
    return data.load(tiny).tokenizer


@pytest.fixture(scope="session")
def gpt2(gpt2_folder: Path) -> Tokenizer:
    return load_tokenizer(Experiment(tokenizer=str(gpt2_folder), vocab_size=None), fitting=[])


@given(st.lists(st.text(min_size=1), min_size=1, max_size=4))
@settings(deadline=None, max_examples=40)
def test_bytes_and_roundtrip(bpe: Tokenizer, gpt2: Tokenizer, texts: list[str]) -> None:
    for tokenizer in (bpe, gpt2):
        stream = tokenizer.encode(texts)
        assert tokenizer.decode(stream.tokens.tolist()) == "".join(texts)
        assert tokenizer.count_bytes(stream.tokens) == len("".join(texts).encode())


def test_bytes_at_a_cut_within_a_character(bpe: Tokenizer, gpt2: Tokenizer) -> None:
    text = "👩‍🚀 naïve 東京 <|endoftext|>\n\tok"
    for tokenizer in (bpe, gpt2):
        tokens = tokenizer.encode([text]).tokens
        assert tokenizer.count_bytes(tokens) == len(text.encode())
        single = [tokenizer.count_bytes(tokens[i : i + 1]) for i in range(len(tokens))]
        assert sum(single) == len(text.encode())
        assert min(single) >= 1


def test_pretrained_tokens_are_those_of_transformers(gpt2: Tokenizer, gpt2_folder: Path) -> None:
    reference = transformers.AutoTokenizer.from_pretrained(gpt2_folder)
    texts = ["Hello there, how are you?\nFine 🙂", "x " * 3000]
    stream = gpt2.encode(texts)
    wanted = [reference(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert stream.tokens.tolist() == wanted[0] + wanted[1]
    assert stream.starts.tolist() == [0, len(wanted[0])]
    assert gpt2.vocab_size == 50257


def test_vocab_size_that_is_not_the_pretrained_one(tiny: Experiment, gpt2_folder: Path) -> None:
    right = tiny.replace(tokenizer=str(gpt2_folder), vocab_size=50257)
    assert load_tokenizer(right, []).vocab_size == 50257
    with pytest.raises(ParameterError, match=r"^vocab_size: got 400; .*None, or 50257"):
        load_tokenizer(right.replace(vocab_size=400), [])


def test_bpe_has_the_vocabulary_asked_for(bpe: Tokenizer) -> None:
    assert bpe.vocab_size == 400 == len(bpe.backend.get_vocab())


def test_bpe_with_too_large_a_vocabulary_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"^vocab_size: got 5000; .*at most \d+ "):
        fit_bpe(["a few words only"], 5000)


def test_bpe_is_deterministic(tiny: Experiment, tmp_path: Path, monkeypatch: Any) -> None:
    fitting = load_corpus(tiny).fitting
    made = []
    for name in ("first", "second"):
        monkeypatch.setenv("CVFP_HOME", str(tmp_path / name))
        made.append(fit_bpe(fitting, 600).backend.to_str())
    assert made[0] == made[1]


def test_bpe_is_fitted_on_the_fitting_set_alone(tiny: Experiment) -> None:
    other = tiny.replace(samples=9, validation_samples=8, validation="tail", seed=9)
    assert data.load(other).tokenizer.fingerprint == data.load(tiny).tokenizer.fingerprint
    fewer = data.load(tiny.replace(fitting_samples=50)).tokenizer
    assert fewer.fingerprint != data.load(tiny).tokenizer.fingerprint


def test_tokenizer_survives_pickle(bpe: Tokenizer) -> None:
    import pickle

    texts = ["one text", "and another"]
    copy = pickle.loads(pickle.dumps(bpe))
    assert copy.fingerprint == bpe.fingerprint
    assert torch.equal(copy.encode(texts).tokens, bpe.encode(texts).tokens)
