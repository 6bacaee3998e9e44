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


def measurement(**changes: Any) -> Measurement:
    given: dict[str, Any] = dict(
        value=0.8,
        low=0.7,
        high=0.9,
        seeds=3,
        words="PPL ratio at 200 conversations",
        notebook="06_controls",
        parameters={"samples": 200, "seeds": [0, 1, 2], "device": "cpu"},
        ran_on="chitchat, bpe",
    )
    return Measurement(**(given | changes))


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CVFP_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "claims"


# The figures, to the digits given: what each claim's recompute has to return.
FIGURES: dict[str, dict[str, tuple[float, int]]] = {
    "C1": {
        "ppl_change": (-0.39, 2),
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
    assert same <= {"tokens", "pairs", "configurations", "more_samples"}
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
    "C1": (324.5 / 536, 1.1, 1),
    "C2": (0.9969, 0.98, 0.99),
    "C3": (51, 5, 10),
    "C4": (-0.459, 0.1, 0),
    "C5": (0.1, -0.98, -0.3),
    "C6": (-0.403, 0.1, 0),
    "C7": (-0.04, 0.09, 0.05),
    "C8": (-0.097, 0.1, 0),
    "C9": (0.57, 0.1, 0.2),
    "C10": (-0.05, 0.08, -0.01),
    "C11": (1.7, -1, 0),
    "C12": (0.5, -0.5, 0),
    "C13": (-0.14, 0.01, 0),
    "C14": (-3.6, 1, 0),
    "C15": (0.072, -0.1, 0),
    "C16": (0.02, -0.011, 0),
    "C17": (1.9, 5, 2),
    "C18": (0.2, -0.1, 0),
    "C19": (0.8, 4.2, 2),
}


@pytest.mark.parametrize("id", ALL)
def test_each_region_is_on_the_claims_side(id: str) -> None:
    claim = CLAIMS[id]
    said, other, end = SIDES[id]

    def judged(value: float) -> str:
        near = measurement(value=value, low=value - 1e-4, high=value + 1e-4)
        return claims.verdict(claim, near)

    assert judged(said) == "agrees"
    assert judged(other) == "contradicts"
    assert judged(end) == "inconclusive"
    assert end in claim.region


@pytest.mark.parametrize(
    ("region", "low", "high", "expected"),
    [
        ((0.0, 1.0), 0.7, 0.9, "agrees"),
        ((0.0, 1.0), 0.9, 0.9, "agrees"),
        ((0.0, 1.0), 0.9, 1.1, "inconclusive"),
        ((0.0, 1.0), -0.1, 0.9, "inconclusive"),
        ((0.0, 1.0), -0.1, 1.1, "inconclusive"),
        ((0.0, 1.0), 1.1, 1.2, "contradicts"),
        ((0.0, 1.0), -1.2, -1.1, "contradicts"),
        # The region's ends do not belong to it: a ratio of 1 is no gain.
        ((0.0, 1.0), 0.9, 1.0, "inconclusive"),
        ((0.0, 1.0), 0.0, 0.9, "inconclusive"),
        ((0.0, 1.0), 1.0, 1.1, "contradicts"),
        ((0.0, 1.0), -0.1, 0.0, "contradicts"),
        ((0.0, 1.0), 1.0, 1.0, "contradicts"),
        ((0.0, math.inf), 1.0, 1e9, "agrees"),
        ((-math.inf, 0.0), -1e9, -1.0, "agrees"),
        ((-math.inf, 0.0), -1.0, 1.0, "inconclusive"),
        ((-math.inf, 0.0), 0.0, 1.0, "contradicts"),
    ],
)
def test_rule(region: tuple[float, float], low: float, high: float, expected: str) -> None:
    claim = replace(CLAIMS["C1"], region=region)
    assert claims.verdict(claim, measurement(low=low, high=high)) == expected


def test_rule_needs_three_seeds_and_an_interval() -> None:
    claim = CLAIMS["C1"]
    assert claims.verdict(claim, None) == "not run"
    assert claims.verdict(claim, measurement(seeds=3)) == "agrees"
    assert claims.verdict(claim, measurement(seeds=2)) == "inconclusive"
    assert claims.verdict(claim, measurement(seeds=0)) == "inconclusive"
    assert claims.verdict(claim, measurement(low=None, high=None)) == "inconclusive"
    assert claims.verdict(claim, measurement(seeds=2, low=2, high=3)) == "inconclusive"
    none = measurement(value=None, low=None, high=None)
    assert claims.verdict(claim, none) == "inconclusive"


def test_a_damaged_measurement_is_none(store: Path) -> None:
    path = ledger.record("C10", measurement())
    path.write_text(path.read_text(encoding="utf-8").replace("0.8", "0.3"), encoding="utf-8")
    with pytest.warns(UserWarning, match="C10.json: damaged"):
        assert ledger.measurements() == {}
    with pytest.raises(ValueError, match="not JSON compliant"):
        ledger.record("C10", measurement(value=math.nan))
    assert ledger.measurements() == {}


def test_every_claim_once() -> None:
    assert list(CLAIMS) == ALL
    assert [claim.id for claim in CLAIMS.values()] == ALL
    for name in ("title", "sentence", "quantity", "published", "recomputed", "takes"):
        assert len({getattr(claim, name) for claim in CLAIMS.values()}) == 19
    for claim in CLAIMS.values():
        assert claim.region[0] < claim.region[1]
        assert re.fullmatch(r"[A-Zα][^\n]*[a-z0-9%]\.", claim.sentence)
        assert re.fullmatch(r"0[1-7]_[a-z_0-9]+", claim.notebook)
        assert re.match(r"00[0-4]\b", claim.notes)


def test_regions_in_words() -> None:
    words = {id: CLAIMS[id].where for id in ("C1", "C3", "C4", "C19")}
    assert words == {
        "C1": "between 0 and 1",
        "C3": "above 10",
        "C4": "below 0",
        "C19": "between -2 and 2",
    }


def test_record_and_read_again(store: Path) -> None:
    assert ledger.measurements() == {}
    one = measurement(value=np.float64(0.8), parameters={"seeds": (0, 1), "x": None, "on": True})
    path = ledger.record("C10", one)
    assert path == store / "C10.json"
    ledger.record("C2", measurement(low=None, high=None, words="α × 10"))
    assert [file.name for file in sorted(store.iterdir())] == ["C10.json", "C2.json"]
    found = ledger.measurements()
    assert list(found) == ["C2", "C10"]
    assert found["C10"] == one
    assert found["C10"].parameters == {"seeds": [0, 1], "x": None, "on": True}
    assert found["C2"].low is None
    assert found["C2"].words == "α × 10"
    again = measurement(value=0.85)
    ledger.record("C10", again)
    assert ledger.measurements()["C10"] == again
    # Half-written files of another process are not read.
    (store / ".part.json").write_text("{", encoding="utf-8")
    assert len(ledger.measurements()) == 2


def test_record_goes_through_whole(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    whole = cache.whole

    def watched(path: Path) -> Any:
        paths.append(path)
        return whole(path)

    monkeypatch.setattr(cache, "whole", watched)
    ledger.record("C1", measurement())
    assert store / "C1.json" in paths


@pytest.mark.parametrize("id", ["C0", "C20", "c1", "", "../C1"])
def test_unknown_ids_are_named(id: str, store: Path) -> None:
    said = re.escape(f"id: got {id!r}; accepted: one of C1, C2, ")
    with pytest.raises(ValueError, match=said):
        ledger.record(id, measurement())
    with pytest.raises(ValueError, match=said):
        ledger.frame([id], {})
    with pytest.raises(ValueError, match=said):
        ledger.markdown({id: measurement()})
    assert not store.exists()


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", "null", '{"C1": {"value": 1}}', '{"C1": {"surprise": 1}}', "NaN", '{"C20": {}}'],
)
def test_ledgers_that_are_none_are_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"ledger\.json: got .*; accepted: a file that"):
        ledger.load(path)


