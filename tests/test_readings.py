"""Tables and readings of finished runs: their figures, and words that follow the numbers."""

from __future__ import annotations

import math
import tomllib
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from synthetic import SIZES, curve, ladder, losses, made, matrix, slope, student

from cvfp import Results, gap
from cvfp.analysis import (
    claims,
    intervals,
    ledger,
    prediction,
    published,
    readings,
    scaling,
    tables,
)
from cvfp.analysis.intervals import Crossed

TOKENS = 1000.0 * np.array(SIZES)
LAW, OTHER = (scaling.fit(TOKENS, 1e4 * TOKENS**alpha) for alpha in (-0.3, -0.4))
# Best at epochs 2, 3 and 2; patience 1 stops the second at 1.
CURVES = ([3.0, 2.0, 2.1, 2.3, 2.4], [2.5, 2.6, 2.3, 2.4, 2.4], [3.0, 2.2, 2.3, 2.4, 2.6])


def curves(seeds: int = 3) -> Results:
    return Results(curve(line, seed=seed) for seed, line in enumerate(CURVES[:seeds]))


# Tables


@pytest.mark.parametrize("name", ["tables", "readings"])
def test_what_the_data_beside_the_code_holds_is_shown(name: str) -> None:
    folder = files("cvfp.analysis")
    held = tomllib.loads((folder / f"{name}.toml").read_text(encoding="utf-8"))
    code = "".join(path.read_text(encoding="utf-8") for path in Path(str(folder)).glob("*.py"))
    # Every table by its name, every sentence by its own ("text" is the one that none is named for).
    names = {one for group in held.values() for one in group} if name == "readings" else set()
    assert all(f'"{one}"' in code for one in {*held, *names})


def test_table_of_parameters_agrees_with_note_003() -> None:
    table = tables.published_parameter_counts()
    assert table.index.tolist() == ["6 x 768", "3 x 1536"]
    assert (table["ContextBlock"] == table["ContextBlock, published"]).all()
    assert (table["TokenBlock"] == table["trained by Phase 2, published"]).all()
    assert table["TokenBlock, published"].tolist() == [10.63, 7.08]


def test_table_of_extrapolation_has_its_intervals() -> None:
    ppl = 1e4 * TOKENS**-0.3 * np.array([1.01, 0.99, 1, 1.01, 0.99])
    laws = {"here": scaling.fit(TOKENS, ppl), "two": scaling.fit(TOKENS[:2], ppl[:2])}
    table: Any = tables.extrapolation(laws, {"here": TOKENS.max(), "two": TOKENS[1]})
    assert table.index.tolist() == ["1 M tokens", "5 M tokens", "10 M tokens"]
    low, high = cast(tuple[float, float], laws["here"].predict_interval(5e6))
    row = table.loc["5 M tokens"]
    assert row["here: PPL by its law"] == f"{laws['here'].predict(5e6):.1f}"
    assert row["here: 95 % interval"] == f"{low:.1f} … {high:.1f}"
    assert row["here: times its largest run"] == "6.2"
    assert row["two: 95 % interval"] == "needs three points"


def test_table_of_overfitting_stands_beside_the_note() -> None:
    still = [curve([3.0, 2.5, 2.0, 2.1])]
    note = published.table("003_overfitting")
    table: Any = tables.overfitting({"a": curves(), "b": still}, note)
    rises = np.expm1([0.3, 0.1, 0.2])
    last = np.expm1([0.4, 0.1, 0.4])
    assert table.loc["a"].tolist() == [
        "2.3",
        f"{np.mean(np.exp([2.0, 2.3, 2.2])):.1f}",
        f"{rises.mean():+.1%}",
        f"{last.mean():+.1%}",
    ]
    assert table.loc["b"].tolist() == ["3.0", f"{math.exp(2):.1f}", "–", f"{math.expm1(0.1):+.1%}"]
    row = table.loc["published, A at 500, lr 0.002"]
    assert row.tolist() == ["2", "554.6", "+124.9%", "+124.9%"]
    assert len(table) == 2 + 4


