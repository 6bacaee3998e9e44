"""CVFP beside its controls and peers: pairing, tables, figures and reading."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from synthetic import LENGTHS, judged, made, student

from cvfp import ParameterError, Result, Results, tuning
from cvfp.analysis import comparison, intervals, plots, readings, tables
from cvfp.analysis.comparison import COUNTED
from cvfp.tuning import CVFP, GROUPS, JOINT, LSTM, RANDOM, RANDOM_SCALED, SCALED, SHUFFLED, ZERO

KINDS = GROUPS["controls"]

SIZES, SEEDS = (50, 100), (0, 1, 2)
NONE, FAR_OFF = ZERO.format(1), tuning.TRAINED_TABLE
BETTER = {LSTM: -0.07, JOINT: -0.06, SCALED: -0.02, RANDOM_SCALED: 0.01, FAR_OFF: 2.5}
LINES = {
    "kneser_ney": {"ppl": 170.0, "bpb": 2.02},
    "kneser_ney_both": {"ppl": 140.0, "bpb": 1.95},
    "trigram": {"ppl": 150.0, "bpb": 1.98},
    "trigram_both": {"ppl": 101.0, "bpb": 1.81},
    "table": None,
}


def loss(kind: str, size: int) -> float:
    return 5.0 - 0.1 * (size == 100) + BETTER.get(kind, 0.04 if kind != CVFP else 0.0)


def run_of(kind: str, size: int, seed: int) -> Result:
    return judged(
        loss(kind, size) + 0.001 * seed,
        {"samples": size, "seed": seed, **KINDS[kind].fields},
        val_acc=0.15 + seed / 1000,
        val_bpb=1.9,
        best_epoch=3,
        parameters={"context_block": 10, "token_block": 20, "embedding": 400, "head": 0},
        seconds={"phase1": 1.0, "contexts": 0.5, "phase2": 2.0, "data": 9.0},
        baselines=LINES,
        val_positions=[
            {"low": 0.0, "tokens": 50.0, "nats": 50 * loss(kind, size), "correct": 1.0},
            {"low": 4.0, "tokens": 550.0, "nats": 550 * loss(kind, size), "correct": 1.0},
        ],
        val_frequencies=[
            {"low": 0.0, "tokens": 600.0, "nats": 600 * loss(kind, size), "correct": 1.0}
        ],
    )


def groups(seeds: tuple[int, ...] = SEEDS) -> dict[str, Results]:
    return {
        kind: Results(run_of(kind, size, seed) for size in SIZES for seed in seeds)
        for kind in KINDS
    }


FAMILIES = {
    "contexts of Phase 1": [CVFP, SCALED, tuning.SETTLE, FAR_OFF],
    "contexts of an untrained block": [RANDOM, RANDOM_SCALED],
    "tokens alone": [*map(ZERO.format, (1, 2, 3, 4)), tuning.WINDOW, SHUFFLED],
    "end to end": [JOINT, LSTM, tuning.TRANSFORMER],
    "counted": list(COUNTED.values()),
}


def test_every_kind_has_a_family() -> None:
    for family, kinds in FAMILIES.items():
        assert [comparison.family(kind) for kind in kinds] == [family] * len(kinds)
    assert {*KINDS, *COUNTED.values()} == {kind for kinds in FAMILIES.values() for kind in kinds}
    found = {kind: comparison.family(kind) for kind in GROUPS["discovery"]}
    first, untrained, alone, joint, _ = FAMILIES
    assert found == {
        tuning.REMEMBER: first,
        tuning.NEXT: first,
        tuning.DELAY: alone,
        tuning.DELAY_RANDOM: alone,
        tuning.LEAKY: untrained,
        tuning.LEAKY_REMEMBER: first,
        tuning.LEAKY_JOINT: joint,
        tuning.FINE_TUNED: joint,
    }


def test_best_is_the_lowest_of_a_family_without_those_left_out() -> None:
    ppl = {NONE: 150.0, ZERO.format(2): 140.0, SHUFFLED: 100.0, LSTM: 90.0}
    assert comparison.best(ppl, "tokens alone") == SHUFFLED
    assert comparison.best(ppl, "tokens alone", but=(SHUFFLED,)) == ZERO.format(2)


def test_kinds_are_paired_with_cvfp() -> None:
    found = comparison.against(groups(), 100)
    assert set(found) == set(KINDS) - {CVFP}
    assert found[LSTM].change == pytest.approx(math.expm1(-0.07))
    assert found[NONE].seeds == 3
    assert comparison.sizes(groups()) == [50, 100]


def test_sizes_are_cvfps_and_others_may_lack_some() -> None:
    some = {CVFP: groups()[CVFP], LSTM: [run_of(LSTM, 100, 0), run_of(LSTM, 70, 0)]}
    assert comparison.sizes(some) == [50, 100]
    assert set(comparison.of_size(some, 50)) == {CVFP}
    assert comparison.against(some, 50) == {}
    assert set(comparison.against(some, 100)) == {LSTM}
    assert comparison.sizes({LSTM: some[LSTM]}) == [70, 100]  # the first, where CVFP is left out
    with pytest.raises(ParameterError, match=r"groups: got .* accepted: runs of 'CVFP, as publ"):
        comparison.sizes({})


def test_pairs_are_of_the_seeds_that_both_have() -> None:
    ours = [run_of(CVFP, 100, seed) for seed in (0, 1, 2)]
    theirs = [run_of(LSTM, 100, seed) for seed in (2, 3, 1)]
    found = comparison.shared(theirs, ours)
    assert found == intervals.paired([theirs[2], theirs[0]], ours[1:])
    assert found.seeds == 2


def test_rows_for_others_to_read() -> None:
    found = {(row["samples"], row["kind"]): row for row in comparison.rows(groups())}
    assert len(found) == len(SIZES) * (len(KINDS) + len(LINES) - 1)  # no table that counts
    row = found[100, LSTM]
    assert row["change"] == pytest.approx(math.expm1(-0.07))
    assert row["low"] < row["change"] < row["high"] < 0
    assert (row["seeds"], row["seconds"], row["tokens"]) == (3, 3.5, 100_000)
    ppl = [math.exp(loss(LSTM, 100) + seed / 1000) for seed in SEEDS]
    assert row["ppl"] == pytest.approx(sum(ppl) / 3)
    reference = found[50, CVFP]
    assert reference["change"] is reference["low"] is reference["high"] is None
    assert found[50, COUNTED["trigram"]]["ppl"] == 150.0


def test_what_is_trained_is_counted() -> None:
    fields: dict[str, Any] = dict(
        parameters={"context_block": 10, "token_block": 20, "embedding": 400, "head": 5}
    )
    for given, count in (
        ({}, 35),
        ({"contexts": "random"}, 25),
        ({"freeze_embedding": False}, 435),
        ({"contexts": "random", "freeze_embedding": False}, 425),
    ):
        assert comparison.trained_parameters(made(given, **fields)) == count
    assert comparison.training_seconds(run_of(CVFP, 50, 0)) == 3.5


def test_losses_by_bin_are_against_the_reference() -> None:
    frame = comparison.by_bin(groups(), 50, "val_positions", NONE)
    rows = frame[frame.kind == CVFP]
    assert rows.low.tolist() == [0, 4]
    assert rows.nats.tolist() == pytest.approx([-0.04, -0.04])
    assert NONE not in set(frame.kind)


def test_table_of_all_kinds() -> None:
    table = tables.comparison(groups())
    assert table.index.get_level_values("kind").tolist() == [*KINDS, *KINDS]
    row = table.loc[(100, LSTM)]
    assert row["change against CVFP"] == "-6.8%"
    assert row["trained parameters"] == "30"
    assert row["training, s"] == "3.5"
    middle, low, high = student([15.0, 15.1, 15.2])
    assert row["accuracy %"] == f"{middle:.2f} ± {(high - low) / 2:.2f}"
    assert table.loc[(50, CVFP)]["change against CVFP"] == "–"
    alone = tables.comparison(groups((0,)))
    assert alone.loc[(100, LSTM)]["95 % interval"] == "needs two seeds"
    assert "±" not in alone.loc[(100, LSTM)]["PPL"]
    counted = tables.counted(groups()[CVFP])
    assert counted.loc[50].tolist() == [
        "170.0 (2.020)",
        "140.0 (1.950)",
        "150.0 (1.980)",
        "101.0 (1.810)",
        "–",
    ]


def test_figure_orders_the_kinds_and_points_to_those_far_off() -> None:
    figure = plots.comparison(groups())
    order = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert order[0] == COUNTED["trigram_both"]
    assert order[1:3] == [LSTM, JOINT]
    assert order[-1] == FAR_OFF
    assert COUNTED["table"] not in order
    texts = [text.get_text() for text in figure.axes[1].texts]
    assert f"{math.expm1(2.5):+.0%} →" in texts
    # Every other kind has its dot where the change is.
    dots = {
        (round(float(line.get_xdata()[0]), 6), int(line.get_ydata()[0]))
        for line in figure.axes[1].lines
        if len(line.get_xdata()) == 1
    }
    assert (round(math.expm1(-0.07), 6), order.index(LSTM)) in dots


def test_figure_of_where_context_helps() -> None:
    figure = plots.where_context_helps(groups(), 100)
    left = figure.axes[0]
    assert [label.get_text() for label in left.get_xticklabels()] == ["0–3", "4+"]
    lines = {str(line.get_label()): line for line in left.lines}
    assert list(lines[SCALED].get_ydata()) == pytest.approx([-0.06, -0.06])
    assert NONE not in lines


def line(text: str, words: str) -> str:
    """The reading's last line that begins with these words."""
    return [one for one in text.splitlines() if one.startswith(f"- {words}")][-1]


