"""The gap between parallel and exact contexts, and its causes, against plain loops."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import WriteJsonl
from torch import Tensor

from cvfp import data, experiment, gap, metrics, phase1, run, seeds
from cvfp.analysis import plots, published, readings, tables
from cvfp.analysis.intervals import Paired
from cvfp.build import build
from cvfp.config import Experiment, ParameterError
from cvfp.inputs import TokenInputs
from cvfp.model import ContextBlock, initialise
from cvfp.ops import plain
from cvfp.recurrence import Recurrence, diagnose

SWEEPS = 12
# Iterations after which little is left of where Phase 1 began, and a threshold that stops none.
SETTLED: dict[str, Any] = dict(
    samples=2, phase1_max_iterations=60, convergence_threshold=1e-30, precision="float32"
)
Made = TypeVar("Made")


@dataclass
class Case:
    """A measured gap, and beside it Phase 1 run directly and the exact contexts by a loop."""

    experiment: Experiment
    gap: gap.Gap
    block: ContextBlock
    inputs: TokenInputs
    history: list[dict[str, Tensor]]  # the weights that each iteration read
    first: phase1.Phase1
    exact: Tensor


def copied(block: ContextBlock) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in block.state_dict().items()}


def untrained(one: Experiment) -> tuple[ContextBlock, TokenInputs]:
    streams, table = experiment.prepare(one)
    model = build(one, table.weight, streams.tokenizer)
    return model.context_block, model.context_inputs(streams.train.tokens)


@torch.no_grad()
def plain_loop(block: ContextBlock, inputs: TokenInputs) -> Tensor:
    """The contexts of a stream, one token after the other from zeros."""
    context = torch.zeros(1, block.context_dim)
    rows = []
    for t in range(len(inputs)):
        context = block(context, inputs.dense(slice(t, t + 1)))[-1]
        rows.append(context)
    return torch.cat(rows)


@torch.no_grad()
def shifted(block: ContextBlock, inputs: TokenInputs, made: Tensor, ring: bool = False) -> Tensor:
    """One sweep without chunks: row t is made from row t-1; row 0 from zeros, or the last row."""
    read = made.roll(1, dims=0)
    if not ring:
        read[0] = 0
    return block(read, inputs.dense())[-1].float()


def case(one: Experiment) -> Case:
    block, inputs = untrained(one)
    history = [copied(block)]
    first = phase1.train(
        block,
        inputs,
        one,
        seeds.generator(one.seed, "phase1"),
        lambda row: history.append(copied(block)),
    )
    history.pop()  # the final weights: no iteration read them
    measured = gap.measure(one, sweeps=SWEEPS)
    return Case(one, measured, block, inputs, history, first, plain_loop(block, inputs))


@pytest.fixture(scope="module")
def noisy(tiny: Experiment) -> Case:
    return case(tiny.replace(**SETTLED))


@pytest.fixture(scope="module")
def quiet(tiny: Experiment) -> Case:
    return case(tiny.replace(**SETTLED, phase1_noise=0.0))


@pytest.fixture(scope="module")
def rounded(tiny: Experiment) -> Case:
    """Phase 1's products in bfloat16; few iterations, so that the window is the largest cause."""
    return case(tiny.replace(samples=2, precision="bfloat16"))


@pytest.fixture(params=["noisy", "quiet", "rounded"])
def any_case(request: pytest.FixtureRequest) -> Case:
    made: Case = request.getfixturevalue(request.param)
    return made


def figures(made: Tensor, right: Tensor) -> dict[str, float]:
    """The columns of a comparison, by their formulas in float64."""
    a, b = made.double().numpy(), right.double().numpy()
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(axis=1) / (norms[0] * norms[1])
    relative = np.linalg.norm(a - b, axis=1) / norms[1]
    return {
        "cosine_mean": cosine.mean(),
        "cosine_min": cosine.min(),
        "mse": ((a - b) ** 2).mean(),
        "relative_error_mean": relative.mean(),
        "relative_error_p95": np.quantile(relative, 0.95),
    }


def assert_row(row: pd.Series, wanted: dict[str, float], rel: float = 1e-3) -> None:
    assert list(row.index) == list(wanted)
    for name, value in wanted.items():
        # Two float32 evaluations differ by about 1e-6 of a context's norm.
        allowed = 1e-7 if name == "mse" else 2e-5
        assert row[name] == pytest.approx(value, rel=rel, abs=allowed), name


# What is measured, and against what


def test_gap_is_that_of_phase1s_last_iterate_to_a_plain_loop(any_case: Case) -> None:
    measured = any_case.gap
    assert measured.tokens == len(any_case.inputs) == len(any_case.exact)
    assert measured.iterations == any_case.first.iterations == len(any_case.history) + 1
    assert_row(
        measured.agreement.loc[gap.AS_LEFT], figures(any_case.first.contexts, any_case.exact)
    )
    # A gap: the one is not the other.
    assert measured.agreement.mse[gap.AS_LEFT] > 1e-3


def test_exact_contexts_are_those_of_the_final_weights(any_case: Case) -> None:
    made = any_case.gap.exact
    assert made.converged
    assert float(metrics.relative_errors(made.values, any_case.exact).max()) < 2e-3
    assert float(metrics.relative_errors(made.values, any_case.exact).mean()) < 1e-5
    recurrence = diagnose(any_case.block, any_case.inputs, any_case.exact)
    assert any_case.gap.recurrence.memory_length == recurrence.memory_length
    assert any_case.gap.recurrence.contraction_rate == pytest.approx(
        recurrence.contraction_rate, rel=1e-3
    )


