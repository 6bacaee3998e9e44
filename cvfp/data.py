"""The token streams of an Experiment."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cvfp import cache, hub, registry
from cvfp.config import Experiment, ParameterError
from cvfp.corpora import Corpus, load_corpus
from cvfp.tokenizer import Stream, Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Data:
    """What both phases and the baselines read."""

    train: Stream
    validation: Stream
    fitting: Stream
    development: Stream  # what chooses where validation only judges; else empty
    unlabelled: Stream  # what only Phase 1 reads
    tokenizer: Tokenizer
    fingerprint: str  # of the streams and the tokeniser
    skipped: int = 0  # rows of the corpus without text among those read
    copies: int = 0  # samples left out because they repeat a held-out one
    # The tokens that validation is from do not give back all text in bits per byte.
    loses_text: bool = False
    # The Experiment's sizes that follow tokeniser and corpus where left alone.
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size


def load(experiment: Experiment) -> Data:
    """The token streams of an Experiment; texts, fitted tokenisers and tokens are cached on disk.
    Raises `ParameterError`: a file, column, split or hub that is not there, a size that exceeds the
    corpus, a sample of fewer than two tokens."""
    paths = (hub.local(experiment.dataset), "**/*"), (hub.local(experiment.tokenizer), "*")
    files = [tuple(hub.signature(path, below)) for path, below in paths if path is not None]
    only = Experiment(**experiment.to_dict("data"))
    own = registry.sources(experiment, "corpus_format").get("corpus_format", "")
    load = _load.__wrapped__ if own is None else _load  # without source: read anew
    # Equal Experiments may differ in what was left alone.
    return load(only, cache.home(), (only.left_alone, *files), own or "")


@functools.lru_cache(maxsize=8)  # to read, hash and check megabytes again takes a tenth of a second
def _load(experiment: Experiment, home: Path, files: tuple[Any, ...], own: str) -> Data:
    corpus = _corpus(experiment)
    tokenizer = load_tokenizer(experiment, corpus.fitting)
    (train, train_lost), (validation, lost), (fitting, _), (development, _), (unlabelled, _) = (
        _encode(tokenizer, getattr(corpus, role), experiment.dataset, role)
        for role in ("train", "validation", "fitting", "development", "unlabelled")
    )
    if experiment.validation == "tail":
        train, validation = _split_tail(train)
        lost = train_lost
        if len(validation) < 2:
            accepted = "enough for a tail (10 %) of at least 2 tokens"
            raise ParameterError("samples", experiment.samples, accepted)
    said = [train, validation, fitting, *(x for x in (development, unlabelled) if len(x))]
    parts = [part for stream in said for part in (stream.tokens, stream.starts)]
    parts.append(validation.text_bytes)
    words = [own] * bool(own) + ["unlabelled"] * bool(len(unlabelled))  # the same text may choose
    fingerprint = cache.digest(tokenizer.fingerprint, *parts, *words)
    figures = corpus.skipped, corpus.copies, lost
    roles = ("validation", "fitting", "development")
    sizes = {f"{role}_samples": len(getattr(corpus, role)) for role in roles}
    sizes |= dict(samples=len(corpus.train), vocab_size=tokenizer.vocab_size)
    streams = train, validation, fitting, development, unlabelled
    return Data(*streams, tokenizer, fingerprint, *figures, sizes)


def _corpus(experiment: Experiment) -> Corpus:
    """The corpus, of whose training texts only the first `samples` are Phase 2's."""
    if not (more := experiment.unlabelled_samples):
        return load_corpus(experiment)
    if experiment.validation == "tail":
        raise ParameterError("unlabelled_samples", more, "0 with validation 'tail'")
    wanted = experiment.samples + more
    try:
        corpus = load_corpus(experiment.replace(samples=wanted, unlabelled_samples=0))
    except ParameterError as error:
        if error.parameter != "samples":
            raise
        accepted = f"fewer ({experiment.samples} + {more} samples; {error.accepted})"
        raise ParameterError("unlabelled_samples", more, accepted) from error
    first = corpus.train[: experiment.samples]
    return replace(corpus, train=first, unlabelled=corpus.train[len(first) :])


def _encode(tokenizer: Tokenizer, texts: list[str], dataset: str, role: str) -> tuple[Stream, bool]:
    """The stream of `texts`, and whether one of them is another after decoding."""

    def tensors() -> dict[str, Tensor]:
        stream = tokenizer.encode(texts)
        tokens, sizes = stream.tokens.to(torch.int32), stream.text_bytes.to(torch.int32)
        lost = torch.tensor(tokenizer.loses_text(texts, stream))
        return {"tokens": tokens, "starts": stream.starts, "text_bytes": sizes, "lost": lost}

    key = cache.digest(cache.code_fingerprint("data", "tokenizer"), tokenizer.fingerprint, texts)
    cached = cache.tensors("tokens", key, tensors)
    stream = Stream(cached["tokens"].long(), cached["starts"], cached["text_bytes"].long())
    ends = torch.cat([stream.starts[1:], torch.tensor([len(stream)])])
    short = torch.nonzero(ends - stream.starts < 2)
    if len(short) and texts:
        number = int(short[0])
        short_one = f"sample {number} for {role} is {texts[number][:40]!r}"
        raise ParameterError("dataset", dataset, f"samples of at least 2 tokens ({short_one})")
    return stream, bool(cached["lost"])


def _split_tail(stream: Stream) -> tuple[Stream, Stream]:
    """The last 10 % of the tokens as validation (the protocol of notes 000-002)."""
    cut = len(stream) - len(stream) // 10
    inside = stream.starts[stream.starts > cut] - cut
    tail_starts = torch.cat([torch.zeros(1, dtype=torch.int64), inside])
    train = Stream(stream.tokens[:cut], stream.starts[stream.starts < cut], stream.text_bytes[:cut])
    return train, Stream(stream.tokens[cut:], tail_starts, stream.text_bytes[cut:])