def test_reading_follows_the_intervals() -> None:
    text = readings.controls(groups())
    assert text.startswith("**50 conversations**")
    assert "**100 conversations** (100,000 tokens)" in text
    for words, nats in (
        ("Phase 1 over an untrained block, both at their own scales", -0.03),
        ("Phase 1 over an untrained block, both as published", -0.04),
        ("the published objective over its first term alone", -0.06),
        ("own scales over the published ones, trained", -0.02),
        ("own scales over the published ones, untrained", -0.03),
        ("training end to end over Phase 1", -0.04),
        (f"the best contexts of Phase 1 ({SCALED}) over {NONE}", -0.06),
    ):
        said = line(text, words)
        assert f": {math.expm1(nats):+.1%} (" in said
        assert said.endswith("Better, beyond chance.")
    assert line(text, "going on to train the table").endswith("Worse, beyond chance.")
    counted = line(text, "of what only counts")
    assert f"the {COUNTED['trigram_both']} has the lowest perplexity, 101.0" in counted
    assert text.endswith("90 of 90 runs were past their best epoch when they stopped.")
    assert "One seed: no interval" in readings.controls(groups((0,)))


def test_reading_names_what_is_under_the_best_that_counts() -> None:
    runs = {kind: made_at(loss(kind, 100), kind) for kind in KINDS}
    runs[LSTM] = made_at(math.log(100.9), LSTM)
    assert "lower than that: LSTM." in readings.controls(runs)
    runs[LSTM] = made_at(math.log(101.1), LSTM)
    assert "lower than that: none." in readings.controls(runs)