def test_table_of_patience_is_against_the_first() -> None:
    table: Any = tables.patience(curves(), [1, 3])
    assert table.index.tolist() == [1, 3, "none, best kept", "none, last kept"]
    assert table["epochs run"].tolist() == ["2.7", "5.0", "5.0", "5.0"]
    assert table["epoch chosen"].tolist() == ["1.7", "2.3", "2.3", "5.0"]
    assert table["PPL"][1] == f"{np.mean(np.exp([2.0, 2.5, 2.2])):.1f}"
    assert table["accuracy %"].tolist() == ["1.67", "2.33", "2.33", "5.00"]
    change, bounds = table.columns[-2:]
    assert change == "change of PPL against 1"
    assert table.loc[1, [change, bounds]].tolist() == ["–", "–"]
    for row, against in ((3, [0, -0.2, 0]), ("none, last kept", [0.4, -0.1, 0.4])):
        middle, low, high = student([math.expm1(x) for x in against])
        assert table[change][row] == f"{middle:+.1%}"
        assert table[bounds][row] == f"{low:+.1%} … {high:+.1%}"
    assert set(tables.patience(curves(1), [1, 3])[bounds]) == {"–", "needs two seeds"}


def test_table_of_forms() -> None:
    generator = np.random.default_rng(0)
    ppl = (60 + 3e4 * TOKENS**-0.5) * np.exp(generator.normal(0, 0.005, len(TOKENS)))
    table: Any = tables.forms(TOKENS, ppl)
    words = [form.split(", ") for form in scaling.FORMS.values()]
    assert [[name, formula] for name, formula in table.formula.items()] == words
    # As wide as a page shows.
    assert max(len(cell) for pair in words for cell in pair) < 50
    law = scaling.fit(TOKENS, ppl)
    low, high = cast(tuple[float, float], law.interval())
    missed = scaling.fit(TOKENS[:-1], ppl[:-1]).predict(TOKENS[-1]) / ppl[-1] - 1
    assert table.loc["power law"].tolist() == [
        "PPL = A · tokens^α",
        f"{law.alpha:.3f}",
        f"{low:.3f} … {high:.3f}",
        "–",
        f"{law.r2:.4f}",
        f"{missed:+.1%}",
        "",
    ]
    floor = scaling.saturating(TOKENS, ppl, "ppl")
    ends = cast(tuple[float, float], floor.interval())
    row = table.loc["power law above a floor"]
    # Exponents are negative on the page, the lower end first.
    assert row["exponent"] == f"-{floor.exponent:.3f}"
    assert row["95 % interval"] == f"{-ends[1]:.3f} … {-ends[0]:.3f}"
    assert row["floor, PPL"] == f"{floor.limit:.1f}"


@pytest.mark.parametrize(("sizes", "fitted"), [(2, 1), (3, 3)])
def test_table_of_forms_says_what_is_missing(sizes: int, fitted: int) -> None:
    table: Any = tables.forms(TOKENS[-sizes:], 60 + 3e4 * TOKENS[-sizes:] ** -0.5)
    assert (table.exponent != "–").tolist() == [True, fitted > 1, fitted > 1]
    left = table["error at the largest size, left out"].tolist()
    if sizes == 2:
        assert table["95 % interval"].tolist() == ["no point to spare"] + ["needs 3 sizes"] * 2
        assert left == ["needs 2 sizes, 1 remain", "–", "–"]
    else:
        assert left[0].endswith("%")
        assert left[1:] == ["needs 3 sizes, 2 remain"] * 2


def test_table_of_windows_stands_beside_the_note() -> None:
    lines = losses(2)
    deep, shallow = (
        pd.DataFrame(
            dict(num_layers=layers, train_tokens=TOKENS, val_ppl=np.exp(line), val_er=ranks)
        )
        for layers, line, ranks in zip(
            (3, 1), lines, ([0.7, 0.72, 0.74, 0.76, 0.9], 0.5), strict=True
        )
    )
    note = published.table("004_window_sizes")
    table: Any = tables.windows(pd.concat([deep, shallow]), note)
    kinds = ["measured, 1 L", "measured, 3 L", "published, note 004"]
    assert table.index.tolist() == [kind for kind in kinds for _ in range(2)]
    three = table.loc["measured, 3 L"]
    line = lines[0]
    measured = [slope(line[:4], SIZES[:4]), slope(line[1:], SIZES[1:])]
    assert three["α"].tolist() == [f"{alpha:.3f}" for alpha in measured]
    assert three["tokens"].tolist() == ["50,000 … 400,000", "100,000 … 800,000"]
    low, high = cast(tuple[float, float], scaling.fit(TOKENS[:4], np.exp(line[:4])).interval())
    assert three["95 % interval"].iloc[0] == f"{low:.3f} … {high:.3f}"
    assert three["val ER %"].tolist() == ["73.0", "78.0"]
    assert three["PPL"].iloc[0] == f"{np.exp(line[0]):.0f} … {np.exp(line[3]):.0f}"
    # As note 004 prints its two windows.
    theirs = table.loc["published, note 004"]
    assert theirs["α"].tolist() == ["-0.504", "-0.432"]
    assert theirs["val ER %"].tolist() == ["81.4", "81.3"]
    assert theirs["PPL"].tolist() == ["592 … 211", "400 … 168"]
    few = tables.windows(deep[:3], note)
    assert set(few.index) == {"published, note 004"}