def test_weights_after_measuring_are_those_that_phase1_leaves(any_case: Case) -> None:
    left, final = any_case.gap.block.state_dict(), any_case.block.state_dict()
    assert left.keys() == final.keys()
    assert all(torch.equal(left[name], final[name]) for name in final)
    assert not torch.equal(left["linears.0.weight"], any_case.history[-1]["linears.0.weight"])
    assert torch.equal(any_case.gap.inputs.rows, any_case.inputs.rows)
    assert torch.equal(any_case.gap.inputs.table, any_case.inputs.table)
    assert any_case.gap.experiment == any_case.experiment


def test_measuring_again_gives_the_same_whatever_else_is_drawn(tiny: Experiment) -> None:
    small = tiny.replace(samples=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        one = gap.measure(small, sweeps=2)
        torch.manual_seed(2)
        other = gap.measure(small, sweeps=2)
    for name in ("agreement", "positions", "along", "clean", "windows"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name))
    moved = gap.measure(small.replace(seed=43), sweeps=2)
    assert (moved.agreement.mse != one.agreement.mse).all()


# Each cause alone


@torch.no_grad()
def repeated(
    one: Case, start: Tensor, weights: list[dict[str, Tensor]], ring: bool = False
) -> Tensor:
    """A sweep with each of the weights in turn."""
    block = ContextBlock(
        one.experiment.num_layers,
        one.experiment.context_dim,
        one.block.input_dim,
        one.experiment.token_input_all_layers,
    )
    made = start
    for each in weights:
        block.load_state_dict(each)
        made = shifted(block, one.inputs, made, ring)
    return made


def still(one: Case) -> list[dict[str, Tensor]]:
    """The final weights, once for every iteration that there was."""
    return [one.block.state_dict()] * (one.gap.iterations - 1)


def test_moving_weights_are_those_that_each_iteration_read(any_case: Case) -> None:
    made = repeated(any_case, any_case.exact, any_case.history)
    assert_row(any_case.gap.agreement.loc["updates"], figures(made, any_case.exact), rel=3e-3)


def test_the_last_update_moves_the_exact_contexts(any_case: Case) -> None:
    block, _ = untrained(any_case.experiment)
    block.load_state_dict(any_case.history[-1])
    made = plain_loop(block, any_case.inputs)
    assert_row(any_case.gap.agreement.loc["last_update"], figures(made, any_case.exact), rel=3e-3)


def test_ring_reaches_as_far_as_the_recurrence_remembers(any_case: Case) -> None:
    made = repeated(any_case, any_case.exact, still(any_case), ring=True)
    row = any_case.gap.agreement.loc["ring"]
    assert_row(row, figures(made, any_case.exact), rel=3e-3)
    assert row.mse > 0


def test_window_is_what_sweeps_from_phase1s_start_have_not_seen(quiet: Case, rounded: Case) -> None:
    for one in (quiet, rounded):
        draw = torch.Generator().manual_seed(7)
        start = torch.randn(one.exact.shape, generator=draw) * phase1.INITIAL_STD
        made = repeated(one, start, still(one))
        # Another draw of the same size: one sweep more or less would change as much as 20 %.
        mse = figures(made, one.exact)["mse"]
        assert one.gap.agreement.mse["window"] == pytest.approx(mse, rel=0.02)


def test_noise_is_as_strong_as_in_training(noisy: Case) -> None:
    draw = torch.Generator().manual_seed(7)
    made = noisy.exact
    with torch.no_grad():
        for _ in range(noisy.gap.iterations - 1):
            read = made.roll(1, dims=0)
            read[0] = 0
            read += noisy.experiment.phase1_noise * torch.randn(read.shape, generator=draw)
            made = noisy.block(read, noisy.inputs.dense())[-1]
    mse = figures(made, noisy.exact)["mse"]
    assert noisy.gap.agreement.mse["noise"] == pytest.approx(mse, rel=0.1)


def test_without_noise_nothing_is_due_to_noise(quiet: Case, noisy: Case) -> None:
    row = quiet.gap.agreement.loc["noise"]
    # What is left is the rounding of float32, also in the exact contexts.
    assert row.relative_error_mean < 1e-5
    assert row.mse < 1e-9 * quiet.gap.agreement.mse[gap.AS_LEFT]
    assert noisy.gap.agreement.mse["noise"] > 0.1 * noisy.gap.agreement.mse[gap.AS_LEFT]


def test_without_noise_the_other_causes_together_are_phase1(quiet: Case) -> None:
    draw = seeds.generator(quiet.experiment.seed, "phase1")
    start = torch.empty_like(quiet.exact).normal_(0.0, phase1.INITIAL_STD, generator=draw)
    made = repeated(quiet, start, quiet.history, ring=True)
    torch.testing.assert_close(made, quiet.first.contexts, rtol=0, atol=1e-3)


def test_shares_of_the_causes_add_up(quiet: Case, noisy: Case) -> None:
    for one in (quiet, noisy):
        mse = one.gap.agreement.mse
        added = mse["noise"] + mse["updates"] + mse["window"] + mse["ring"]
        assert added == pytest.approx(mse[gap.AS_LEFT], rel=0.1)


def test_bfloat16_is_a_cause_only_where_phase1_used_it(rounded: Case, quiet: Case) -> None:
    assert "bfloat16" not in quiet.gap.agreement.index
    assert set(rounded.gap.agreement.index) == {gap.AS_LEFT, *gap.CAUSES}
    made = rounded.exact
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(rounded.gap.iterations - 1):
            made = shifted(rounded.block, rounded.inputs, made)
    row = rounded.gap.agreement.loc["bfloat16"]
    assert_row(row, figures(made, rounded.exact), rel=0.05)
    # bfloat16 has 8 bits: an error of that size, not of float32's.
    assert 1e-4 < row.relative_error_mean < 0.1


