"""Baselines for every perplexity: language models without CVFP on the same tokens.

Probabilities are exact: float64, summing to one over the vocabulary. Own code, since no library was
found that has Kneser-Ney with exact values at array speed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvfp.data import Data
from cvfp.embeddings import BigramLM

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NAMES = {
    "unigram": "unigram, training tokens",
    "kneser_ney": "Kneser-Ney bigram, training tokens",
    "table": "the fitted table alone (no training tokens)",
    "kneser_ney_both": "Kneser-Ney bigram, fitting set + training tokens",
    "trigram": "Kneser-Ney trigram, training tokens",
    "trigram_both": "Kneser-Ney trigram, fitting set + training tokens",
}


def evaluate(data: Data, bigram: BigramLM | None) -> dict[str, float | None]:
    """Mean nats per predicted validation token of each baseline in `NAMES`; None: not available,
    without a table fitted as a language model or without a fitting set."""
    target, size = data.validation.tokens, data.vocab_size
    # Whole streams: CVFP's contexts cross the borders of conversations, so n-grams may, too.
    train, both = [data.train.tokens], [data.fitting.tokens, data.train.tokens]
    nats: dict[str, Any] = {
        "unigram": unigram_nats(train, target, size),
        "kneser_ney": kneser_ney_nats(train, target, size),
        "table": None if bigram is None else bigram.nats(target),
        "kneser_ney_both": kneser_ney_nats(both, target, size) if len(data.fitting) else None,
        "trigram": kneser_ney_nats(train, target, size, order=3),
        "trigram_both": kneser_ney_nats(both, target, size, order=3) if len(data.fitting) else None,
    }
    return {name: None if one is None else float(one.mean()) for name, one in nats.items()}


def unigram_nats(streams: list[Tensor], target: Tensor, vocab_size: int) -> Floats:
    """Add-one-smoothed unigram: nats of tokens 1 … T-1 of `target`."""
    counts = np.bincount(torch.cat(streams).numpy(), minlength=vocab_size)
    return -np.log((counts + 1) / (counts.sum() + vocab_size))[target.numpy()[1:]]


def kneser_ney_nats(
    streams: list[Tensor], target: Tensor, vocab_size: int, order: int = 2
) -> Floats:
    """Interpolated Kneser-Ney n-gram: nats of tokens 1 … T-1 of `target`.

    p(y|h) = max(c(h,y) − d, 0)/c(h) + d·N(h·)/c(h) · p(y|h'), where c counts n-grams at the highest
    order and, at lower ones, the distinct tokens that precede one; N(h·) is the number of distinct
    followers of h, h' is h without its first token, and d = n1/(n1 + 2·n2) for each order. The
    lowest p is uniform, so that unseen tokens have some probability (Kneser & Ney 1995; Chen &
    Goodman 1998). The first tokens, with a shorter history, are predicted by the lower orders.
    Raises ValueError: an order under 1, or one whose n-grams do not fit 64 bits."""
    if order < 1 or vocab_size**order >= 2**63:
        raise ValueError(f"order: got {order}; accepted: 1 or more, vocab_size ** order under 2^63")
    keys = [_keys(stream.numpy(), vocab_size, order) for stream in streams]
    levels = [np.unique(np.concatenate(keys), return_counts=True)]
    for shorter in range(order - 1, 0, -1):
        # Continuation counts: each distinct n-gram counts once for its suffix.
        levels.append(np.unique(levels[-1][0] % vocab_size**shorter, return_counts=True))
    tokens = target.numpy()
    probability = np.full(len(tokens) - 1, 1 / vocab_size)
    for number, level in enumerate(reversed(levels), start=1):
        skipped = max(0, number - 2)  # tokens 1 … T-1 whose history is shorter than this order's
        wanted = _keys(tokens, vocab_size, number)[number == 1 :]
        probability[skipped:] = _interpolated(*level, wanted, vocab_size, probability[skipped:])
    return -np.log(probability)


def _keys(tokens: Ints, vocab_size: int, order: int) -> Ints:
    """Every n-gram of a stream as one number, its last token the lowest digit."""
    keys = np.zeros(max(0, len(tokens) - order + 1), dtype=np.int64)
    for place in range(order):
        keys = keys * vocab_size + tokens[place : len(tokens) - order + 1 + place]
    return keys


def _interpolated(grams: Ints, counts: Ints, wanted: Ints, size: int, lower: Floats) -> Floats:
    """One order's probabilities of `wanted`, from its counts and those of the order below."""
    if not len(grams):  # a stream shorter than this order
        return lower
    discount = _discount(counts)
    # The n-grams are sorted: those of one history are adjacent.
    histories, first = np.unique(grams // size, return_index=True)
    total = np.add.reduceat(counts, first)
    followers = np.diff(np.append(first, len(grams)))
    place, known = _find(histories, wanted // size)
    gram, seen = _find(grams, wanted)
    count = np.where(seen, counts[gram], 0)
    higher = (np.maximum(count - discount, 0) + discount * followers[place] * lower) / total[place]
    return np.where(known, higher, lower)


def _find(among: Ints, wanted: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Each value's position in a sorted array, and whether it is in there at all."""
    place = np.minimum(np.searchsorted(among, wanted), len(among) - 1)
    return place, among[place] == wanted


def _discount(counts: Ints) -> float:
    """n1/(n1 + 2·n2), with n1 counts of one and n2 of two (Ney et al. 1994)."""
    ones, twos = int(np.count_nonzero(counts == 1)), int(np.count_nonzero(counts == 2))
    # No estimate from so few: half a count, the middle of its range.
    return ones / (ones + 2 * twos) if ones and twos else 0.5