def test_table_of_configurations() -> None:
    results = matrix()
    for one in results:
        one.memory_length = None if one.experiment.context_dim == 64 else 12
    table: Any = tables.configurations(results.frame())
    assert len(table) == 12
    runs = [one for one in results if one.experiment.context_dim == 256][:6]
    row = table.loc["1 x 256, n 1, w 0.8"]
    line = [math.log(cast(float, one.val_ppl)) for one in runs]
    assert row["α"] == f"{slope(line, [one.train_tokens for one in runs]):.3f}"
    # ER and perplexity are those of the largest size; training ER of all.
    assert row["val ER %"] == f"{100 * np.mean([one.val_er for one in runs[3:]]):.1f}"
    assert row["train ER %"] == f"{100 * np.mean([one.train_er for one in runs]):.1f}"
    assert row["PPL"] == f"{np.mean([one.val_ppl for one in runs[3:]]):.1f}"
    assert row[["iterations", "converged %", "memory, tokens"]].tolist() == ["25", "99.5", "12"]
    assert table["memory, tokens"]["1 x 64, n 1, w 0.8"] == "–"
    one_size = [one for one in results if one.experiment.samples == 50]
    assert set(tables.configurations(Results(one_size).frame())["α"]) == {"–"}


def test_table_of_predictors_is_in_percent() -> None:
    frame = matrix().frame()
    exact: Any = prediction.predictors(frame)
    table: Any = tables.predictors(frame)
    assert table.index.tolist() == list(prediction.FORMS)
    row, shown = exact.loc[prediction.TOKENS_AND_ER], table.loc[prediction.TOKENS_AND_ER].tolist()
    assert shown[:3] == [3, f"{row.alpha:.3f}", f"{row.beta:+.4f}"]
    assert shown[3:] == [f"{x:.1%}" for x in (row.error, row.left_out_error, row.left_out_worst)]
    assert table.loc[prediction.RULE, ["α", "β, per point of ER"]].tolist() == ["–", "–"]


def scored(*rows: tuple[str, float, float, float]) -> pd.DataFrame:
    """Rules with their hit rate and the interval of their excess over a half."""
    frame = pd.DataFrame(rows, columns=["rule", "hit_rate", "low", "high"])
    called = frame.hit_rate.notna()
    excess = frame.hit_rate - 0.5
    return frame.assign(called=8 * called, base_rate=0.5, excess=excess, p=0.25, remark="so")


NAN = math.nan
SCORES = scored(
    ("good", 0.75, 0.1, 0.4),
    ("bad", 0.125, -0.5, -0.25),
    ("middling", 0.5, -0.1, 0.1),
    ("alike", 0.5, NAN, NAN),
    ("silent", NAN, NAN, NAN),
)


def test_table_of_scores() -> None:
    table: Any = tables.scores(SCORES)
    assert table.loc["good"].tolist() == [8, "75%", "50%", "+25%", "+10% … +40%", "0.250", "so"]
    assert table.loc["bad", "95 % interval"] == "-50% … -25%"
    assert table.loc["alike", "95 % interval"] == "–"
    assert table.loc["silent", ["right", "excess"]].tolist() == ["–", "–"]


