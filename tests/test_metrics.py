"""Metrics and baselines against independent computations."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from cvfp import baselines, gap, metrics


def test_effective_rank_equals_an_svd() -> None:
    contexts = torch.randn(300, 20).double() @ torch.randn(20, 20).double()
    singular = torch.linalg.svdvals(contexts)
    shares = singular / singular.sum()
    wanted = math.exp(float(-(shares * shares.log()).sum()))
    got = metrics.singular_values(contexts.float())
    torch.testing.assert_close(got, singular, rtol=1e-5, atol=1e-4)
    assert metrics.effective_rank(got) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("rank", "total"), [(1, 50), (3, 50), (8, 50), (2, 2)])
def test_effective_rank_of_equal_directions_is_their_number(rank: int, total: int) -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(8, 8, generator=generator).double()).Q[:rank]
    contexts = directions.repeat(math.ceil(total / rank), 1)[: total // rank * rank]
    assert metrics.effective_rank(metrics.singular_values(contexts)) == pytest.approx(
        rank, rel=1e-6
    )


def test_effective_rank_is_uncentred_and_zero_for_zeros() -> None:
    constant = torch.ones(40, 6)
    assert metrics.effective_rank(metrics.singular_values(constant)) == pytest.approx(1, rel=1e-6)
    assert metrics.effective_rank(metrics.singular_values(torch.zeros(40, 6))) == 0


def test_agreement_by_hand() -> None:
    reference = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    contexts = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    figures = gap.agreement(contexts, reference)
    assert figures["cosine_mean"] == pytest.approx(0.5)
    assert figures["cosine_min"] == pytest.approx(0.0)
    assert figures["mse"] == pytest.approx(0.5)
    assert figures["relative_error_mean"] == pytest.approx(math.sqrt(2) / 2)


def test_bits_per_byte() -> None:
    assert metrics.bits_per_byte(math.log(2) * 10, 5) == pytest.approx(2.0)
    assert metrics.perplexity(math.log(7)) == pytest.approx(7)
    assert metrics.perplexity(1e4) == math.inf


def streams(vocab: int) -> tuple[list[Tensor], Tensor]:
    generator = np.random.default_rng(0)
    weights = 1 / np.arange(1, vocab + 1)
    draw = lambda size: torch.from_numpy(  # noqa: E731
        generator.choice(vocab, size, p=weights / weights.sum()).astype(np.int64)
    )
    return [draw(400), draw(50)], draw(120)


def literal_kneser_ney(parts: list[Tensor], x: int, vocab: int) -> list[float]:
    """p(· | x) from dictionaries and loops, in the textbook's order."""
    pairs = Counter((int(a), int(b)) for p in parts for a, b in pairwise(p))
    before: dict[int, set[int]] = defaultdict(set)
    after: dict[int, set[int]] = defaultdict(set)
    for a, b in pairs:
        before[b].add(a)
        after[a].add(b)

    def discount(counts: list[int]) -> float:
        ones, twos = counts.count(1), counts.count(2)
        return ones / (ones + 2 * twos) if ones and twos else 0.5

    types, different = sum(len(s) for s in before.values()), len(before)
    low = discount([len(s) for s in before.values()])
    lower = [
        max(len(before[y]) - low, 0) / types + low * different / types / vocab for y in range(vocab)
    ]
    total = sum(c for (a, _), c in pairs.items() if a == x)
    if total == 0:
        return lower
    d = discount(list(pairs.values()))
    return [
        max(pairs[(x, y)] - d, 0) / total + d * len(after[x]) / total * lower[y]
        for y in range(vocab)
    ]


@pytest.mark.parametrize("vocab", [12, 60])
def test_kneser_ney_equals_a_literal_one(vocab: int) -> None:
    parts, target = streams(vocab)
    nats = baselines.kneser_ney_nats(parts, target, vocab)
    assert len(nats) == len(target) - 1
    for i in range(len(target) - 1):
        distribution = literal_kneser_ney(parts, int(target[i]), vocab)
        assert sum(distribution) == pytest.approx(1, abs=1e-9)
        assert nats[i] == pytest.approx(-math.log(distribution[int(target[i + 1])]), abs=1e-9)