# Positions, clean sweeps and windows


def test_positions_are_the_first_middle_and_last_hundred_tokens(any_case: Case) -> None:
    total = any_case.gap.tokens
    assert list(any_case.gap.positions.index) == ["first", "middle", "last"]
    middle = (total - 100) // 2
    for name, low in (("first", 0), ("middle", middle), ("last", total - 100)):
        part = slice(low, low + 100)
        assert_row(
            any_case.gap.positions.loc[name],
            figures(any_case.first.contexts[part], any_case.exact[part]),
        )


def bins(along: pd.DataFrame) -> list[tuple[int, int]]:
    """First and last token of each bin, from the centres: the first bin starts at token 0."""
    made, low = [], 0
    for position in along.position:
        high = round(2 * position - 1 - low)
        made.append((low, high))
        low = high
    return made


def test_bins_along_the_stream_have_their_mean_and_least_cosine(any_case: Case) -> None:
    made, right = any_case.first.contexts.double(), any_case.exact.double()
    cosine = torch.nn.functional.cosine_similarity(made, right, dim=1)
    along = any_case.gap.along
    for (low, high), (_, row) in zip(bins(along), along.iterrows(), strict=True):
        assert high > low
        assert row.cosine == pytest.approx(float(cosine[low:high].mean()), abs=1e-4)
        assert row.cosine_min == pytest.approx(float(cosine[low:high].min()), abs=1e-4)
    assert bins(along)[0] == (0, 1)
    # On a log axis the early tokens have bins of their own.
    widths = np.diff(bins(along), axis=1).ravel()
    assert widths[0] == 1
    assert 40 <= len(along) <= gap.BINS
    assert widths[-1] == widths.max()


@pytest.mark.parametrize("total", [300, 342, 3856])
def test_bins_along_the_stream_hold_every_token(total: int) -> None:
    values = torch.randn(total, 4, generator=torch.Generator().manual_seed(1))
    assert bins(gap._along(values, values))[-1][1] == total


def test_clean_sweeps_go_on_from_what_phase1_leaves(any_case: Case) -> None:
    clean = any_case.gap.clean
    assert clean.columns.tolist() == ["sweep", "mse", "relative_error_mean"]
    assert clean["sweep"].tolist() == list(range(SWEEPS + 1))
    whole = any_case.gap.agreement.loc[gap.AS_LEFT]
    assert clean.loc[0, ["mse", "relative_error_mean"]].tolist() == [
        whole.mse,
        whole.relative_error_mean,
    ]
    made = any_case.first.contexts
    for number in range(1, SWEEPS + 1):
        made = shifted(any_case.block, any_case.inputs, made)
        wanted = figures(made, any_case.exact)
        for name in ("mse", "relative_error_mean"):
            assert clean[name][number] == pytest.approx(wanted[name], rel=1e-3)


@torch.no_grad()
def restarted(block: ContextBlock, inputs: TokenInputs, token: int, window: int) -> Tensor:
    """The context at `token` if it was zero `window` tokens earlier: [1, D]."""
    context = torch.zeros(1, block.context_dim)
    for t in range(max(0, token - window + 1), token + 1):
        context = block(context, inputs.dense(slice(t, t + 1)))[-1]
    return context


def test_windows_are_contexts_restarted_so_many_tokens_earlier(noisy: Case) -> None:
    few = 40
    block, inputs, right = noisy.block, noisy.inputs.first(few), noisy.exact[:few]
    windows = gap._windows(block, inputs, right, 7)
    assert windows.tokens.tolist() == list(range(1, 8))
    before = torch.zeros_like(right)
    for _, row in windows.iterrows():
        k = int(row.tokens)
        made = torch.cat([restarted(block, inputs, t, k) for t in range(few)])
        error = torch.linalg.vector_norm(made - right, dim=1) / right.norm(dim=1)
        assert row.relative_error_mean == pytest.approx(float(error.mean()), rel=1e-4)
        assert row.relative_error_max == pytest.approx(float(error.max()), rel=1e-4)
        change = torch.linalg.vector_norm(made - before, dim=1) / made.norm(dim=1)
        assert row.residual == pytest.approx(float(change.max()), rel=1e-4)
        # The first k tokens lie inside the window: nothing is missing.
        assert float(error[:k].max()) < 1e-5
        before = made


def test_windows_of_a_measured_gap_are_over_the_whole_stream(any_case: Case) -> None:
    windows = any_case.gap.windows
    assert windows.tokens.tolist() == list(range(1, SWEEPS + 1))
    block, inputs = any_case.block, any_case.inputs
    # Side by side: every token's own restart.
    ends = torch.arange(len(inputs))
    for k in (1, 3, SWEEPS):
        made = torch.zeros_like(any_case.exact)
        with torch.no_grad():
            for back in range(k - 1, -1, -1):
                there = ends - back >= 0
                made[there] = block(made[there], inputs.dense(ends[there] - back))[-1]
        row = windows.set_index("tokens").loc[k]
        error = metrics.relative_errors(made, any_case.exact)
        assert row.relative_error_mean == pytest.approx(float(error.mean()), rel=1e-3)
        assert row.relative_error_max == pytest.approx(float(error.max()), rel=1e-3)


# One sweep


