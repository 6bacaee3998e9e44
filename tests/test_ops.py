"""Each fast form of a formula against its plain form, which is the definition."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_experiment
from scipy import stats
from torch import Tensor

from cvfp import ParameterError, config, ops
from cvfp.ops import plain, precision

# Of a norm, relative: what the type rounds off, and what two orders of summation part.
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
BOTH = tuple(CLOSE)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + sum(shape)))


def products(dtype: torch.dtype) -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def close(made: Tensor, wanted: Tensor, limit: float) -> None:
    assert made.shape == wanted.shape
    assert made.dtype == wanted.dtype
    difference = float((made.double() - wanted.double()).norm())
    assert difference <= limit * max(float(wanted.double().norm()), 1e-2)


def gradients(
    made: Tensor, leaves: Sequence[Tensor], upstream: Tensor | None = None
) -> list[Tensor | None]:
    return list(torch.autograd.grad(made, leaves, upstream, allow_unused=True))


def both(
    function: Callable[[], Tensor],
    leaves: Sequence[Tensor],
    upstream: Tensor | None,
    dtype: torch.dtype,
    scale: float = 1.0,
    size: float = 0.0,
) -> None:
    """Forward and gradients, fast and plain, in products of `dtype`.

    Args:
        size: of the gradients' terms, where their sum is known to be zero.
    """
    with products(dtype):
        fast = function()
        with ops.using("plain"):
            wanted = function()
    close(fast.detach(), wanted.detach(), CLOSE[dtype])
    pairs = zip(gradients(fast, leaves, upstream), gradients(wanted, leaves, upstream), strict=True)
    largest = 0.0
    for mine, theirs in pairs:
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert mine.shape == theirs.shape
            assert mine.dtype == theirs.dtype
            largest = max(largest, float(theirs.norm()))
            difference = float((mine.double() - theirs.double()).norm())
            reference = max(float(theirs.norm()), 0.05 * largest, size)
            assert difference <= scale * CLOSE[dtype] * reference


def layer(
    lead: tuple[int, ...], widths: Sequence[int], width: int, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Parts, and weight, bias, residual, scale, shift; all with gradients."""
    parts = [draws(*lead, k, seed=seed + i) for i, k in enumerate(widths)]
    weight = draws(width, sum(widths), seed=seed + 10) / sum(widths) ** 0.5
    rest = [draws(width, seed=seed + 11) * 0.1, draws(*lead, width, seed=seed + 12)]
    rest += [1 + 0.2 * draws(width, seed=seed + 13), 0.2 * draws(width, seed=seed + 14)]
    leaves = [weight, *rest]
    for leaf in (*parts, *leaves):
        leaf.requires_grad_()
    return parts, leaves


# LayerNorm(residual + ReLU(product))


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("width", [1, 7, 64, 65, 130])
@pytest.mark.parametrize("lead", [(1,), (3,), (300,), (2, 3), (5, 1, 40)])
@pytest.mark.parametrize("widths", [(8,), (64, 5), (3, 65, 1)])
def test_residual_norm(
    widths: tuple[int, ...], lead: tuple[int, ...], width: int, dtype: torch.dtype
) -> None:
    parts, leaves = layer(lead, widths, width)
    upstream = draws(*lead, width, seed=20)
    # bfloat16 decides now and then otherwise about a product near zero.
    both(
        lambda: ops.residual_norm(parts, *leaves, 1e-5),
        [*parts, *leaves],
        upstream,
        dtype,
        scale=1.0 if dtype == torch.float32 else 3.0,
        size=float(upstream.norm()) if width == 1 else 0.0,  # LayerNorm of one number is constant
    )


@pytest.mark.parametrize("dtype", BOTH)
def test_residual_norm_with_threads(dtype: torch.dtype, threads: int) -> None:
    parts, leaves = layer((515,), (20, 12), 24)
    upstream = draws(515, 24, seed=20)
    both(lambda: ops.residual_norm(parts, *leaves, 1e-5), [*parts, *leaves], upstream, dtype)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("lead", [(3,), (130,), (2, 70)])