def test_table_of_contrast_pairs_runs_of_a_size() -> None:
    every, decrease = losses(3), losses(3, start=1) + 0.1
    ours, theirs = ladder(every), ladder(decrease)
    table: Any = tables.contrast(ours, theirs, "ours", "theirs")
    assert table.index.tolist() == list(SIZES)
    for place, size in enumerate(SIZES):
        row = table.loc[size]
        assert row["tokens"] == f"{1000 * size:,}"
        assert row["PPL, ours"] == f"{np.exp(every[:, place]).mean():.1f}"
        assert row["PPL, theirs"] == f"{np.exp(decrease[:, place]).mean():.1f}"
        change = math.expm1((every - decrease)[:, place].mean())
        assert row["change of PPL"] == f"{change:+.1%}"
        first, second = ([r for r in x if r.experiment.samples == size] for x in (ours, theirs))
        pair = intervals.paired(first, second)
        assert row["95 % interval"] == f"{pair.low:+.1%} … {pair.high:+.1%}"
    alone = tables.contrast(ladder(every[:1]), ladder(decrease[:1]), "ours", "theirs")
    assert set(alone["95 % interval"]) == {"needs two seeds"}


def test_table_of_shapes() -> None:
    def run(seed: int, **measured: Any) -> Any:
        parts = {"context_block": 12_345, "token_block": 678}
        given = dict(samples=50, seed=seed)
        return made(given, parameters=parts, val_acc=0.2, best_epoch=2 + seed, **measured)

    first = run(0, val_ppl=90.0, seconds={"phase1": 2.0, "phase2": 3.0}, memory_length=10)
    second = run(1, val_ppl=100.0, seconds={"phase1": 4.0, "phase2": 5.0})
    third = run(2, val_ppl=None, seconds={"phase1": 4.0})
    table: Any = tables.shapes({"deep": [first, second], "wide": [third]})
    assert table.loc[("deep", 50)].tolist() == [
        *("95.0", "12,345", "678", "3.0", "4.0", "20.0", "77.0", "25", "99.5", "10", "2.5")
    ]
    missing = ["PPL", "memory, tokens", "Phase 2, s"]
    assert table.loc[("wide", 50), missing].tolist() == ["–"] * 3


def test_table_of_alpha() -> None:
    found = Crossed(-0.31, -0.4, -0.2, 2, 20, (-0.3, -0.32), 0.5)
    row = cast(Any, tables.alpha(found)).loc["measured"]
    assert row.tolist() == ["-0.3100", "-0.4000 … -0.2000", 2, 20, "-0.3000, -0.3200"]
    alone = Crossed(-0.31, None, None, 1, 20, (-0.31,), None)
    assert tables.alpha(alone)["95 % interval"]["measured"] == "needs two seeds"
    # Scored on tails.
    tails = Crossed(-0.31, None, None, 2, 0, (-0.31, -0.31), None)
    row = cast(Any, tables.alpha(tails)).loc["measured"]
    assert row[["95 % interval", "conversations"]].tolist() == ["–", "–"]


def test_causes_are_added_without_the_last_update() -> None:
    mse = {gap.AS_LEFT: 9.0, "noise": 1.0, "updates": 2.0, "last_update": 64.0, "window": 4.0}
    frame = pd.DataFrame({"mse": mse})
    added = cast(property, gap.Gap.added).fget
    assert added is not None
    assert added(SimpleNamespace(agreement=frame)) == 7.0
    frame.loc["ring"], frame.loc["bfloat16"] = 8.0, 16.0
    assert added(SimpleNamespace(agreement=frame)) == 31.0


# Readings


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([-0.19, -0.2, -0.21], "Tokens in every layer are better, beyond chance."),
        ([0.19, 0.2, 0.21], "Equal-decrease is better, beyond chance."),
        ([0.2, -0.2, 0.01], "No difference can be told from chance."),
        ([-0.2], "One seed: no interval."),
    ],
)
def test_reading_of_designs_follows_the_interval(differences: list[float], words: str) -> None:
    # The smaller size differs the other way: it is the largest that counts.
    ours = ladder([[5 - d, 4 + d] for d in differences], (50, 100))
    theirs = ladder([[5.0, 4.0] for _ in differences], (50, 100))
    for one in theirs:
        one.val_er = 0.086
    text = readings.shapes(ours, theirs, LAW, OTHER, {})
    assert words in text
    change = math.expm1(np.mean(differences))
    assert f"At 100 conversations tokens in every layer change perplexity by {change:+.1%}" in text
    assert "effective rank 77.0% against 8.6%." in text


