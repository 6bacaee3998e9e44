"""The ledger: the notes' figures from their tables, the rule, the store, the page."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cvfp import cache
from cvfp.analysis import claims, ledger, published, recomputed, scaling
from cvfp.analysis.claims import CLAIMS, Measurement

ALL = [f"C{number}" for number in range(1, 20)]


def measurement(name: str = "C1.ppl", setting: str = "mini", **changes: Any) -> Measurement:
    id, part = name.split(".")
    given: dict[str, Any] = dict(
        n=3,
        estimate=-0.2,
        low=-0.3,
        high=-0.1,
        p=0.01,
        words="at 200 conversations",
        by="06_controls",
        parameters={"samples": 200, "seeds": [0, 1, 2], "device": "cpu"},
        ran_on="chitchat, bpe",
    )
    return Measurement(id, part, setting, **(given | changes))


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CVFP_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "claims"


# The figures, to the digits given: what each claim's recompute has to return.
FIGURES: dict[str, dict[str, tuple[float, int]]] = {
    "C1": {
        "ppl_change": (-0.39, 2),
        "ppl_change_000": (-0.38, 2),
        "accuracy_change": (0.23, 2),
        "er_ratio": (8.83, 2),
        "ppl_change_least": (-0.363, 3),
        "ppl_change_most": (-0.476, 3),
    },
    "C2": {"cosine_from_mse": (0.9969, 4), "root_mse": (0.0785, 4), "largest_mismatch": (5e-5, 6)},
    "C3": {},
    "C4": {
        "alpha": (-0.4591, 4),
        "r2": (0.9927, 4),
        "per_doubling": (-0.273, 3),
        "A": (220_800, -2),
    },
    "C5": {
        "r_equal_decrease": (-0.17, 2),
        "r_every_layer": (-0.98, 2),
        "p_equal_decrease": (0.83, 2),
        "p_every_layer": (0.016, 3),
        "partial_r_equal_decrease": (0.72, 2),
        "partial_r_every_layer": (0.48, 2),
    },
    "C6": {
        "alpha": (-0.4026, 4),
        "r2": (0.9920, 4),
        "A": (66_800, -2),
        "A_published_ratio": (3, 0),
        "per_doubling": (-0.244, 3),
    },
    "C7": {
        "ppl_1m": (256.5, 1),
        "ppl_5m": (134.2, 1),
        "ppl_10m": (101.5, 1),
        "error_001": (-0.115, 3),
        "error_002": (0.090, 3),
        "error_004": (-0.122, 3),
    },
    "C8": {
        "alpha_deep": (-0.2877, 4),
        "alpha_wide": (-0.3846, 4),
        "A_deep": (14_623, 0),
        "A_wide": (46_550, 0),
        "crossover": (154_500, -2),
        "per_doubling_deep": (-0.181, 3),
        "per_doubling_wide": (-0.234, 3),
    },
    "C9": {
        "rise_A_500": (1.25, 2),
        "rise_A_1000": (0.57, 2),
        "rise_B_500": (1.81, 2),
        "rise_B_1000": (1.29, 2),
    },
    "C10": {
        "best_50": (787.3, 1),
        "next_50": (790.9, 1),
        "change_50": (0.005, 3),
        "best_100": (648.8, 1),
        "next_100": (684.5, 1),
        "change_100": (0.055, 3),
        "best_200": (482.4, 1),
        "next_200": (517.1, 1),
        "change_200": (0.072, 3),
        "best_500": (324.5, 1),
        "next_500": (351.9, 1),
        "change_500": (0.084, 3),
        "accuracy_gain_least": (0.1, 1),
        "accuracy_gain_most": (0.4, 1),
    },
    "C11": {
        "er_least": (1.7, 1),
        "er_most": (4.0, 1),
        "alpha_least": (0.028, 3),
        "alpha_most": (0.070, 3),
        "pairs": (3, 0),
    },
    "C12": {"r": (0.01, 2), "p": (0.98, 2), "configurations": (8, 0)},
    "C13": {
        "tokens": (587_970, 0),
        "ppl_two_same_tokens": (196.5, 1),
        "change_same_tokens": (0.001, 3),
        "change_published": (-0.144, 3),
        "er_change": (2.1, 1),
    },
    "C14": {
        "v2_768": (79.2, 1),
        "v2_1200": (75.6, 1),
        "v2_1537": (72.6, 1),
        "v1_768": (77.5, 1),
        "v1_1200": (72.4, 1),
        "v1_1537": (68.6, 1),
        "v4_1085": (70.8, 1),
    },
    "C15": {
        "alpha_first": (-0.5043, 4),
        "alpha_last": (-0.4322, 4),
        "change": (0.072, 3),
        "error_first": (0.019, 3),
        "error_last": (0.025, 3),
    },
    "C16": {
        "configurations": (8, 0),
        "more_samples": (2, 0),
        "r": (-0.38, 2),
        "p": (0.35, 2),
        "error_mean": (0.075, 3),
        "error_most": (0.20, 2),
        "line_error": (0.069, 3),
        "mean_error": (0.059, 3),
        "gain": (-0.011, 3),
    },
    "C17": {"gap_least": (0.3, 1), "gap_most": (1.9, 1), "gap_most_other_notes": (1.3, 1)},
    "C18": {"ppl_moderate": (198.5, 1), "ppl_review": (200.0, 1)},
    "C19": {
        "val_low": (7.8, 1),
        "val_high": (8.6, 1),
        "train_high": (9.6, 1),
        "every_layer_first": (71.7, 1),
        "every_layer_last": (75.9, 1),
        "v3_low": (81.3, 1),
        "v3_high": (81.5, 1),
    },
}
STANDS = {
    **dict.fromkeys(["C1", "C2", "C4", "C9", "C14", "C15", "C17"], True),
    **dict.fromkeys(["C6", "C7", "C8", "C10", "C11", "C12", "C13", "C16", "C19"], False),
    **dict.fromkeys(["C3", "C5", "C18"], None),
}


@pytest.mark.parametrize("id", ALL)
def test_figures_from_the_published_tables(id: str) -> None:
    figures = recomputed.figures(id)
    rounded = {name: round(value, FIGURES[id][name][1]) for name, value in figures.items()}
    assert rounded == {name: value for name, (value, _) in FIGURES[id].items()}
    assert all(type(value) is float for value in figures.values())
    assert CLAIMS[id].stands is STANDS[id]
    # Figures are in the words as numbers, not as what was to be filled in.
    assert not re.search(r"[{}]|nan|float64", ledger.from_tables(CLAIMS[id]))


@pytest.mark.parametrize("id", [id for id in ALL if FIGURES[id]])
def test_figures_come_from_the_tables(id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other tables, each figure is another: none is typed in."""
    before, words = recomputed.figures(id), ledger.from_tables(CLAIMS[id])
    load = published.table

    def bent(name: str) -> pd.DataFrame:
        # Every table, column and row by another factor; thresholds and whole numbers stay.
        table = load(name)
        if not name.endswith("_thresholds"):
            for column in table.select_dtypes("float"):
                factor = zlib.crc32(f"{name} {column}".encode()) % 97 / 10_000
                table[column] *= 1 + factor * np.arange(1, len(table) + 1) ** 2
        return table

    monkeypatch.setattr(published, "table", bent)
    after = recomputed.figures(id)
    same = {name for name in before if before[name] == after[name]}
    # Of whole numbers, which stay.
    assert same <= {"tokens", "pairs", "configurations", "more_samples", "ppl_change_000"}
    assert words != ledger.from_tables(CLAIMS[id])


