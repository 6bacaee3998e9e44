"""CVFP beside its controls and peers: pairing, tables, figures and reading."""

from __future__ import annotations

import math
from typing import Any

import pytest
from synthetic import LENGTHS, judged, made, student

from cvfp import Experiment, ParameterError, Result, Results
from cvfp.analysis import comparison, intervals, plots, readings, tables
from cvfp.analysis.comparison import COUNTED, CVFP, KINDS, LSTM, RANDOM, RANDOM_TABLE, ZERO

SIZES, SEEDS = (50, 100), (0, 1, 2)
BETTER = {LSTM: -0.07, comparison.JOINT: -0.06, RANDOM_TABLE: 2.5}
LINES = {
    "kneser_ney": {"ppl": 170.0, "bpb": 2.02},
    "trigram": {"ppl": 150.0, "bpb": 1.98},
    "trigram_both": {"ppl": 101.0, "bpb": 1.81},
    "table": None,
}


def loss(kind: str, size: int) -> float:
    return 5.0 - 0.1 * (size == 100) + BETTER.get(kind, 0.04 if kind != CVFP else 0.0)


def run_of(kind: str, size: int, seed: int) -> Result:
    return judged(
        loss(kind, size) + 0.001 * seed,
        {"samples": size, "seed": seed, **KINDS[kind]},
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


def test_every_kind_differs_from_cvfp_in_what_it_says() -> None:
    base = Experiment(num_layers=2, window_tokens=7)
    rates = {kind: (number + 1) / 100 for number, kind in enumerate(comparison.TUNED)}
    for kind, one in comparison.experiments(base, rates).items():
        changed = {
            name: value
            for name, value in one.to_dict().items()
            if value != getattr(base, name) and name != "phase2_learning_rate"
        }
        assert changed == dict(KINDS[kind])
        assert one.phase2_learning_rate == rates.get(kind, rates[CVFP])


def test_best_rate_is_that_of_the_lowest_perplexity() -> None:
    runs = [
        made({"phase2_learning_rate": rate}, val_ppl=ppl)
        for rate, ppl in ((0.001, 150.0), (0.003, 140.0), (0.01, None))
    ]
    assert comparison.best_rate(runs) == 0.003
    with pytest.raises(ParameterError, match="runs with a perplexity"):
        comparison.best_rate(runs[2:])
    shown = tables.grid({CVFP: runs})
    assert shown.loc[CVFP].tolist() == ["150.0", "140.0 ←", "–", ""]
    assert tables.grid({CVFP: runs[:2]}).remark[CVFP] == "best at the end of the grid"


def test_kinds_are_paired_with_cvfp() -> None:
    found = comparison.against(groups(), 100)
    assert set(found) == set(KINDS) - {CVFP}
    assert found[LSTM].change == pytest.approx(math.expm1(-0.07))
    assert found[ZERO].seeds == 3
    assert comparison.sizes(groups()) == [50, 100]


def test_kinds_without_a_common_size_are_named() -> None:
    mixed = {CVFP: groups()[CVFP], LSTM: [run_of(LSTM, 70, 0)]}
    with pytest.raises(ParameterError, match=r"groups: got .* accepted: runs of all kinds at one"):
        comparison.sizes(mixed)


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
    frame = comparison.by_bin(groups(), 50, "val_positions", ZERO)
    rows = frame[frame.kind == CVFP]
    assert rows.low.tolist() == [0, 4]
    assert rows.nats.tolist() == pytest.approx([-0.04, -0.04])
    assert ZERO not in set(frame.kind)


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
        "150.0 (1.980)",
        "101.0 (1.810)",
        "–",
    ]


def test_figure_orders_the_kinds_and_points_to_those_far_off() -> None:
    figure = plots.comparison(groups())
    order = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert order[0] == COUNTED["trigram_both"]
    assert order[1:3] == [LSTM, comparison.JOINT]
    assert order[-1] == RANDOM_TABLE
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
    assert list(lines[CVFP].get_ydata()) == pytest.approx([-0.04, -0.04])


def test_reading_follows_the_intervals() -> None:
    text = readings.controls(groups())
    assert text.startswith("At 100 conversations")
    # CVFP is 4 % of nats under the random ContextBlock and under zero contexts.
    change = f"{math.expm1(-0.04):+.1%}"
    assert f"changes perplexity by {change}" in text
    assert "It helps, beyond chance" in text
    assert "Context helps, beyond chance" in text
    ahead = text.split("Better than CVFP, beyond chance**: ")[1].split(";")[0]
    assert set(ahead.split(", ")) == {LSTM, comparison.JOINT}
    assert "Kneser–Ney trigram, fitting + training (101.0)" in text
    assert "Kneser–Ney bigram (170.0)" not in text
    worse = {**groups(), RANDOM: [run_of(LSTM, s, k) for s in SIZES for k in SEEDS]}
    assert "**It hurts**, beyond chance" in readings.controls(worse)
    assert "One seed: no interval" in readings.controls(groups((0,)))


def test_needed_runs_scale_with_the_square() -> None:
    pair = intervals.Paired(0.0, -0.03, 0.03, 3, 20, (0.0, 0.0, 0.0), 0.5)
    assert pair.needed(0.01) == (27, 180)
    assert pair.needed(0.03) == (3, 20)
    alone = intervals.Paired(0.0, None, None, 1, 20, (0.0,), None)
    assert alone.needed(0.01) is None
    assert LENGTHS.sum() == 600