def made_at(nats: float, kind: str, **measured: Any) -> list[Result]:
    given = {"samples": 100, **KINDS[kind].fields}
    rest = dict(baselines=LINES, best_epoch=10, **measured)
    return [judged(nats, {**given, "seed": seed}, **rest) for seed in SEEDS]


def test_what_is_compared_is_chosen_on_development() -> None:
    """The window has the best perplexity in validation, two tokens in development."""
    two = ZERO.format(2)
    runs = {kind: made_at(5.0, kind, dev_ppl=150.0) for kind in KINDS}
    runs[tuning.WINDOW] = made_at(4.8, tuning.WINDOW, dev_ppl=150.0)
    runs[two] = made_at(4.9, two, dev_ppl=140.0)
    runs[tuning.SETTLE] = made_at(5.1, tuning.SETTLE, dev_ppl=120.0)
    text = readings.controls(runs)
    said = line(text, f"the best contexts of Phase 1 ({tuning.SETTLE}) over {two}")
    assert f"{math.expm1(0.2):+.1%}" in said
    assert text.endswith(
        "0 of 45 runs were past their best epoch when they stopped, the others are bounds."
    )


def test_figure_of_cost_has_every_kind_and_the_least_that_counts() -> None:
    figure = plots.cost(groups())
    assert [one.get_title() for one in figure.axes] == ["50 conversations", "100 conversations"]
    for one, size in zip(figure.axes, SIZES, strict=True):
        *points, counted = one.lines
        assert [point.get_label() for point in points] == list(KINDS)
        seconds, ppl = points[list(KINDS).index(LSTM)].get_data()
        assert list(seconds) == [3.5]  # of the phases, not of reading the data
        assert float(ppl[0]) == pytest.approx(math.exp(loss(LSTM, size) + 0.001))
        assert set(counted.get_ydata()) == {101.0}