def test_c13_is_between_the_neighbouring_sizes() -> None:
    """Log-log between the two neighbours gives the figure; a law through all sizes does not."""
    sizes = published.table("004_window_sizes")
    left, right = sizes.iloc[3], sizes.iloc[4]
    share = math.log(587_970 / left.tokens) / math.log(right.tokens / left.tokens)
    between = left.val_ppl * (right.val_ppl / left.val_ppl) ** share
    figure = recomputed.figures("C13")["ppl_two_same_tokens"]
    assert figure == pytest.approx(between)
    law = scaling.fit(sizes.tokens, sizes.val_ppl).predict(587_970)
    assert round(law, 1) == 199.5


def test_tail_and_held_out_counts_differ_by_a_tenth() -> None:
    """What C13 reads the size of v2's 500 samples from: note 002 cut a tenth off."""
    tail, held_out = published.table("002_scaling"), published.table("004_window_sizes")
    both = tail.merge(held_out, on="samples")
    assert len(both) == 3
    assert (both.tokens_x / 0.9).astype(int).tolist() == both.tokens_y.tolist()


def test_cosine_of_normalised_contexts() -> None:
    """What C2 compares: for vectors of squared norm D, cosine = 1 − MSE/2 exactly."""
    a, b = np.random.default_rng(0).normal(size=(2, 50, 64))
    for x in (a, b):
        x -= x.mean(axis=1, keepdims=True)
        x /= x.std(axis=1, keepdims=True)
    cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert np.allclose(cosine, 1 - ((a - b) ** 2).mean(axis=1) / 2)


