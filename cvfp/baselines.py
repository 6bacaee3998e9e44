"""Language models without CVFP on the same tokens: the lines that stand beside every perplexity.

All are exact: float64 probabilities that sum to one over the vocabulary, tested against loops.
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
}


def evaluate(data: Data, bigram: BigramLM | None) -> dict[str, float | None]:
    """Mean nats per predicted validation token of each baseline in `NAMES`.

    None where there is nothing to measure: no table fitted as a language model, no fitting set.
    """
    target = data.validation.tokens
    train, fitting = _samples(data.train), _samples(data.fitting)
    return {
        "unigram": _mean(unigram_nats(train, target, data.vocab_size)),
        "kneser_ney": _mean(kneser_ney_nats(train, target, data.vocab_size)),
        "table": None if bigram is None else float(bigram.nats(target).mean()),
        "kneser_ney_both": _mean(kneser_ney_nats(fitting + train, target, data.vocab_size))
        if fitting
        else None,
    }


def _samples(stream: Stream) -> list[Tensor]:
    """One tensor for the stream: contexts cross sample borders, so may the bigram's."""
    return [stream.tokens] if len(stream) else []


def _mean(nats: Floats) -> float:
    return float(nats.mean())


def unigram_nats(streams: list[Tensor], target: Tensor, vocab_size: int) -> Floats:
    """Add-one-smoothed unigram: nats of tokens 1 … T-1 of `target`."""
    counts = np.bincount(np.concatenate([s.numpy() for s in streams]), minlength=vocab_size)
    probabilities = (counts + 1) / (counts.sum() + vocab_size)
    nats: Floats = -np.log(probabilities)[target.numpy()[1:]]
    return nats


def kneser_ney_nats(streams: list[Tensor], target: Tensor, vocab_size: int) -> Floats:
    """Interpolated Kneser-Ney bigram: nats of tokens 1 … T-1 of `target`, given token 0 … T-2.

    p(y|x) = max(c(x,y) − d, 0)/c(x) + d·N(x·)/c(x) · p(y), where N(x·) is the number of different
    followers of x, d = n1/(n1 + 2·n2), and p(y) the continuation probability N(·y)/N(··), itself
    discounted the same way towards the uniform distribution, so that unseen tokens have a share
    (Kneser & Ney 1995; Chen & Goodman 1998).
    """
    pairs = np.concatenate(
        [s.numpy()[:-1].astype(np.int64) * vocab_size + s.numpy()[1:] for s in streams]
    )
    seen, counts = np.unique(pairs, return_counts=True)
    first, second = np.divmod(seen, vocab_size)
    total = np.bincount(first, counts, vocab_size)  # c(x)
    followers = np.bincount(first, minlength=vocab_size)  # N(x·)
    continuations = np.bincount(second, minlength=vocab_size)  # N(·y)

    discount = _discount(continuations[continuations > 0])
    types = np.count_nonzero(continuations)
    lower = (
        np.maximum(continuations - discount, 0) + discount * types / vocab_size
    ) / continuations.sum()

    discount = _discount(counts)
    x, y = target.numpy()[:-1], target.numpy()[1:]
    wanted = x.astype(np.int64) * vocab_size + y
    place = np.minimum(np.searchsorted(seen, wanted), len(seen) - 1)
    count = np.where(seen[place] == wanted, counts[place], 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        higher = np.maximum(count - discount, 0) / total[x]
        backoff = discount * followers[x] / total[x]
    known = total[x] > 0
    probability = np.where(known, higher + backoff * lower[y], lower[y])
    nats: Floats = -np.log(probability)
    return nats


def _discount(counts: NDArray[np.int64]) -> float:
    """n1/(n1 + 2·n2), from how many counts are one and how many two (Ney et al. 1994)."""
    ones, twos = int(np.count_nonzero(counts == 1)), int(np.count_nonzero(counts == 2))
    # Too few for the estimate: half a count, between its limits 0 and 1.
    return ones / (ones + 2 * twos) if ones and twos else 0.5