def random_block(every: bool = True) -> tuple[ContextBlock, TokenInputs, Tensor]:
    """A block, a stream of 23 tokens and contexts to read."""
    generator = torch.Generator().manual_seed(3)
    block = ContextBlock(2, 10, 2 * 8, every)
    initialise(block, generator)
    tokens = torch.randint(0, 20, (23,), generator=generator)
    inputs = TokenInputs(tokens, torch.randn(20, 8, generator=generator), 2)
    return block, inputs, torch.randn(23, 10, generator=generator)


@torch.no_grad()
def literal_sweep(
    block: ContextBlock, inputs: TokenInputs, made: Tensor, before: Tensor, noise: Tensor
) -> Tensor:
    rows = []
    for t in range(len(made)):
        read = (before if t == 0 else made[t - 1]) + noise[t]
        rows.append(block(read[None], inputs.dense(slice(t, t + 1)))[-1])
    return torch.cat(rows)


# Borders inside the stream, at its end, one token from it, none, and one at every token.
@pytest.mark.parametrize("chunk", [1, 5, 22, 23, 8000])
@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("ring", [True, False])
@pytest.mark.parametrize("every", [True, False])
def test_sweep_equals_a_literal_loop(
    every: bool, ring: bool, noise: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gap, "CHUNK", chunk)
    block, inputs, made = random_block(every)
    kept = made.clone()
    start = torch.zeros(10)
    draw = torch.Generator().manual_seed(5)
    sizes = [min(chunk, 23 - low) for low in range(0, 23, chunk)]
    drawn = torch.cat([torch.empty(n, 10).normal_(0.0, 1.0, generator=draw) for n in sizes])
    wanted = literal_sweep(block, inputs, made, made[-1] if ring else start, noise * drawn)

    swept = gap.sweep(
        block,
        inputs,
        made,
        noise=noise,
        generator=torch.Generator().manual_seed(5),
        ring=ring,
    )
    torch.testing.assert_close(swept, wanted, rtol=0, atol=1e-5)
    assert torch.equal(made, kept)
    assert not swept.requires_grad


def test_sweep_goes_on_drawing_where_it_stopped() -> None:
    block, inputs, made = random_block()

    def noised(generator: torch.Generator) -> Tensor:
        return gap.sweep(block, inputs, made, noise=0.3, generator=generator, ring=True)

    one, other = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    first, second = noised(one), noised(one)
    assert torch.equal(first, noised(other))
    assert torch.equal(second, noised(other))
    assert not torch.equal(first, second)


def test_sweep_in_bfloat16_keeps_float32_contexts() -> None:
    block, inputs, made = random_block()
    plain, coarse = (
        gap.sweep(block, inputs, made, precision=name, ring=True)
        for name in ("float32", "bfloat16")
    )
    assert coarse.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = block(made.roll(1, dims=0), inputs.dense())[-1].float()
    assert torch.equal(coarse, wanted)
    assert 1e-5 < float(metrics.relative_errors(coarse, plain).mean()) < 0.1


# Errors


@pytest.mark.parametrize("sweeps", [0, -3])
def test_no_sweeps_are_refused_by_name(tiny: Experiment, sweeps: int) -> None:
    with pytest.raises(ParameterError, match=f"got {sweeps}; accepted: at least 1") as caught:
        gap.measure(tiny, sweeps=sweeps)
    assert caught.value.parameter == "sweeps"


def test_too_few_tokens_are_refused_by_name(
    from_file: Callable[..., Experiment], gpt2_folder: Any, write_jsonl: WriteJsonl
) -> None:
    settings: dict[str, Any] = dict(samples=1, validation_samples=1)
    for words in (299, 300):
        path = write_jsonl("held out", " tea" * words)  # one of GPT-2's tokens
        one = from_file(path, str(gpt2_folder), **settings)
        assert len(data.load(one).train) == words
        if words == 300:
            assert gap.measure(one, sweeps=1).tokens == words
            continue
        with pytest.raises(ParameterError, match="at least 300 training tokens") as caught:
            gap.measure(one, sweeps=1)
        assert (caught.value.parameter, caught.value.value) == ("samples", 1)


def test_divergence_names_the_learning_rate(tiny: Experiment) -> None:
    with pytest.raises(FloatingPointError, match="phase1_learning_rate"):
        gap.measure(tiny.replace(samples=1, phase1_learning_rate=1e30), sweeps=1)


@pytest.mark.parametrize("lengths", [[24], [0], [5, -1], [23, 1000]])
def test_lengths_that_the_stream_does_not_have_are_refused(lengths: list[int]) -> None:
    block, inputs, _ = random_block()
    with pytest.raises(ParameterError, match="lengths of 1 to 23 tokens") as caught:
        gap.times(block, inputs, lengths)
    assert (caught.value.parameter, caught.value.value) == ("lengths", lengths)


def test_one_token_and_the_whole_stream_are_lengths() -> None:
    block, inputs, _ = random_block()
    assert gap.times(block, inputs, [23, 1], repeats=1).tokens.tolist() == [23, 1]


# Times: what is timed and what is missing, not how long it takes


def test_a_loop_that_was_not_run_has_no_time(noisy: Case) -> None:
    lengths = [1, 90, 300, 301]
    frame = gap.times(noisy.block, noisy.inputs, lengths, repeats=1, longest_sequential=300)
    assert frame.tokens.tolist() == lengths
    assert frame.sequential.isna().tolist() == [False, False, False, True]
    assert frame.difference.isna().tolist() == [False, False, False, True]
    assert (frame.difference.dropna() < 1e-4).all()
    seconds = frame[["sequential", "shifted", "blocks"]].astype(float)
    assert not (seconds == 0).any(axis=None)
    assert frame[["shifted", "blocks"]].notna().all(axis=None)