def test_c16_leaves_each_configuration_out() -> None:
    table = published.table("004_summary")
    er, ppl = table.best_val_er.tolist(), table.best_val_ppl.tolist()
    line, mean = [], []
    for number in range(8):
        x, y = [one[:number] + one[number + 1 :] for one in (er, ppl)]
        slope, intercept = np.polyfit(x, y, 1)
        line.append(abs(slope * er[number] + intercept - ppl[number]) / ppl[number])
        mean.append(abs(sum(y) / 7 - ppl[number]) / ppl[number])
    figures = recomputed.figures("C16")
    assert figures["line_error"] == pytest.approx(sum(line) / 8)
    assert figures["mean_error"] == pytest.approx(sum(mean) / 8)
    assert figures["gain"] == pytest.approx(sum(mean) / 8 - sum(line) / 8)


# One value that the claim says, one that it does not, and an end of the region.
SIDES: dict[str, tuple[float, float, float]] = {
    "C1.ppl": (324.5 / 536 - 1, 0.1, 0),
    "C1.accuracy": (0.23, -0.1, 0),
    "C1.er": (7.82, -0.1, 0),
    "C2.cosine_mean": (0.9969, 0.98, 0.99),
    "C2.cosine_min": (0.989, 0.9, 0.965),
    "C2.mse": (0.006156, 0.1, 0.02),
    "C2.relative_error_mean": (0.075, 0.3, 0.14),
    "C2.first": (0.9966, 0.9, 0.99),
    "C2.middle": (0.9969, 0.9, 0.99),
    "C2.last": (0.9972, 0.9, 0.99),
    "C3.shifted": (51, 5, 10),
    "C3.blocks": (51, 5, 10),
    "C4.alpha": (-0.459, 0.1, 0),
    "C4.per_doubling": (-0.27, 0.1, 0),
    "C4.form": (0.5, 37, 1),
    "C5.r": (0.1, -0.98, -0.3),
    "C6.alpha": (-0.403, 0.1, 0),
    "C6.per_doubling": (-0.24, 0.1, 0),
    "C6.form": (0.5, 37, 1),
    "C7.error": (-0.04, 0.09, 0.05),
    "C7.no_change": (-0.1, 0.1, 0),
    "C8.difference": (-0.097, 0.1, 0),
    "C8.alpha_deep": (-0.287, 0.1, 0),
    "C8.alpha_wide": (-0.385, 0.1, 0),
    "C8.per_doubling_deep": (-0.22, 0.1, 0),
    "C8.per_doubling_wide": (-0.3, 0.1, 0),
    "C8.crossover": (141_000, -1, 0),
    "C8.form_deep": (0.5, 37, 1),
    "C8.form_wide": (0.5, 37, 1),
    "C9.rise": (0.57, 0.1, 0.2),
    "C10.ppl": (-0.05, 0.08, -0.01),
    "C10.accuracy": (2.2, -1, 0),
    "C11.er": (1.7, -1, 0),
    "C11.alpha": (0.04, -0.1, 0),
    "C12.r": (0.5, -0.5, 0),
    "C13.ppl": (-0.14, 0.01, 0),
    "C13.er": (2.1, -1, 0),
    "C13.alpha": (0.01, 0.07, 0.04),
    "C14.er": (-3.6, 1, 0),
    "C15.change": (0.072, -0.1, 0),
    "C16.gain": (0.02, -0.011, 0),
    "C16.rule": (0.12, 0.2, 0.15),
    "C17.gap": (1.9, 5, 2),
    **{
        f"C18.{rule}": (0.2, -0.1, 0)
        for rule in (
            *("validation_er", "iterations", "er_gap"),
            *("abort_er", "abort_stalls", "abort_loss", "any_abort"),
        )
    },
    "C19.change": (0.8, 4.2, 2),
}