def test_row() -> None:
    claim = CLAIMS["C1"]
    row = ledger.row(claim, measurement(value=0.79412, low=0.75106, high=0.84049))
    assert row == {
        "claim": "C1",
        "sentence": claim.sentence,
        "published": claim.published,
        "recomputed": ledger.from_tables(claim),
        "measured": "0.7941 [0.7511, 0.8405] (PPL ratio at 200 conversations)",
        "n": "3",
        "verdict": "agrees",
        "by": "06_controls",
    }
    row = ledger.row(CLAIMS["C6"], None)
    assert row["recomputed"].startswith("does not stand as printed: α -0.4026, R² 0.9920, A 66,783")
    assert row["measured"] == f"not run; takes {CLAIMS['C6'].takes}"
    assert (row["n"], row["verdict"], row["by"]) == ("–", "not run", "03_scaling")
    row = ledger.row(CLAIMS["C3"], measurement(value=None, low=None, high=None, seeds=1))
    assert row["recomputed"].startswith("cannot be told: ")
    assert row["measured"].startswith("no value (")
    assert ledger.row(claim, measurement(low=None, high=None))["measured"].startswith(
        "0.8, no interval ("
    )


def test_frame() -> None:
    columns = ["claim", "sentence", "published", "recomputed", "measured", "n", "verdict", "by"]
    ledger.record("C3", measurement(value=20, low=15, high=25, notebook="02_other"))
    stored = ledger.frame(CLAIMS, ledger.measurements())
    assert list(stored.columns) == columns
    assert stored.claim.tolist() == ALL
    assert stored.set_index("claim").verdict["C3"] == "agrees"
    assert stored.set_index("claim").by["C3"] == "02_other"
    some = ledger.frame(["C7", "C3"], {"C7": measurement(value=0.2, low=0.1, high=0.3)})
    assert some.claim.tolist() == ["C7", "C3"]
    assert some.verdict.tolist() == ["contradicts", "not run"]
    assert ledger.frame([], {}).empty
    assert set(ledger.frame(CLAIMS, {}).verdict) == {"not run"}