def test_residual_that_is_the_first_part(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    """A context's gradient comes by both ways."""
    parts, (weight, bias, _, scale, shift) = layer(lead, (16, 7), 16)
    upstream = draws(*lead, 16, seed=20)
    both(
        lambda: ops.residual_norm(parts, weight, bias, parts[0], scale, shift, 1e-5),
        [*parts, weight, bias, scale, shift],
        upstream,
        dtype,
        scale=1.0 if dtype == torch.float32 else 2.0,
    )


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("eps", [1e-8, 1e-5, 0.1, 3.0])
def test_residual_norm_takes_the_eps_it_is_given(eps: float, dtype: torch.dtype) -> None:
    parts, leaves = layer((70,), (8, 3), 12)
    upstream = draws(70, 12, seed=20)
    both(
        lambda: ops.residual_norm(parts, *leaves, eps),
        [*parts, *leaves],
        upstream,
        dtype,
        scale=1.0 if dtype == torch.float32 else 2.0,
    )


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("frozen", ["parts", "residual", "first part", "weights", "bias", "norm"])
def test_only_what_needs_a_gradient_gets_one(frozen: str, dtype: torch.dtype) -> None:
    parts, leaves = layer((80,), (8, 3), 12)
    still = {
        "parts": parts,
        "first part": parts[:1],
        "residual": leaves[2:3],
        "weights": leaves[:2],
        "bias": leaves[1:2],
        "norm": leaves[3:],
    }[frozen]
    for leaf in still:
        leaf.requires_grad_(False)
    moved = [leaf for leaf in (*parts, *leaves) if leaf.requires_grad]
    both(lambda: ops.residual_norm(parts, *leaves, 1e-5), moved, draws(80, 12, seed=20), dtype, 2.0)
    with products(dtype):
        ops.residual_norm(parts, *leaves, 1e-5).sum().backward()
    assert all(leaf.grad is None for leaf in still)
    assert all(leaf.grad is not None for leaf in moved)


def test_without_gradients_there_is_no_graph() -> None:
    parts, leaves = layer((3,), (8,), 12)
    with torch.no_grad():
        assert not ops.residual_norm(parts, *leaves, 1e-5).requires_grad
        table, target = draws(9, 12).requires_grad_(), torch.tensor([1, 2, 3])
        assert not ops.next_token_nats(draws(3, 12), table, None, target).requires_grad


def test_parts_of_any_layout() -> None:
    """Slices, transposed, expanded; and an upstream gradient that is expanded."""
    parts, leaves = layer((90,), (8, 3), 12)
    turned = parts[0].detach().T.contiguous().T.requires_grad_()
    wide = draws(90, 40).requires_grad_()
    one_row = draws(1, 12, seed=3).requires_grad_()

    def made() -> Tensor:
        given = [turned, wide[:, 5:8]]
        weight, bias, _, scale, shift = leaves
        first = ops.residual_norm(given, weight, bias, wide[:, -12:], scale, shift, 1e-5)
        again = [first[:, :8], first[:, 9:]]
        return ops.residual_norm(
            again, weight, bias, one_row.expand(90, 12), scale, shift, 1e-5
        ).sum()

    both(made, [turned, wide, one_row, *leaves[:2], *leaves[3:]], None, torch.float32, scale=10)


@pytest.mark.parametrize("dtype", BOTH)
def test_contexts_kept_in_bfloat16_are_read(dtype: torch.dtype) -> None:
    """Phase 1 leaves contexts in the type of the products; what reads them may be in float32."""
    parts, leaves = layer((70,), (12, 3), 12)
    kept = parts[0].detach().bfloat16()
    weight, bias, _, scale, shift = leaves

    def made() -> Tensor:  # the plain form goes on in bfloat16, which a fast one need not
        return ops.residual_norm([kept, parts[1]], weight, bias, kept, scale, shift, 1e-5).float()

    both(made, [parts[1], weight, bias, scale, shift], draws(70, 12, seed=20), dtype, 3.0)


def test_the_graph_can_be_kept_and_used_twice() -> None:
    parts, leaves = layer((70,), (8,), 12)
    made = ops.residual_norm(parts, *leaves, 1e-5).square().sum()
    first = torch.autograd.grad(made, leaves, retain_graph=True)
    again = torch.autograd.grad(made, leaves)
    assert all(map(torch.equal, first, again))
    hidden, table = draws(70, 9).requires_grad_(), draws(31, 9, seed=1).requires_grad_()
    nats = ops.next_token_nats(hidden, table, None, torch.arange(70) % 31)
    first = torch.autograd.grad(nats, [hidden, table], retain_graph=True)
    again = torch.autograd.grad(3 * nats, [hidden, table])
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(3 * one, other)


# Cross-entropy over the table


def few_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast form makes as few logits at once as it can."""
    engine = ops._engine(torch.ones(1))
    if hasattr(engine, "_LOGITS"):
        monkeypatch.setattr(engine, "_LOGITS", 1)
    else:
        monkeypatch.setitem(engine.LOGITS, "cpu", 1)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("vocabulary", [7, 400, 4097])
@pytest.mark.parametrize("rows", [1, 3, 150])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_next_token_nats(
    frozen: bool, bias: bool, rows: int, vocabulary: int, dtype: torch.dtype
) -> None:
    hidden = draws(rows, 24).requires_grad_()
    weight = draws(vocabulary, 24, seed=1).requires_grad_(not frozen)
    shift = draws(vocabulary, seed=2).requires_grad_(not frozen) if bias else None
    target = torch.arange(rows) * 7 % vocabulary
    leaves = [one for one in (hidden, weight, shift) if one is not None and one.requires_grad]
    both(lambda: 3 * ops.next_token_nats(hidden, weight, shift, target), leaves, None, dtype)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("stretch", [0.1, 2.0, 40.0])
def test_next_token_nats_in_pieces(
    stretch: float, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits a few rows at a time, the last piece smaller; and logits up to hundreds."""
    few_logits(monkeypatch)
    hidden = (draws(150, 24) * stretch).requires_grad_()
    weight, bias = draws(65, 24, seed=1).requires_grad_(), draws(65, seed=2).requires_grad_()
    target = torch.arange(150) % 65
    leaves = [hidden, weight, bias]
    if stretch < 40:
        both(lambda: ops.next_token_nats(hidden, weight, bias, target), leaves, None, dtype)
        return
    # What is as good as impossible may count as no less likely than float32 can say …
    with products(dtype):
        fast = ops.next_token_nats(hidden, weight, bias, target)
        each = F.cross_entropy(F.linear(hidden, weight, bias), target, reduction="none").double()
    least = -math.log(torch.finfo(torch.float32).tiny)
    floor, whole = float(each.clamp(max=least).mean()), float(each.mean())
    assert 0.98 * floor <= float(fast.detach()) <= 1.02 * whole
    # … but pulls as hard as it is.
    for mine, theirs in zip(gradients(fast, leaves), gradients(each.mean(), leaves), strict=True):
        assert mine is not None
        assert theirs is not None
        assert float((mine - theirs).norm()) < 2 * CLOSE[dtype] * float(theirs.norm())


def test_a_hopeless_token_has_its_whole_gradient() -> None:
    table, hidden = torch.tensor([[300.0], [-300.0]]), torch.ones(1, 1, requires_grad=True)
    nats = ops.next_token_nats(hidden, table, None, torch.tensor([1]))
    assert 80 < float(nats.detach()) < 601
    (gradient,) = torch.autograd.grad(nats, hidden)
    assert float(gradient) == pytest.approx(600)


def test_scores_are_cross_entropy_and_ties_are_wrong() -> None:
    hidden, weight, bias = draws(50, 9), draws(31, 9, seed=1), draws(31, seed=2)
    target = torch.arange(50) % 31
    nats, correct = ops.score_next_tokens(hidden, weight, bias, target)
    logits = hidden @ weight.T + bias
    wanted = F.cross_entropy(logits.double(), target, reduction="none")
    assert nats.dtype == torch.float64
    torch.testing.assert_close(nats, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(correct, logits.argmax(1) == target)
    _, correct = ops.score_next_tokens(
        torch.eye(3), torch.tensor([[1.0, 2, 1], [1, 0, 0], [0, 0, 0]]), None, torch.zeros(3).long()
    )
    assert correct.tolist() == [False, True, True]


@pytest.mark.parametrize("rows", [1, 150])
@pytest.mark.parametrize("vocabulary", [7, 400])
def test_log_partition(vocabulary: int, rows: int) -> None:
    hidden, table = draws(rows, 24).requires_grad_(), draws(vocabulary, 24, seed=1).requires_grad_()
    bias, shares = draws(vocabulary, seed=2).requires_grad_(), draws(rows, seed=3).softmax(0)
    leaves = [hidden, table, bias]
    both(lambda: 3 * ops.log_partition(*leaves, shares), leaves, None, torch.float32)
    exact = shares.double() @ (hidden @ table.T + bias).double().logsumexp(1)
    assert float(ops.log_partition(*leaves, shares).detach()) == pytest.approx(float(exact), 1e-5)


# Phase 1's loss


def test_change_and_spread_are_the_formula() -> None:
    new, old = draws(3, 7, 5).double(), draws(3, 7, 5, seed=1).double()
    change, spread = ops.change_and_spread(new, old)
    for k in range(3):
        mean = sum(new[k, t] for t in range(7)) / 7
        frobenius = math.sqrt(float(sum(((new[k, t] - mean) ** 2).sum() for t in range(7))))
        assert float(spread[k]) == pytest.approx(frobenius / 7, abs=1e-12)
        for t in range(7):
            mse = sum(float(new[k, t, d] - old[k, t, d]) ** 2 for d in range(5)) / 5
            assert float(change[k, t]) == pytest.approx(mse, abs=1e-12)
    both(
        lambda: (lambda made: made[0].sum() + made[1].sum())(
            ops.change_and_spread(leaf, old.float())
        ),
        [leaf := new.float().requires_grad_()],
        None,
        torch.float32,
    )


def test_equal_contexts_have_a_finite_gradient() -> None:
    same = torch.full((1, 6, 4), 3.0, requires_grad=True)
    change, spread = ops.change_and_spread(same, torch.zeros(1, 6, 4))
    assert (change == 9).all()
    assert float(spread.detach()) == 0
    (gradient,) = torch.autograd.grad(change.sum() + spread.sum(), same)
    assert torch.isfinite(gradient).all()


# Types


def test_float64_is_the_plain_form_and_has_its_derivatives() -> None:
    for lead in ((4,), (2, 3)):
        parts, leaves = layer(lead, (3, 2), 4)
        doubles = [one.detach().double().requires_grad_() for one in (*parts, *leaves)]
        exact = plain.residual_norm(doubles[:2], *doubles[2:], 1e-5)
        assert torch.equal(ops.residual_norm(doubles[:2], *doubles[2:], 1e-5), exact)
        assert torch.autograd.gradcheck(
            lambda *given: ops.residual_norm(given[:2], *given[2:], 1e-5), doubles
        )
    hidden, table, bias = (
        draws(*shape).double().requires_grad_() for shape in ((5, 3), (9, 3), (9,))
    )
    target = torch.tensor([0, 8, 3, 3, 1])
    assert torch.autograd.gradcheck(
        lambda *given: ops.next_token_nats(*given, target), (hidden, table, bias)
    )
    old = draws(2, 4, 3, seed=1).double()
    assert torch.autograd.gradcheck(
        lambda new: ops.change_and_spread(new, old), draws(2, 4, 3).double().requires_grad_()
    )


@pytest.mark.parametrize("dtype", BOTH)
def test_what_is_not_a_number_stays_so(dtype: torch.dtype) -> None:
    parts, leaves = layer((80,), (8,), 12)
    with torch.no_grad():
        parts[0][1, 2] = math.nan
        leaves[2][2, 3] = math.inf
        leaves[2][3, 11] = math.nan
    with products(dtype):
        made = ops.residual_norm(parts, *leaves, 1e-5)
    assert (~torch.isfinite(made).all(dim=1)).nonzero()[:, 0].tolist() == [1, 2, 3]
    (gradient,) = torch.autograd.grad(made.sum(), leaves[:1])
    assert not torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["hidden", "right row", "other row", "bias"])
def test_nats_of_what_is_not_finite(where: str, value: float, dtype: torch.dtype) -> None:
    hidden, weight, bias = draws(70, 8), draws(65, 8, seed=1), draws(65, seed=2)
    target = torch.arange(70) % 60
    {"hidden": hidden[3], "right row": weight[4], "other row": weight[64], "bias": bias[63:]}[
        where
    ][0] = value
    hidden.requires_grad_()
    with products(dtype):
        nats = ops.next_token_nats(hidden, weight, bias, target)
    assert not math.isfinite(float(nats.detach()))


# Draws


@pytest.fixture(params=["auto", "plain"])
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    with ops.using(request.param):
        yield request.param


def drawn(*sizes: int, seed: int = 0, std: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = [ops.gaussian_(torch.empty(size, 10), std, generator, size) for size in sizes]
    return torch.cat(made)


def test_gaussian_draws_are_gaussian(mode: str) -> None:
    values = drawn(40_000, std=0.1).double().numpy().ravel() / 0.1
    assert stats.kstest(values, "norm").pvalue > 0.01
    assert abs(values.mean()) < 0.006
    assert abs(values.std() - 1) < 0.005
    assert abs(stats.skew(values)) < 0.02
    assert abs(stats.kurtosis(values)) < 0.04
    assert 4 < abs(values).max() < 6
    for lag in (1, 10, 2**16):  # of neighbours, of one column, of two generators
        assert abs(stats.pearsonr(values[:-lag], values[lag:]).statistic) < 0.008
    assert len(set(values.round(6).tolist())) > 300_000


def test_gaussian_draws_are_the_generators(mode: str) -> None:
    assert torch.equal(drawn(2000), drawn(2000))
    assert not torch.equal(drawn(2000), drawn(2000, seed=1))
    two = drawn(2000, 2000)
    assert not torch.equal(two[:2000], two[2000:])
    assert torch.equal(two[:2000], drawn(2000))
    assert torch.isfinite(drawn(30_001)).all()
    before = torch.random.get_rng_state()
    out = torch.empty(7, 3)
    assert ops.gaussian_(out, 1.0, torch.Generator().manual_seed(0), 7) is out
    assert torch.equal(torch.random.get_rng_state(), before)
    silent = ops.gaussian_(torch.empty(5, 3), 0.0, torch.Generator(), 2)
    assert torch.equal(silent, torch.zeros(5, 3))


def test_gaussian_draws_do_not_depend_on_the_pieces_passed_at_once(mode: str) -> None:
    whole = ops.gaussian_(torch.empty(40, 10), 1.0, torch.Generator().manual_seed(3), 8)
    generator = torch.Generator().manual_seed(3)
    pieces = [ops.gaussian_(torch.empty(n, 10), 1.0, generator, 8) for n in (8, 16, 16)]
    assert torch.equal(whole, torch.cat(pieces))


def test_gaussian_draws_do_not_depend_on_the_threads(mode: str) -> None:
    made, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        made.append(drawn(30_000))
    torch.set_num_threads(before)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


# The door


def test_using_goes_back_to_what_was() -> None:
    parts, leaves = layer((70,), (8,), 12)

    def is_plain() -> bool:
        name = type(ops.residual_norm(parts, *leaves, 1e-5).grad_fn).__name__
        return name == "NativeLayerNormBackward0"

    assert not is_plain()
    with ops.using("plain"):
        assert is_plain()
        with ops.using("auto"):
            assert not is_plain()
        assert is_plain()
    assert not is_plain()
    with pytest.raises(ZeroDivisionError), ops.using("plain"):
        raise ZeroDivisionError
    assert not is_plain()


@pytest.mark.parametrize("mode", ["fast", "", "PLAIN"])
def test_an_unknown_mode_is_refused(mode: str) -> None:
    with (
        pytest.raises(ParameterError, match=f"ops: got '{mode}'; accepted: 'auto' or 'plain'"),
        ops.using(mode),
    ):
        pytest.fail("it was taken")
    with pytest.raises(ParameterError, match="ops: got"):
        tiny_experiment(ops=mode)


def test_plain_is_torchs_adam_and_no_recording() -> None:
    weight = torch.ones(3, requires_grad=True)
    with ops.using("plain"):
        assert isinstance(ops.optimiser([weight], 0.1), torch.optim.Adam)
    assert not isinstance(ops.optimiser([weight], 0.1), torch.optim.Adam)

    def step(given: Tensor) -> Tensor:
        return given + 1

    if not torch.cuda.is_available():
        assert ops.recorded(step, 10**6) is step
    with ops.using("plain"):
        assert ops.recorded(step, 10**6) is step


@pytest.mark.parametrize(("total", "group"), [(1, 1), (50, 16), (48, 16), (50, 7), (10, 10)])
def test_slices_hold_whole_groups_and_a_smaller_last_one(
    total: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_device = torch.device("cpu")
    for most in (1, 3 * group * 10, 2**20):
        monkeypatch.setitem(ops.placement.PASS, "cpu", most)
        slices = ops.group_slices(total, group, 10, 2, cpu_device)
        covered = [t for part in slices for t in range(part.start, part.stop)]
        assert covered == list(range(total))
        sizes = [part.stop - part.start for part in slices]
        whole = sizes[:-1] if total % group else sizes
        assert all(size % group == 0 for size in whole)
        if total % group:
            assert sizes[-1] == total % group
        if most == 1:
            assert max(sizes) == group
    with ops.using("plain"):
        slices = ops.group_slices(total, group, 10, 2, cpu_device)
        assert [part.stop - part.start for part in slices[: total // group]] == [group] * (
            total // group
        )


# bfloat16 where it pays


def test_automatic_precision_is_what_was_measured(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.dtype] = []
    for ratio, wanted in ((1.29, "float32"), (1.31, "bfloat16"), (0.2, "float32")):

        def rate(device: str, dtype: torch.dtype, ratio: float = ratio) -> float:
            calls.append(dtype)
            return 1.0 if dtype == torch.float32 else ratio

        monkeypatch.setenv("CVFP_HOME", str(home / wanted / str(ratio)))
        monkeypatch.setattr(precision, "product_rate", rate)
        assert ops.bfloat16_gain("cpu") == pytest.approx(ratio)
        assert config.resolve_precision("auto", "cpu") == wanted
        measured = len(calls)
        assert config.resolve_precision("auto", "cpu") == wanted
        assert len(calls) == measured > 0  # once, then read
        assert config.resolve_precision("float32", "cpu") == "float32"
        assert config.resolve_precision("bfloat16", "cpu") == "bfloat16"


def test_another_processor_is_measured_anew(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "product_rate", lambda device, dtype: 1.0)
    assert ops.bfloat16_gain("cpu") == 1.0
    monkeypatch.setattr(
        precision, "product_rate", lambda device, dtype: 0.5 if dtype == torch.float32 else 1.0
    )
    assert ops.bfloat16_gain("cpu") == 1.0
    monkeypatch.setattr(precision, "processor", lambda: "another one")
    assert ops.bfloat16_gain("cpu") == 2.0
    assert len(list((home / "products").iterdir())) == 2


def test_the_processor_is_named_with_its_units() -> None:
    assert ops.processor()
    assert ops.processor() == ops.processor()


def test_plain_does_without_numba() -> None:
    code = """
import sys, torch
from cvfp import ops
with ops.using("plain"):
    one = torch.ones(4)
    ops.residual_norm([torch.ones(3, 4)], torch.ones(4, 4), one, one, one, one, 1e-5)
    ops.gaussian_(one, 1.0, torch.Generator(), 4)
assert "numba" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