def test_parts_are_those_of_the_sides() -> None:
    assert [f"{id}.{part}" for id in CLAIMS for part in CLAIMS[id].parts] == list(SIDES)


@pytest.mark.parametrize("name", SIDES)
def test_each_region_is_on_the_claims_side(name: str) -> None:
    said, other, end = SIDES[name]

    def judged(value: float) -> str:
        return measurement(name, low=value - 1e-4, high=value + 1e-4).direction

    assert judged(said) == "agrees"
    assert judged(other) == "contradicts"
    assert judged(end) == "inconclusive"
    part = measurement(name).of
    assert end in part.region
    # What the note prints is what the claim says.
    assert all(part.region[0] <= one <= part.region[1] for one in part.magnitude or ())


def test_printed_numbers_are_those_of_the_notes() -> None:
    """To the digits printed, from the notes' own tables where they give them."""
    figures = {id: recomputed.figures(id) for id in ALL}
    expected = {
        "C1.ppl": (figures["C1"]["ppl_change"], figures["C1"]["ppl_change_000"]),
        "C1.accuracy": (figures["C1"]["accuracy_change"],),
        "C4.alpha": (figures["C4"]["alpha"],),
        "C4.per_doubling": (figures["C4"]["per_doubling"],),
        "C6.alpha": (figures["C6"]["alpha"],),
        "C6.per_doubling": (figures["C6"]["per_doubling"],),
        "C11.er": (figures["C11"]["er_least"], figures["C11"]["er_most"]),
        "C13.ppl": (figures["C13"]["change_published"],),
        "C13.er": (figures["C13"]["er_change"],),
        "C15.change": (figures["C15"]["change"],),
    }
    for name, values in expected.items():
        assert measurement(name).of.magnitude == pytest.approx(values, abs=0.006), name
    names = [f"{id}.{part}" for id in CLAIMS for part in CLAIMS[id].parts]
    without = {one.split(".")[0] for one in names if measurement(one).of.magnitude is None}
    assert without == {f"C{number}" for number in (3, 4, 5, 6, 7, 8, 10, 12, 16, 18, 19)}


def test_what_cannot_fail_says_so() -> None:
    names = {f"{id}.{x.id}" for id in CLAIMS for x in CLAIMS[id].parts.values() if x.cannot_fail}
    laws = ["C4.{}", "C6.{}", "C8.{}_deep", "C8.{}_wide"]
    every = {one.format(part) for one in laws for part in ("alpha", "per_doubling")}
    assert names == every | {"C8.crossover"}
    assert "(nothing could fail it, p 0.01)" in measurement("C4.alpha").judged
    assert "nothing" not in measurement("C4.form").judged