def test_reading_of_shapes_names_the_steeper() -> None:
    runs = ladder([[5.0, 4.0]], (50, 100))
    text = readings.shapes(runs, runs, LAW, OTHER, {})
    assert "α = -0.300 (deep) and -0.400 (wide): the wide shape gains more" in text
    assert scaling.crossover(LAW, OTHER).words() in text
    assert "the deep shape gains more" in readings.shapes(runs, runs, OTHER, LAW, {})


def test_reading_of_epochs_says_what_was_not_reached() -> None:
    runs = ladder([[5.0, 4.0]], (50, 100))
    still = [*curves(2), curve([3.0, 2.5, 2.0, 2.1], seed=2)]
    text = readings.shapes(runs, runs, LAW, OTHER, {"deep": curves(), "wide": still})
    rise = np.expm1([0.3, 0.1, 0.2]).mean()
    assert f"{rise:+.1%} (deep), not reached (wide: its best epoch is among" in text


@pytest.mark.parametrize(
    ("curve_of", "closest"), [("power", "power law"), ("ppl", "power law above a floor")]
)
def test_reading_of_forms_names_the_closest(curve_of: str, closest: str) -> None:
    floor = 60 if curve_of == "ppl" else 0
    ppl = floor + 3e4 * TOKENS**-0.5
    text = readings.forms(TOKENS, ppl)
    assert "1.0 doublings beyond" in text
    assert f"closest is {closest}. One size left out" in text
    missed = scaling.fit(TOKENS[:-1], ppl[:-1]).predict(TOKENS[-1]) / ppl[-1] - 1
    assert f"{missed:+.1%} (power)" in text


def test_reading_of_forms_says_which_sizes_do_not_allow() -> None:
    ppl = 60 + 3e4 * TOKENS**-0.5
    assert "Too few sizes to leave the largest out." in readings.forms(TOKENS[:2], ppl[:2])
    assert "Too few sizes for: ppl, loss." in readings.forms(TOKENS[:3], ppl[:3])


def test_reading_of_patience() -> None:
    text = readings.patience(curves(), 1, 3)
    middle, low, high = student([0.0, math.expm1(-0.2), 0.0])
    assert f"Patience 3 instead of 1 changes the perplexity by {middle:+.1%}" in text
    assert f"(95 % interval {low:+.1%} to {high:+.1%}, 3 seeds)" in text
    assert "a better epoch in 1 of 3 runs" in text
    assert f"the last one is {math.expm1(0.4):+.1%} over the best" in text
    assert "(one seed, no interval)" in readings.patience(curves(1), 1, 3)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.03, "what ER adds helps, beyond chance."),
        (-0.03, -0.01, "what ER adds hurts, beyond chance."),
        (-0.01, 0.03, "what ER adds cannot be told from nothing."),
        (None, None, "what ER adds cannot be told from nothing."),
    ],
)
def test_reading_of_rank_follows_the_interval(
    monkeypatch: pytest.MonkeyPatch, low: float | None, high: float | None, words: str
) -> None:
    gain = prediction.Gain(0.2, 0.15, 0.05, low, high, 12)
    monkeypatch.setattr(prediction, "what_er_adds", lambda frame: gain)
    text = readings.predictions(matrix(), SCORES)
    assert words in text
    assert "missed by 20.0% from the number of tokens alone, by 15.0% with" in text
    assert ("95 % interval" in text.split("**α")[0]) == (low is not None)


def test_reading_of_predictions_has_its_figures() -> None:
    results = matrix()
    text = readings.predictions(results, SCORES)
    table = prediction.by_configuration(results.frame())
    r = np.corrcoef(table.alpha, table.val_er)[0, 1]
    assert f"r = {r:+.2f} (95 % interval" in text
    rule = [abs((500 - 400 * one.val_er) / cast(float, one.val_ppl) - 1) for one in results]
    assert f"misses by {np.mean(rule):.0%}" in text
    # One size: no α, and nothing said of it.
    alone = Results(one for one in results if one.experiment.samples == 50)
    assert "**α" not in readings.predictions(alone, SCORES)


