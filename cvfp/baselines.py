"""Baselines for every perplexity: language models without CVFP on the same tokens.

Probabilities are exact: float64, summing to one over the vocabulary, tested against loops. Own
code, since no library was found that has Kneser-Ney with exact values at array speed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cvfp.data import Data, Stream
from cvfp.embeddings import BigramLM

Floats = NDArray[np.float64]

NAMES = {
    "unigram": "unigram, training tokens",
    "kneser_ney": "Kneser-Ney bigram, training tokens",
    "table": "the fitted table alone (no training tokens)",
    "kneser_ney_both": "Kneser-Ney bigram, fitting set + training tokens",
    "trigram": "Kneser-Ney trigram, training tokens",
    "trigram_both": "Kneser-Ney trigram, fitting set + training tokens",
}


def evaluate(data: Data, bigram: BigramLM | None) -> dict[str, float | None]:
    """Mean nats per predicted validation token of each baseline in `NAMES`.

    None: not available, without a table fitted as a language model or without a fitting set.
    """
    target = data.validation.tokens
    train, fitting = _samples(data.train), _samples(data.fitting)

    def kneser_ney(streams: list[Tensor], order: int) -> float:
        return _mean(kneser_ney_nats(streams, target, data.vocab_size, order))

    both = fitting + train
    return {
        "unigram": _mean(unigram_nats(train, target, data.vocab_size)),
        "kneser_ney": kneser_ney(train, 2),
        "table": None if bigram is None else float(bigram.nats(target).mean()),
        "kneser_ney_both": kneser_ney(both, 2) if fitting else None,
        "trigram": kneser_ney(train, 3),
        "trigram_both": kneser_ney(both, 3) if fitting else None,
    }


def _samples(stream: Stream) -> list[Tensor]:
    """One tensor for the stream: CVFP's contexts cross sample borders, so n-grams may, too."""
    return [stream.tokens] if len(stream) else []


def _mean(nats: Floats) -> float:
    return float(nats.mean())


def unigram_nats(streams: list[Tensor], target: Tensor, vocab_size: int) -> Floats:
    """Add-one-smoothed unigram: nats of tokens 1 … T-1 of `target`."""
    counts = np.bincount(np.concatenate([s.numpy() for s in streams]), minlength=vocab_size)
    probabilities = (counts + 1) / (counts.sum() + vocab_size)
    nats: Floats = -np.log(probabilities)[target.numpy()[1:]]
    return nats


def kneser_ney_nats(
    streams: list[Tensor], target: Tensor, vocab_size: int, order: int = 2
) -> Floats:
    """Interpolated Kneser-Ney n-gram: nats of tokens 1 … T-1 of `target`.

    p(y|h) = max(c(h,y) − d, 0)/c(h) + d·N(h·)/c(h) · p(y|h'), where c counts n-grams at the highest
    order and, at lower ones, the distinct tokens that precede one; N(h·) is the number of distinct
    followers of h, h' is h without its first token, and d = n1/(n1 + 2·n2) for each order. The
    lowest p is uniform, so that unseen tokens have some probability (Kneser & Ney 1995; Chen &
    Goodman 1998). The first tokens, with a shorter history, are predicted by the lower orders.

    Raises:
        ValueError: an order under 1, or one whose n-grams do not fit 64 bits.
    """
    if order < 1 or vocab_size**order >= 2**63:
        raise ValueError(f"order: got {order}; accepted: 1 or more, vocab_size ** order under 2^63")
    grams, counts = _grams([s.numpy().astype(np.int64) for s in streams], vocab_size, order)
    levels = [(grams, counts)]
    for shorter in range(order - 1, 0, -1):
        # Continuation counts: each distinct n-gram counts once for its suffix.
        levels.append(np.unique(levels[-1][0] % vocab_size**shorter, return_counts=True))
    tokens = target.numpy().astype(np.int64)
    probability = np.full(len(tokens) - 1, 1 / vocab_size)
    for number, (grams, counts) in enumerate(reversed(levels), start=1):
        skipped = max(0, number - 2)  # tokens 1 … T-1 whose history is shorter than this order's
        wanted = _keys(tokens, vocab_size, number)[number == 1 :]
        probability[skipped:] = _interpolated(
            grams, counts, wanted, vocab_size, probability[skipped:]
        )
    nats: Floats = -np.log(probability)
    return nats


def _keys(tokens: NDArray[np.int64], vocab_size: int, order: int) -> NDArray[np.int64]:
    """Every n-gram of a stream as one number, its last token the lowest digit."""
    keys = np.zeros(max(0, len(tokens) - order + 1), dtype=np.int64)
    for place in range(order):
        keys = keys * vocab_size + tokens[place : len(tokens) - order + 1 + place]
    return keys


def _grams(
    streams: list[NDArray[np.int64]], vocab_size: int, order: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.unique(
        np.concatenate([_keys(s, vocab_size, order) for s in streams]), return_counts=True
    )


def _interpolated(
    grams: NDArray[np.int64],
    counts: NDArray[np.int64],
    wanted: NDArray[np.int64],
    vocab_size: int,
    lower: Floats,
) -> Floats:
    """One order's probabilities of `wanted`, from its counts and those of the order below."""
    if not len(grams):  # a stream shorter than this order
        return lower
    discount = _discount(counts)
    # The n-grams are sorted: those of one history are adjacent.
    histories, first = np.unique(grams // vocab_size, return_index=True)
    total = np.add.reduceat(counts, first)
    followers = np.diff(np.append(first, len(grams)))
    place, known = _find(histories, wanted // vocab_size)
    gram, seen = _find(grams, wanted)
    count = np.where(seen, counts[gram], 0)
    higher = (np.maximum(count - discount, 0) + discount * followers[place] * lower) / total[place]
    return np.where(known, higher, lower)


def _find(
    among: NDArray[np.int64], wanted: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Each value's position in a sorted array, and whether it is in there at all."""
    place = np.minimum(np.searchsorted(among, wanted), len(among) - 1)
    return place, among[place] == wanted


def _discount(counts: NDArray[np.int64]) -> float:
    """n1/(n1 + 2·n2), with n1 counts of one and n2 of two (Ney et al. 1994)."""
    ones, twos = int(np.count_nonzero(counts == 1)), int(np.count_nonzero(counts == 2))
    # No estimate from so few: half a count, the middle of its range.
    return ones / (ones + 2 * twos) if ones and twos else 0.5