@pytest.mark.parametrize(
    ("name", "low", "high", "expected"),
    [
        ("C5.r", -0.2, 0.2, "agrees"),
        ("C5.r", 0.2, 0.2, "agrees"),
        ("C5.r", 0.2, 0.4, "inconclusive"),
        ("C5.r", -0.4, 0.2, "inconclusive"),
        ("C5.r", -0.4, 0.4, "inconclusive"),
        ("C5.r", 0.4, 0.5, "contradicts"),
        ("C5.r", -0.5, -0.4, "contradicts"),
        # The region's ends do not belong to it.
        ("C5.r", 0.2, 0.3, "inconclusive"),
        ("C5.r", -0.3, 0.2, "inconclusive"),
        ("C5.r", 0.3, 0.4, "contradicts"),
        ("C5.r", -0.4, -0.3, "contradicts"),
        ("C5.r", 0.3, 0.3, "contradicts"),
        ("C3.blocks", 11.0, 1e9, "agrees"),
        ("C4.alpha", -1e9, -1.0, "agrees"),
        ("C4.alpha", -1.0, 1.0, "inconclusive"),
        ("C4.alpha", 0.0, 1.0, "contradicts"),
    ],
)
def test_rule(name: str, low: float, high: float, expected: str) -> None:
    assert measurement(name, low=low, high=high).direction == expected


@pytest.mark.parametrize(
    ("name", "low", "high", "expected"),
    [
        ("C4.alpha", -0.5, -0.4, "agrees"),
        ("C4.alpha", -0.459, -0.4, "agrees"),
        ("C4.alpha", -0.45, -0.4, "contradicted"),
        ("C4.alpha", -0.6, -0.46, "contradicted"),
        # Several numbers: any from the least to the largest.
        ("C9.rise", 0.3, 0.6, "agrees"),
        ("C9.rise", 0.9, 1.0, "agrees"),
        ("C9.rise", 1.8, 5.0, "agrees"),
        ("C9.rise", 0.3, 0.5, "contradicted"),
        ("C9.rise", 1.9, 5.0, "contradicted"),
        ("C5.r", -0.9, 0.9, None),
    ],
)
def test_magnitude(name: str, low: float, high: float, expected: str | None) -> None:
    assert measurement(name, low=low, high=high).magnitude == expected


def test_rules_need_three_seeds_and_an_interval() -> None:
    for changes in (
        {"n": 2},
        {"n": 0},
        {"low": None, "high": None},
        {"n": 2, "low": 2, "high": 3},
        {"estimate": None, "low": None, "high": None},
    ):
        assert measurement(**changes).direction == "inconclusive"
        assert measurement(**changes).magnitude == "inconclusive"
        assert measurement("C5.r", **changes).magnitude is None
    assert measurement(n=3).direction == "agrees"


def test_both_verdicts_in_words() -> None:
    one = measurement(n=5, estimate=-0.0273, low=-0.0377, high=-0.0168, p=0.0012, holm=0.04)
    assert one.judged == (
        "-2.73 % [-3.77 %, -1.68 %], n 5: direction agrees (p 0.0012, survives Holm); "
        "-39 % … -38 % contradicted: -2.73 %"
    )
    assert "(p 0.0012, does not survive Holm)" in replace(one, holm=0.05).judged
    unclear = replace(one, low=-0.4, high=0.1, p=0.3, holm=0.9)
    assert unclear.judged.endswith("inconclusive (p 0.3); -39 % … -38 % agrees")
    alone = replace(one, n=1, low=None, high=None, p=None, holm=None)
    assert alone.judged == (
        "-2.73 % [no end, no end], n 1: direction inconclusive; -39 % … -38 % inconclusive"
    )
    none = measurement("C8.crossover", estimate=None, low=None, high=None, p=None)
    assert none.judged.startswith("no value [no end, no end], n 3: direction inconclusive (nothing")
    assert measurement("C8.crossover", estimate=154_471.2).judged.startswith("154,500 tokens [")