def test_no_loop_at_all_leaves_only_nulls(noisy: Case) -> None:
    frame = gap.times(noisy.block, noisy.inputs, [90], repeats=1, longest_sequential=89)
    assert frame.sequential.isna().all()


def test_tables_take_times_without_any_loop(noisy: Case) -> None:
    frame = gap.times(noisy.block, noisy.inputs, [90], repeats=1, longest_sequential=89)
    assert frame.difference.isna().all()
    assert tables.times(frame)["loop / blocks"].tolist() == ["–"]
    assert "Exact, in parallel" in readings.parallel(noisy.gap, frame, SURE)


def test_what_is_timed_makes_the_same_contexts(
    noisy: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, Any]] = []

    def untimed(call: Callable[[], Made], repeats: int) -> tuple[float, Made]:
        calls.append((repeats, call()))
        return float(len(calls)), calls[-1][1]

    monkeypatch.setattr(gap, "_timed", untimed)
    frame = gap.times(noisy.block, noisy.inputs, [200], repeats=4)
    (blocks, evaluated), (passes, swept), (once, looped) = calls
    assert (blocks, passes, once) == (4, 4, 1)
    assert frame.loc[0, ["blocks", "shifted", "sequential"]].tolist() == [1, 2, 3]
    for values in (evaluated.values, swept, looped.values):
        torch.testing.assert_close(values, noisy.exact[:200], rtol=0, atol=1e-4)
    # The loop has no residual; blocks do.
    assert not looped.residuals
    error = metrics.relative_errors(evaluated.values, looped.values).max()
    assert frame.difference[0] == float(error)