def test_markdown() -> None:
    measured = {
        "C1": measurement(),
        "C19": measurement(words="a|b\nc", seeds=1, notebook="03_scaling", parameters={}),
    }
    page = ledger.markdown(measured)
    rows = re.findall(r"^\| (C\d+) \|", page, flags=re.MULTILINE)
    assert rows == ALL
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == 21
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {9}
    assert "a\\|b c" in page
    assert re.findall(r"^## (C\d+) · ", page, flags=re.MULTILINE) == ALL
    assert (
        "2 of 19 claims are measured. Verdicts: agrees 1, contradicts 0, inconclusive 1, "
        "not run 17." in page
    )
    assert (
        "papermill notebooks/06_controls.ipynb out.ipynb -p samples 200 -p seeds 0,1,2 "
        "-p device cpu`" in page
    )
    assert "Again by `papermill notebooks/03_scaling.ipynb out.ipynb`" in page
    assert "0.8 [0.7, 0.9], 3 seeds: PPL ratio at 200 conversations. On chitchat, bpe." in page
    assert "1 seed: " in page
    assert page.endswith("`\n")
    sections = page.split("\n## ")[1:]
    for claim, section in zip(CLAIMS.values(), sections, strict=True):
        for part in (claim.title, claim.sentence, claim.notes, claim.where, claim.quantity):
            assert part in section
        assert claim.published in section
        assert ledger.from_tables(claim) in section
        assert (claim.takes in section) == (claim.id not in measured)


def test_command_quotes_what_a_shell_would_split() -> None:
    one = measurement(parameters={"dataset": "my file.jsonl", "x": None, "weight": 0.9})
    assert one.command.endswith("-p dataset 'my file.jsonl' -p x None -p weight 0.9")


def test_from_a_terminal(tmp_path: Path) -> None:
    ledger.record("C1", measurement())
    done = subprocess.run(
        [sys.executable, "-m", "cvfp.analysis.ledger", str(tmp_path / "claims.md")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip().endswith("claims.md: 1 of 19 claims measured")
    page = (tmp_path / "claims.md").read_text(encoding="utf-8")
    assert page == ledger.markdown(ledger.measurements())
    assert ledger.load(tmp_path / "claims.json") == ledger.measurements()


def test_earlier_measurements_stay_in_the_ledger(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "claims.md"
    monkeypatch.setattr(sys, "argv", ["ledger", str(path)])
    ledger.record("C2", measurement())
    ledger.record("C1", measurement())
    ledger.main()
    (store / "C2.json").unlink()
    ledger.record("C1", measurement(value=0.75))
    ledger.main()
    kept = ledger.load(tmp_path / "claims.json")
    assert list(kept) == ["C1", "C2"]
    assert (kept["C1"].value, kept["C2"].value) == (0.75, 0.8)
    assert path.read_text(encoding="utf-8") == ledger.markdown(kept)
    (tmp_path / "claims.json").write_text('{"C77": {}}', encoding="utf-8")
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
    path = ledger.record("C1", measurement())
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept["parameters"] == {"samples": 200, "seeds": [0, 1, 2], "device": "cpu"}
    assert (kept["value"], kept["low"], kept["high"], kept["seeds"]) == (0.8, 0.7, 0.9, 3)