def test_holm() -> None:
    """Four p's worked by hand; another setting does not count, nor what has no p."""
    names = ("C2.mse", "C1.ppl", "C3.blocks", "C5.r", "C6.form")
    given = dict(zip(names, (0.01, 0.03, 0.04, 0.005, None), strict=True))
    several = [measurement(name, p=p) for name, p in given.items()]
    found = claims.corrected([*several, measurement("C4.form", "other", p=0.2)])
    assert {f"{one.id}.{one.part}": one.holm for one in found} == {
        "C1.ppl": pytest.approx(0.06),
        "C2.mse": pytest.approx(0.03),
        "C3.blocks": pytest.approx(0.06),
        "C4.form": pytest.approx(0.2),
        "C5.r": pytest.approx(0.02),
        "C6.form": None,
    }
    assert [one.key for one in found] == sorted(one.key for one in found)
    # In another order, and corrected once more: the same.
    assert claims.corrected(found[::-1]) == found


def test_later_measurements_take_the_place_of_earlier_ones() -> None:
    earlier, later = measurement(), measurement(estimate=-0.25)
    other = measurement(setting="other")
    found = claims.corrected([earlier, other, later])
    assert [(one.setting, one.estimate) for one in found] == [("mini", -0.25), ("other", -0.2)]


def test_a_damaged_measurement_is_none(store: Path) -> None:
    path = ledger.record(measurement("C10.ppl"))
    path.write_text(path.read_text(encoding="utf-8").replace("0.2", "0.3"), encoding="utf-8")
    with pytest.warns(UserWarning, match="C10.ppl.mini.json: damaged"):
        assert ledger.measurements() == []
    with pytest.raises(ValueError, match="not JSON compliant"):
        ledger.record(measurement("C10.ppl", estimate=math.nan))
    assert ledger.measurements() == []


def test_every_claim_once() -> None:
    assert list(CLAIMS) == ALL
    assert [claim.id for claim in CLAIMS.values()] == ALL
    for name in ("title", "sentence", "published", "recomputed", "takes"):
        assert len({getattr(claim, name) for claim in CLAIMS.values()}) == 19
    for claim in CLAIMS.values():
        for id, part in claim.parts.items():
            assert part.id == id
            assert part.region[0] < part.region[1]
            assert part.crosses
            assert part.unit in ("", "%", "points", "tokens")
            assert part.scale in ("plain", "relative", "correlation")
        assert re.fullmatch(r"[A-Zα][^\n]*[a-z0-9%]\.", claim.sentence)
        assert re.fullmatch(r"0[1-7]_[a-z_0-9]+", claim.notebook)
        assert re.match(r"00[0-4]\b", claim.notes)


def test_regions_in_words() -> None:
    names = ("C1.ppl", "C3.blocks", "C9.rise", "C19.change", "C8.crossover")
    assert [measurement(name).of.where for name in names] == [
        "below 0 %",
        "above 10",
        "above 20 %",
        "above -2 points and below 2 points",
        "above 0 tokens",
    ]


def test_record_and_read_again(store: Path) -> None:
    assert ledger.measurements() == []
    parameters = {"seeds": (0, 1), "x": None, "on": True}
    one = measurement("C10.ppl", estimate=np.float64(0.8), parameters=parameters)
    path = ledger.record(one)
    assert path == store / "C10.ppl.mini.json"
    two = measurement("C2.mse", low=None, high=None, words="α × 10")
    ledger.record(two)
    names = ["C10.ppl.mini.json", "C2.mse.mini.json"]
    assert [file.name for file in sorted(store.iterdir())] == names
    assert ledger.measurements() == [two, one]
    assert ledger.measurements()[1].parameters == {"seeds": [0, 1], "x": None, "on": True}
    # One measurement a part and setting.
    again, elsewhere = measurement("C10.ppl"), measurement("C10.ppl", "published_size")
    ledger.record(again)
    ledger.record(elsewhere)
    assert ledger.measurements() == [two, again, elsewhere]
    # Half-written files of another process are not read.
    (store / ".part.json").write_text("{", encoding="utf-8")
    assert len(ledger.measurements()) == 3