def test_table_of_judged_configurations_has_every_verdict() -> None:
    runs = [
        made(dict(context_dim=64, seed=seed), val_er=er, train_er=0.83, phase1_iterations=24)
        for seed, er in enumerate((0.82, 0.82, 0.78))
    ]
    runs.append(made(dict(context_dim=65), val_er=0.6, train_er=0.61, phase1_iterations=40))
    table: Any = tables.judged(runs)
    assert table.index.tolist() == ["1 x 64, n 1, w 0.8", "1 x 65, n 1, w 0.8"]
    first, second = table.to_dict("records")
    assert first["validation ER"] == "🟢 good; 🟡 medium"
    assert first["iterations"] == "🟢 good"
    assert first["early abort"] == second["early abort"] == ""
    assert second["overall"] == "🔴 review"


def gone(seed: int, ppl: float, **measured: Any) -> Any:
    """A run of 39 iterations whose rank at iteration 20 is 65 %: the note would have stopped it."""
    rows = [{"iteration": float(i), "loss": -i, "converged": i / 40} for i in range(2, 40)]
    rows[18] |= {"val_er": measured.pop("rank", 0.65)}
    seconds = {"table": 1.0, "phase1": 38.0, "contexts": 2.0, "phase2": 9.0}
    given = dict(context_dim=64 + seed, seed=seed)
    rest = dict(phase1_iterations=39, phase1_history=rows, seconds=seconds, val_ppl=ppl)
    return made(given, **(rest | measured))


def test_reading_of_early_abort_counts_what_it_would_have_saved() -> None:
    runs = Results([gone(0, 90.0), gone(1, 104.0), gone(2, 100.0, rank=0.8)])
    runs.append(gone(3, 100.0, phase1_iterations=19, phase1_history=[]))
    text = readings.early_abort(runs)
    assert "3 of 4 runs reach iteration 20" in text
    assert "would have given up 2." in text
    # After iteration 20 come 19 of 38 steps, contexts and Phase 2; the table is spent before.
    assert f"saves {2 * (19 + 2 + 9)} s of {4 * 50} s" in text
    assert "perplexities of 90.0 to 104.0" in text
    assert "-3.0% from the median" in text
    assert "; 1 of them are better" in text
    none = readings.early_abort(Results(runs[2:]))
    assert none.endswith("would have given up 0.")


@pytest.mark.parametrize(("tokens", "nearest"), [(86_925, 100), (183_620, 200), (1e9, 800)])
def test_difference_at_the_nearest_size_is_paired(tokens: float, nearest: int) -> None:
    ours, theirs = losses(3), losses(3, start=1)
    text = readings.nearest(ladder(ours), ladder(theirs), tokens, "Ours", "Theirs")
    place = SIZES.index(nearest)
    change = math.expm1((ours - theirs)[:, place].mean())
    assert text.startswith(f"at {1000 * nearest:,} tokens {change:+.1%} (95 % interval ")
    better = readings.nearest(ladder(ours), ladder(ours + 0.5), tokens, "Ours.", "Theirs.")
    assert better.endswith("Ours., beyond chance.")
    worse = readings.nearest(ladder(ours + 0.5), ladder(ours), tokens, "Ours.", "Theirs.")
    assert worse.endswith("Theirs., beyond chance.")


def test_reading_of_rules_sorts_them_by_their_interval() -> None:
    text = readings.predictions(matrix(), SCORES)
    assert "4 of 5 rules call any run good or poor; better than chance: good" in text
    assert "**worse than chance**: bad; not told from chance: 2." in text
    quiet = readings.predictions(matrix(), SCORES[SCORES.rule == "silent"])
    assert quiet.endswith("**Rules (C18).** 0 of 1 rules call any run good or poor.")


def test_rows_of_the_ledger_are_those_asked_for() -> None:
    by = None, "so", "04_layers_vs_dim", {}, "here"
    one = claims.Measurement("C9", "rise", "mini", 3, 0.8, 0.7, 0.9, *by)
    other = claims.Measurement("C4", "alpha", "other", 3, 0.8, 0.7, 0.9, *by)
    lines = ledger.rows(["C15", "C9"], [one, other]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| C15", "| C9"]
    assert "| not run |" in lines[2]
    assert "80 % [70 %, 90 %], n 3: direction agrees; 57 % … 181 % agrees" in lines[3]
    assert {line.count(" | ") for line in lines} == {5}
    with pytest.raises(ValueError, match="C20"):
        ledger.rows(["C20"], [])