# Memory that is used


def cut(nats: dict[str, list[float]], tokens: list[int]) -> pd.DataFrame:
    """One seed's `gap.memory`: per token and conversation, nats of whole contexts and of each k."""
    sums = {name: np.array(values) * tokens for name, values in nats.items()}
    return pd.DataFrame({"tokens": tokens, **sums})


def test_memory_is_the_mean_change_over_seeds_and_conversations() -> None:
    tokens = [100, 300]
    first = cut({"nats": [4.0, 5.0], "0": [4.1, 5.3], "2": [4.0, 5.0]}, tokens)
    second = cut({"nats": [4.2, 5.2], "0": [4.4, 5.4], "2": [4.2, 5.2]}, tokens)
    table = comparison.memory([first, second])
    assert table.k.tolist() == [0, 2]
    mean = (100 * 0.1 + 300 * 0.3 + 100 * 0.2 + 300 * 0.2) / 800
    assert table.change.tolist() == pytest.approx([math.expm1(mean), 0.0], abs=1e-12)
    nats = np.array([[10.0, 90.0], [20.0, 60.0]])
    found = intervals.crossed(nats, np.array(tokens))
    assert found.low is not None
    assert table.low[0] == pytest.approx(math.expm1(found.low))
    alone = comparison.memory([first])
    assert alone.low.isna().all()
    assert comparison.used_memory(alone) is None  # no interval, no verdict


@pytest.mark.parametrize(
    ("change", "low", "used"),
    [
        ([0.2, 0.01, 0.002, 0.001], [0.1, 0.005, 0.001, 0.0005], 2),
        ([0.2, 0.01, 0.002, 0.001], [0.1, 0.005, 0.0, 0.0005], 1),  # an interval from 0 on
        ([0.2, 0.0019, 0.0, 0.003], [0.1, 0.001, -0.1, 0.001], 4),  # the largest, not the first
        ([0.0019, 0.0, 0.0, 0.0], [0.001, 0.0, 0.0, 0.0], None),
        ([0.01, -0.01, -0.01, -0.01], [0.005, -0.02, -0.02, -0.02], 0),
    ],
)
def test_used_memory_is_the_largest_cut_that_costs(
    change: list[float], low: list[float], used: int | None
) -> None:
    table = pd.DataFrame({"k": [0, 1, 2, 4], "change": change, "low": low, "high": change})
    assert comparison.used_memory(table) == used


def test_figure_of_memory_has_a_line_for_each_kind() -> None:
    table = pd.DataFrame(
        {"k": [0, 1], "change": [0.1, 0.0], "low": [0.05, -0.01], "high": [0.2, 0]}
    )
    unsure = table.assign(low=None, high=None)
    (axes,) = plots.memory({SCALED: table, JOINT: unsure}).axes
    one, other, used = axes.lines
    assert [one.get_label(), other.get_label()] == [SCALED, JOINT]
    assert one.get_xydata().tolist() == [[0.0, 0.1], [1.0, 0.0]]
    assert set(used.get_ydata()) == {comparison.USED}
    assert len(axes.collections) == 1  # a band only where there is an interval


def test_needed_runs_scale_with_the_square() -> None:
    pair = intervals.Paired(0.0, -0.03, 0.03, 3, 20, (0.0, 0.0, 0.0), 0.5)
    assert pair.needed(0.01) == (27, 180)
    assert pair.needed(0.03) == (3, 20)
    alone = intervals.Paired(0.0, None, None, 1, 20, (0.0,), None)
    assert alone.needed(0.01) is None
    assert LENGTHS.sum() == 600