def test_record_goes_through_whole(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    whole = cache.whole

    def watched(path: Path) -> Any:
        paths.append(path)
        return whole(path)

    monkeypatch.setattr(cache, "whole", watched)
    ledger.record(measurement())
    assert store / "C1.ppl.mini.json" in paths


@pytest.mark.parametrize("key", ["C0.ppl.mini", "c1.ppl.mini", "C1.r.mini", "C1.ppl.large"])
def test_what_is_no_part_or_setting_is_named(key: str) -> None:
    id, part, setting = key.split(".")
    said = re.escape(f"id, part, setting: got {(id, part, setting)!r}; accepted: a part in")
    with pytest.raises(ValueError, match=said):
        measurement(f"{id}.{part}", setting)


def test_unknown_claims_are_named() -> None:
    with pytest.raises(ValueError, match=re.escape("ids: got ['C20']; accepted: some of C1, C2")):
        ledger.frame(["C1", "C20"], [])


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", "null", '[{"id": "C1"}]', '[{"surprise": 1}]', "NaN", '{"C1": {"value": 1}}'],
)
def test_ledgers_that_are_none_are_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"ledger\.json: got .*; accepted: a file that"):
        ledger.load(path)


def test_frame() -> None:
    one = measurement("C3.blocks", estimate=20, low=15, high=25, p=None)
    table = ledger.frame(CLAIMS, [one, measurement("C3.blocks", "other")])
    columns = ["claim", "sentence", "part", "quantity", "published"]
    assert list(table.columns) == [*columns, *claims.SETTINGS]
    assert len(table) == len(SIDES)
    assert list(dict.fromkeys(table.claim)) == ALL
    first = table.drop_duplicates("claim")
    assert first.sentence.tolist() == [claim.sentence for claim in CLAIMS.values()]
    assert set(table.sentence.drop(first.index)) == {""}
    row = table[table.part == "blocks: above 10"].iloc[0]
    assert row.quantity == CLAIMS["C3"].parts["blocks"].quantity
    assert (row.published, row.published_size, row.ultrachat) == ("–", "not run", "not run")
    assert row.mini == "20 [15, 25], n 3: direction agrees"
    assert (table.mini == "not run").sum() == len(SIDES) - 1
    assert table.published[table.part == "rise: above 20 %"].tolist() == ["57 % … 181 %"]
    assert ledger.frame(["C7", "C3"], []).claim.tolist() == ["C7", "C7", "C3", "C3"]
    assert ledger.frame([], []).empty


def test_rows_are_of_the_settings_that_are_there() -> None:
    head = ledger.rows(["C1"], [measurement(setting="other"), measurement("C4.form")]).split("\n")[
        0
    ]
    assert head == "| claim | sentence | part | quantity | published | other |"
    assert ledger.rows(["C1"], []).split("\n")[0].endswith("| mini |")