def test_time_is_the_median_of_the_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    def ticks() -> Iterator[float]:
        yield from (0, 7, 10, 12, 20, 23)  # 7, 2 and 3 seconds

    clock = ticks()
    monkeypatch.setattr(gap, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    made = iter("abc")
    assert gap._timed(lambda: next(made), 3) == (3, "c")


# Tables


def percent(text: str) -> float:
    return float(text.removesuffix("%")) / 100


def test_table_of_causes_adds_up(any_case: Case) -> None:
    table, mse = tables.causes(any_case.gap), any_case.gap.agreement.mse
    wanted = [gap.AS_LEFT, *(gap.CAUSES[name] for name in gap.CAUSES if name in mse.index)]
    assert list(table.index) == [*wanted, "the causes, added"]
    present = gap.CAUSES["bfloat16"] in table.index
    assert present == (any_case.experiment.precision == "bfloat16")
    shares = table["share of the whole MSE"].map(percent)
    assert shares[gap.AS_LEFT] == 1
    for name, words in gap.CAUSES.items():
        if name in mse.index:
            assert shares[words] == pytest.approx(mse[name] / mse[gap.AS_LEFT], abs=6e-4)
            assert float(table["MSE"][words]) == pytest.approx(mse[name], rel=0.06)
            error = any_case.gap.agreement.relative_error_mean[name]
            assert percent(table["relative error"][words]) == pytest.approx(error, abs=6e-5)
    # The last update is one of the updates: it does not count twice.
    apart = shares.drop([gap.AS_LEFT, gap.CAUSES["last_update"], "the causes, added"])
    assert shares["the causes, added"] == pytest.approx(apart.sum(), abs=4e-3)
    assert table.loc["the causes, added", ["cosine, mean", "relative error"]].tolist() == ["", ""]


def test_table_of_agreement_stands_beside_the_note(noisy: Case) -> None:
    table = tables.agreement(noisy.gap, published.table("000_agreement"))
    row = noisy.gap.agreement.loc[gap.AS_LEFT]
    here, note = table["measured here"], table["published, note 000"]
    assert here["tokens"] == f"{noisy.gap.tokens:,}"
    assert float(here["cosine, mean"]) == pytest.approx(row.cosine_mean, abs=6e-5)
    assert float(here["cosine, least"]) == pytest.approx(row.cosine_min, abs=6e-5)
    assert float(here["mean squared error"]) == pytest.approx(row.mse, abs=6e-7)
    assert percent(here["relative error, mean"]) == pytest.approx(row.relative_error_mean, abs=6e-4)
    p95 = percent(here["relative error, 95th percentile"])
    assert p95 == pytest.approx(row.relative_error_p95, abs=6e-4)
    assert note.tolist() == ["56,602", "0.9969", "0.9890", "0.006156", "7.5%", "–"]


def test_table_of_positions_stands_beside_the_note(noisy: Case) -> None:
    table = tables.positions(noisy.gap, published.table("000_positions"))
    assert list(table.index) == ["first", "middle", "last"]
    assert table["MSE, published"].tolist() == ["0.0069", "0.0062", "0.0057"]
    assert table["cosine, published"].tolist() == ["0.9966", "0.9969", "0.9972"]
    for name in table.index:
        row = noisy.gap.positions.loc[name]
        assert float(table["MSE"][name]) == pytest.approx(row.mse, abs=6e-5)
        assert float(table["cosine"][name]) == pytest.approx(row.cosine_mean, abs=6e-5)


def test_what_a_gap_ran_on_is_said(any_case: Case) -> None:
    facts = tables.gap_ran_on(any_case.gap)[""]
    measured, one = any_case.gap, any_case.experiment
    assert facts["corpus"] == f"chitchat, 2 conversations, {measured.tokens:,} tokens"
    assert facts["precision"] == f"{one.precision} in Phase 1"
    assert facts["Phase 1 iterations"] == str(measured.iterations)
    assert facts["seed"] == str(one.seed)
    assert facts["exact contexts, sweeps"] == str(measured.exact.sweeps)
    last = measured.exact.residuals[-1]["relative"]
    assert facts["exact contexts, last residual"] == f"{last:.1e}"
    memory = measured.recurrence.memory_length
    assert facts["memory length"] == ("–" if memory is None else f"{memory} tokens")
    assert facts["contraction rate per token"] == f"{measured.recurrence.contraction_rate:.3f}"
    silent = dataclasses.replace(measured, recurrence=Recurrence(None, None, []))
    missing = tables.gap_ran_on(silent)[""]
    assert missing[["contraction rate per token", "memory length"]].tolist() == ["–", "–"]


TIMED = pd.DataFrame(
    {
        "tokens": [1000, 50_000],
        "sequential": [2.0, None],
        "shifted": [0.01, 0.5],
        "blocks": [0.04, 1.25],
        "difference": [3e-7, None],
    }
)


def test_table_of_times_leaves_out_what_was_not_run() -> None:
    table = tables.times(TIMED)
    assert table.index.tolist() == ["1,000", "50,000"]
    assert table["step by step, s"].tolist() == ["2.000", "–"]
    assert table["blocks, s"].tolist() == ["0.040", "1.250"]
    assert table["shifted pass, s"].tolist() == ["0.010", "0.500"]
    assert table["loop / blocks"].tolist() == ["50x", "–"]
    assert table["largest relative difference"].tolist() == ["3e-07", "–"]


def pair(change: float, low: float | None, high: float | None) -> Paired:
    return Paired(change, low, high, 1 if low is None else 3, 20, (change,) * 3, None)


SURE = pair(0.02, 0.01, 0.03)


def test_table_of_pairs_gives_each_its_row() -> None:
    table = tables.pairs({"a": pair(0.0234, -0.001, 0.05), "b": pair(-0.01, None, None)})
    assert table.loc["a"].tolist() == ["+2.3%", "-0.1% … +5.0%", 3, 20, "+2.3%, +2.3%, +2.3%"]
    assert table.loc["b", ["change of perplexity", "95 % interval", "seeds"]].tolist() == [
        "-1.0%",
        "needs two seeds",
        1,
    ]


def test_change_in_words_has_its_interval_or_says_what_one_needs() -> None:
    assert (
        readings.change(SURE) == "+2.0% (95 % interval +1.0% to +3.0%, 3 seeds, 20 conversations)"
    )
    alone = readings.change(pair(-0.01, None, None))
    assert alone.startswith("-1.0% (1 seed, 20 conversations; an interval needs two")


# The reading


def test_reading_names_the_largest_cause(any_case: Case) -> None:
    mse = any_case.gap.agreement.mse
    largest = mse.drop([gap.AS_LEFT, "last_update"]).idxmax()
    text = readings.parallel(any_case.gap, TIMED, SURE)
    share = mse[largest] / mse[gap.AS_LEFT]
    words = gap.CAUSES[str(largest)].removesuffix(" alone")
    assert f"The largest is {words}, {share:.0%} of the squared error" in text
    assert f"{mse['window'] / mse[gap.AS_LEFT]:.1%}" in text


def test_the_cases_differ_in_their_largest_cause(noisy: Case, quiet: Case, rounded: Case) -> None:
    largest = [
        one.gap.agreement.mse.drop([gap.AS_LEFT, "last_update"]).idxmax()
        for one in (noisy, quiet, rounded)
    ]
    assert largest == ["noise", "updates", "window"]


@pytest.mark.parametrize("cause", ["noise", "updates", "window", "ring"])
def test_reading_follows_the_causes(noisy: Case, cause: str) -> None:
    agreement = noisy.gap.agreement.copy()
    agreement.loc[["noise", "updates", "window", "ring"], "mse"] = 0.01
    agreement.loc[[gap.AS_LEFT, cause], "mse"] = [0.1, 0.07]
    # However large, it is a part of another.
    agreement.loc["last_update", "mse"] = 1.0
    text = readings.parallel(dataclasses.replace(noisy.gap, agreement=agreement), TIMED, SURE)
    words = gap.CAUSES[cause].removesuffix(" alone")
    assert f"The largest is {words}, 70% of the squared error" in text
    assert "the causes make 100% of the whole" in text


@pytest.mark.parametrize(
    ("judged", "words"),
    [
        (SURE, "is worse, beyond chance"),
        (pair(-0.02, -0.03, -0.01), "is *better*, beyond chance"),
        (pair(0.02, -0.01, 0.05), "No difference can be told from chance"),
        (pair(0.02, None, None), "One seed: no interval"),
    ],
)
def test_reading_judges_by_the_interval(noisy: Case, judged: Paired, words: str) -> None:
    text = readings.parallel(noisy.gap, TIMED, judged)
    assert words in text
    assert readings.change(judged) in text


@pytest.mark.parametrize(
    ("recurrence", "words"),
    [
        (Recurrence(None, None, []), "too short to say"),
        (Recurrence(1.25, None, [0.5] * 256), "After 256 tokens a context still depends"),
        (Recurrence(0.8, 17, [0.01]), "within 1 % after **17 tokens**"),
    ],
)
def test_reading_says_how_the_recurrence_forgets(
    noisy: Case, recurrence: Recurrence, words: str
) -> None:
    changed = dataclasses.replace(noisy.gap, recurrence=recurrence)
    assert words in readings.parallel(changed, TIMED, SURE)


def test_reading_says_where_the_least_cosine_is(noisy: Case) -> None:
    agreement, along = noisy.gap.agreement.copy(), noisy.gap.along.copy()
    for least, words in ((0, "is that of the first tokens"), (9, "is not at the start")):
        along["cosine_min"] = 0.75
        along.loc[least, "cosine_min"] = 0.5
        agreement.loc[gap.AS_LEFT, "cosine_min"] = 0.5
        changed = dataclasses.replace(noisy.gap, agreement=agreement, along=along)
        assert f"The least cosine, 0.500, {words}" in readings.parallel(changed, TIMED, SURE)


def test_reading_finds_the_least_cosine_at_the_first_token(noisy: Case) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        right = torch.randn(400, 8, generator=generator)
        made = right + 0.1 * torch.randn(400, 8, generator=generator)
        made[0] = -made[0]
        agreement = noisy.gap.agreement.copy()
        agreement.loc[gap.AS_LEFT] = gap.agreement(made, right)
        changed = dataclasses.replace(noisy.gap, agreement=agreement, along=gap._along(made, right))
        text = readings.parallel(changed, TIMED, SURE)
        assert "is that of the first tokens" in text


def test_reading_compares_times_where_the_loop_was_run(noisy: Case) -> None:
    text = readings.parallel(noisy.gap, TIMED, SURE)
    assert "at 1,000 tokens they are 50 times as fast as the loop" in text
    assert "differ from it by at most 3.0e-07" in text
    assert "about as much as 4.0 shifted passes" in text


def test_reading_and_tables_take_measured_times(noisy: Case) -> None:
    frame = gap.times(noisy.block, noisy.inputs, [90, 300], repeats=1, longest_sequential=90)
    assert tables.times(frame)["loop / blocks"].iloc[1] == "–"
    assert "at 90 tokens they are" in readings.parallel(noisy.gap, frame, SURE)


# Figures


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_figure_of_agreement_has_a_bar_for_each_cause(any_case: Case) -> None:
    figure = plots.agreement(any_case.gap, published.table("000_positions"))
    assert isinstance(figure, matplotlib.figure.Figure)
    figure.canvas.draw()
    left, right = figure.axes
    mse = any_case.gap.agreement.mse
    causes = [name for name in gap.CAUSES if name in mse.index]
    assert [bar.get_width() for bar in right.patches] == [
        mse[gap.AS_LEFT],
        *mse[causes],
    ]
    names = [label.get_text() for label in right.get_yticklabels()]
    assert names == [gap.AS_LEFT, *(gap.CAUSES[name] for name in causes)]
    assert np.allclose(left.lines[0].get_ydata(), 1 - any_case.gap.along.cosine)
    assert len(left.lines) == 2
    places = [50, any_case.gap.tokens / 2, any_case.gap.tokens - 50]
    assert list(left.lines[1].get_xdata()) == places
    assert "published" in legend(left)[-1]


def test_figure_of_forgetting_marks_the_memory_where_there_is_one(
    noisy: Case, rounded: Case
) -> None:
    for one in (noisy, rounded):
        figure = plots.forgetting(one.gap)
        figure.canvas.draw()
        left, right = figure.axes
        memory = one.gap.recurrence.memory_length
        said = [text.get_text() for text in left.texts]
        assert said == ([] if memory is None else [f"memory length {memory} tokens"])
        windows = one.gap.windows
        assert np.array_equal(left.lines[0].get_ydata(), windows.relative_error_mean)
        assert np.array_equal(left.lines[1].get_ydata(), windows.relative_error_max)
        residuals, clean, blocks = (line.get_ydata() for line in right.lines)
        assert np.array_equal(residuals, windows.residual)
        assert np.array_equal(clean, one.gap.clean.relative_error_mean)
        assert np.array_equal(blocks, [r["relative"] for r in one.gap.exact.residuals])
    assert noisy.gap.recurrence.memory_length is not None


def test_figure_of_times_has_no_point_for_what_was_not_run() -> None:
    (axes,) = plots.times(TIMED).axes
    sequential, blocks, shifted_pass = axes.lines
    assert list(sequential.get_xdata()) == [1000]
    assert list(blocks.get_ydata()) == [0.04, 1.25]
    assert list(shifted_pass.get_ydata()) == [0.01, 0.5]
    assert math.isfinite(axes.get_ylim()[0])


def test_figure_by_seed_joins_the_runs_of_a_seed() -> None:
    frame = pd.DataFrame(
        {
            "seed": [0, 1, 0, 1],
            "training_contexts": ["exact", "exact", "parallel", "parallel"],
            "val_ppl": [10.0, 20.0, 11.0, 22.0],
        }
    )
    (axes,) = plots.by_seed(frame, "training_contexts", {"parallel": "P", "exact": "E"}).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [
        [11.0, 10.0],
        [22.0, 20.0],
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["P", "E"]
    assert [text.get_text() for text in axes.texts] == ["0", "1"]


# What the objective does


def test_the_diversity_term_is_the_mean_alone(any_case: Case) -> None:
    """Exactly for contexts that leave a LayerNorm without gain, shift and ε, whatever their rank;
    the trained ones as nearly as these are small."""
    one, table = any_case, tables.diversity(any_case.gap)
    off = table["off by"].astype(float)
    bare, rank_1, full = "… without gain, shift, ε", "+u and −u in turn", "random directions"
    assert off[[bare, rank_1, full]].max() < 1e-12
    assert 1e-7 < off["exact, untrained"] < 1e-4  # ε
    assert 1e-6 < off["exact, trained"] < 0.05  # gain
    assert set(table["‖c‖² / D"][[bare, rank_1, full]]) == {"1.000000"}
    width, size = one.experiment.context_dim, min(one.experiment.loss_group, len(one.inputs))
    ranks = table["effective rank"].str.rstrip("%").astype(float)
    assert ranks[rank_1] == pytest.approx(100 / width, abs=0.06)
    assert ranks[full] > 90
    # ±u scores as high as the mean's absence allows; full rank no higher.
    scores = table["diversity term"].astype(float)
    assert scores[rank_1] == pytest.approx(math.sqrt(width / size), abs=1e-5)
    assert scores[full] <= scores[rank_1]


def test_what_the_diversity_term_says_is_what_phase1_is_told(any_case: Case) -> None:
    one, table = any_case, tables.diversity(any_case.gap)
    size = min(one.experiment.loss_group, len(one.inputs))
    for name, weights in (("exact, untrained", one.history[0]), ("exact, trained", None)):
        block = copy.deepcopy(one.gap.block)
        block.load_state_dict(weights or block.state_dict())
        right = plain_loop(block, one.inputs)[:size]
        _, spread = plain.change_and_spread(right[None], right[None])
        row = table.loc[name]
        assert float(row["diversity term"]) == pytest.approx(float(spread), abs=2e-5)
        assert float(row["‖mean‖² / D"]) == pytest.approx(
            float(right.mean(0).square().sum()) / right.shape[1], abs=2e-4
        )
        rank = metrics.effective_rank(metrics.singular_values(right)) / right.shape[1]
        assert row["effective rank"] == f"{rank:.1%}"


# What of its memory a model uses


class Deaf(ContextBlock):
    """Hears nothing of what was before."""

    def __init__(self, experiment: Experiment, input_dim: int) -> None:
        super().__init__(experiment.num_layers, experiment.context_dim, input_dim, True)

    def forward(self, context: Tensor, inputs: Tensor) -> list[Tensor]:
        return super().forward(torch.zeros_like(context), inputs)


@pytest.fixture(scope="module")
def remembering(tiny: Experiment) -> Any:
    forgetful = dict(contexts="random", context_std=0.02, input_std=0.2)
    return run(tiny.replace(**forgetful, validation_samples=4, phase2_epochs=1))


@torch.no_grad()
def cut_nats(result: Any, k: int) -> tuple[Tensor, Tensor]:
    """Nats by held-out conversation, and of whole contexts, by a loop over tokens in float64."""
    model = copy.deepcopy(result.model()).double()
    stream = data.load(result.experiment).validation
    e = TokenInputs(stream.tokens, model.embedding, 1).dense()
    total, width = len(e), model.context_block.context_dim
    exact = [torch.zeros(1, width, dtype=torch.float64)]
    for t in range(total):
        exact.append(model.context_block(exact[-1], e[t : t + 1])[-1])
    ends = [*stream.starts[1:].tolist(), total]
    sums = torch.zeros(2, len(ends), dtype=torch.float64)
    for t in range(total - 1):
        start = max(0, t - k)  # the first token that the context has seen
        context = exact[0]
        if t > k:  # else it has seen the whole stream
            context = exact[1 + (start - 1 - total // 2) % total]
        for seen in range(start, t):
            context = model.context_block(context, e[seen : seen + 1])[-1]
        owner = next(number for number, end in enumerate(ends) if t + 1 < end)
        for row, before in enumerate((context, exact[t])):
            hidden = model.token_block(model.context_block(before, e[t : t + 1]), e[t : t + 1])
            logits = hidden @ model.embedding.T
            target = stream.tokens[t + 1 : t + 2]
            sums[row, owner] += torch.nn.functional.cross_entropy(logits, target)
    return sums[0], sums[1]


@pytest.mark.parametrize("k", [0, 1, 3])
def test_contexts_cut_to_k_tokens_are_those_of_a_plain_loop(remembering: Any, k: int) -> None:
    table = gap.memory(remembering, [k])
    cut, whole = cut_nats(remembering, k)
    assert table[f"{k}"].tolist() == pytest.approx(cut.tolist(), rel=1e-5)
    assert table.nats.tolist() == pytest.approx(whole.tolist(), rel=1e-5)
    assert abs(table[f"{k}"] / table.nats - 1).max() > (1e-4 if k < 3 else 0)
    rows = remembering.val_conversations
    assert table.tokens.tolist() == [row["tokens"] for row in rows]
    assert table.nats.tolist() == pytest.approx([row["nats"] for row in rows], rel=1e-6)


def test_contexts_that_have_seen_all_are_the_whole_ones(remembering: Any) -> None:
    assert remembering.contraction_rate**80 < 1e-5  # where they began is forgotten
    table = gap.memory(remembering, [80, 0, 2])
    assert list(table) == ["tokens", "nats", "0", "2", "80"]  # the shortest first
    assert table["80"].tolist() == pytest.approx(table.nats.tolist(), rel=1e-6)
    assert table["0"].sum() > table["2"].sum() > 0
    assert table["2"].tolist() == gap.memory(remembering, [2])["2"].tolist()


def test_a_block_that_ignores_contexts_uses_no_memory(tiny: Experiment) -> None:
    deaf = tiny.replace(contexts="random", block=f"{__name__}:Deaf", phase2_epochs=1)
    table = gap.memory(run(deaf), [0, 1, 5])
    for k in ("0", "1", "5"):
        assert table[k].tolist() == pytest.approx(table.nats.tolist(), rel=1e-6)


@pytest.mark.parametrize("fields", [{"contexts": "zero"}, {"model": "lstm"}])
def test_a_model_without_contexts_has_no_memory_to_cut(
    tiny: Experiment, fields: dict[str, Any]
) -> None:
    with pytest.raises(ParameterError, match=r"contexts: got .*'trained', 'random', 'end_"):
        gap.memory(run(tiny.replace(**fields, phase2_epochs=1)), [1])