def test_kneser_ney_sums_to_one_also_after_unseen_tokens() -> None:
    parts, _ = streams(12)
    vocab = 15  # 12, 13 and 14 never occur
    for x in (0, 5, 14):
        pairs = [torch.tensor([x, y]) for y in range(vocab)]
        total = sum(math.exp(-baselines.kneser_ney_nats(parts, p, vocab)[0]) for p in pairs)
        assert total == pytest.approx(1, abs=1e-9)


def literal_trigram(parts: list[list[int]], history: list[int], vocab: int) -> list[float]:
    """p(· | history) by the recursion as the textbook has it, over dictionaries."""
    full: dict[int, Counter[tuple[int, ...]]] = {3: Counter(), 2: Counter(), 1: Counter()}
    for part in parts:
        for i in range(len(part) - 2):
            full[3][tuple(part[i : i + 3])] += 1
    for order in (2, 1):
        for gram in full[order + 1]:
            full[order][gram[1:]] += 1  # one for every different token before it

    def p(order: int, history: tuple[int, ...]) -> list[float]:
        if order == 0:
            return [1 / vocab] * vocab
        lower = p(order - 1, history[1:])
        counts = full[order]
        ones = sum(1 for c in counts.values() if c == 1)
        twos = sum(1 for c in counts.values() if c == 2)
        d = ones / (ones + 2 * twos) if ones and twos else 0.5
        mine = {gram[-1]: c for gram, c in counts.items() if gram[:-1] == history}
        total = sum(mine.values())
        if total == 0:
            return lower
        return [
            max(mine.get(y, 0) - d, 0) / total + d * len(mine) / total * lower[y]
            for y in range(vocab)
        ]

    order = min(3, len(history) + 1)
    return p(order, tuple(history[len(history) - order + 1 :]))


@pytest.mark.parametrize("vocab", [6, 40])
def test_kneser_ney_trigram_equals_a_literal_one(vocab: int) -> None:
    streams_, target = streams(vocab)
    parts = [part.tolist() for part in streams_]
    nats = baselines.kneser_ney_nats(streams_, target, vocab, order=3)
    wanted = target.tolist()
    assert len(nats) == len(wanted) - 1
    for i in range(len(wanted) - 1):
        distribution = literal_trigram(parts, wanted[max(0, i - 1) : i + 1], vocab)
        assert sum(distribution) == pytest.approx(1, abs=1e-9)
        assert nats[i] == pytest.approx(-math.log(distribution[wanted[i + 1]]), abs=1e-9)


def test_kneser_ney_of_a_stream_shorter_than_its_order() -> None:
    short, target = torch.tensor([3, 1]), torch.tensor([3, 1, 2])
    wanted = baselines.kneser_ney_nats([torch.tensor([3, 1, 2, 1])], target, 5, order=3)
    assert len(wanted) == 2
    # No trigram, no bigram, no unigram that stands after one: what is left is uniform.
    assert np.allclose(baselines.kneser_ney_nats([short], target, 5, order=3), np.log(5))


@pytest.mark.parametrize(("order", "vocab"), [(0, 10), (-1, 10), (3, 2_100_000)])
def test_kneser_ney_names_an_order_that_cannot_be(order: int, vocab: int) -> None:
    tokens = torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match=r"order: got .* accepted: 1 or more"):
        baselines.kneser_ney_nats([tokens], tokens, vocab, order)


def test_unigram_sums_to_one() -> None:
    parts, _ = streams(12)
    pairs = [torch.tensor([0, y]) for y in range(15)]
    total = sum(math.exp(-baselines.unigram_nats(parts, p, 15)[0]) for p in pairs)
    assert total == pytest.approx(1, abs=1e-12)