def test_markdown() -> None:
    measured = [
        measurement(p=0.001),
        measurement("C1.er", "other", estimate=1, low=0.5, high=1.5),
        measurement("C19.change", words="a|b\nc", n=1, by="03_scaling", parameters={}),
        measurement("C1.ppl", "published_size", estimate=0.2, low=0.1, high=0.3),
    ]
    page = ledger.markdown(measured)
    rows = re.findall(r"^\| (C\d+) \|", page, flags=re.MULTILINE)
    assert rows == [name.split(".")[0] for name in SIDES]
    table = [line for line in page.splitlines() if line.startswith("| C")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {7}
    assert re.findall(r"^## (C\d+) · ", page, flags=re.MULTILINE) == ALL
    # Other settings are shown, and not counted.
    assert "| setting | agrees | contradicts | inconclusive | measured |" in page
    assert "\n| mini | 1 | 0 | 1 | 2 |\n| published_size | 0 | 1 | 0 | 1 |\n" in page
    assert "\n| ultrachat | 0 | 0 | 0 | 0 |\n" in page
    assert "  - other: 100 % [50 %, 150 %], n 3: direction agrees" in page
    assert (
        "- mini, on chitchat, bpe: `papermill notebooks/06_controls.ipynb out.ipynb "
        "-p samples 200 -p seeds 0,1,2 -p device cpu`" in page
    )
    assert "- mini, on chitchat, bpe: `papermill notebooks/03_scaling.ipynb out.ipynb`" in page
    # Two parts are measured in the setting: p doubles.
    assert "agrees (p 0.001, survives Holm)" in page
    sections = page.split("\n## ")[1:]
    for claim, section in zip(CLAIMS.values(), sections, strict=True):
        for words in (claim.title, claim.sentence, claim.notes, claim.published, claim.takes):
            assert words in section
        assert ledger.from_tables(claim) in section
        for part in claim.parts.values():
            assert f"- **{part.id}**: {part.quantity}. The claim: {part.where}; " in section
            assert f"Interval over {part.crosses}." in section
    assert ledger.markdown([]).count("not run") == 3 * len(SIDES)


def test_command_quotes_what_a_shell_would_split() -> None:
    one = measurement(parameters={"dataset": "my file.jsonl", "x": None, "weight": 0.9})
    assert one.command.endswith("-p dataset 'my file.jsonl' -p x None -p weight 0.9")


def test_from_a_terminal(tmp_path: Path) -> None:
    ledger.record(measurement())
    done = subprocess.run(
        [sys.executable, "-m", "cvfp.analysis.ledger", str(tmp_path / "claims.md")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip().endswith("claims.md: 1 measurements of claims' parts")
    page = (tmp_path / "claims.md").read_text(encoding="utf-8")
    assert page == ledger.markdown(ledger.measurements())
    kept = ledger.load(tmp_path / "claims.json")
    assert kept == claims.corrected(ledger.measurements())


def test_earlier_measurements_stay_in_the_ledger(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "claims.md"
    monkeypatch.setattr(sys, "argv", ["ledger", str(path)])
    ledger.record(measurement("C2.mse"))
    ledger.record(measurement(setting="published_size"))
    ledger.record(measurement())
    ledger.main()
    (store / "C2.mse.mini.json").unlink()
    ledger.record(measurement(estimate=-0.25))
    ledger.main()
    kept = ledger.load(tmp_path / "claims.json")
    assert [one.key for one in kept] == [
        ("C1", "ppl", "mini"),
        ("C1", "ppl", "published_size"),
        ("C2", "mse", "mini"),
    ]
    assert [one.estimate for one in kept] == [-0.25, -0.2, -0.2]
    assert path.read_text(encoding="utf-8") == ledger.markdown(kept)
    rows = json.loads((tmp_path / "claims.json").read_text(encoding="utf-8"))
    needed = {"id", "part", "setting", "n", "estimate", "low", "high", "by"}
    for row, one in zip(rows, kept, strict=True):
        assert needed <= row.keys()
        assert (row["direction"], row["magnitude"]) == (one.direction, one.magnitude)
    (tmp_path / "claims.json").write_text('[{"id": "C77"}]', encoding="utf-8")
    with pytest.raises(ValueError, match=r"claims.json: got .* accepted: a file that"):
        ledger.main()


def test_the_page_needs_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ledger"])
    with pytest.raises(SystemExit, match="2"):
        ledger.main()
    assert "required: file" in capsys.readouterr().err


def test_a_stored_measurement_is_plain_json() -> None:
    path = ledger.record(measurement())
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept["parameters"] == {"samples": 200, "seeds": [0, 1, 2], "device": "cpu"}
    assert (kept["estimate"], kept["low"], kept["high"], kept["n"]) == (-0.2, -0.3, -0.1, 3)
