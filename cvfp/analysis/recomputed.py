"""The claims' figures once more, from the notes' own tables in `published` alone.

Shares and relative changes are fractions, effective rank is in percent."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from cvfp.analysis import prediction, published, scaling
from cvfp.analysis.scaling import PowerLaw


def figures(id: str) -> dict[str, float]:
    """What the notes' tables give for a claim, by the names in its `Claim.recomputed`."""
    compute = globals().get(f"_{id.lower()}", dict)  # the functions below; C3 has no table
    return {name: float(value) for name, value in compute().items()}


def _law(table: pd.DataFrame) -> PowerLaw:
    return scaling.fit(table.tokens, table.val_ppl)


def _configurations() -> pd.DataFrame:
    """Note 004's eight configurations: settings, alpha, Val ER and PPL at the largest size."""
    settings = published.table("004_configs").drop(columns="alpha")
    return published.table("004_summary").merge(settings, on="config", validate="1:1")


def _c1() -> dict[str, float]:
    designs = published.table("002_designs").set_index("design")
    ours, theirs = designs.loc["token input in every layer"], designs.loc["equal-decrease"]
    former, decrease = published.table("000_designs").val_ppl
    ratio = published.table("002_scaling").val_ppl / published.table("001_scaling").val_ppl
    return {
        "ppl_change": ours.val_ppl / theirs.val_ppl - 1,
        "ppl_change_000": former / decrease - 1,
        "accuracy_change": ours.val_acc / theirs.val_acc - 1,
        "er_ratio": ours.val_er / theirs.val_er,
        "ppl_change_least": ratio.max() - 1,
        "ppl_change_most": ratio.min() - 1,
    }


def _c2() -> dict[str, float]:
    whole = published.table("000_agreement").set_index("metric").value
    positions = published.table("000_positions")
    mse = np.append(positions.mse, whole["mse"])
    cosine = np.append(positions.cosine, whole["cosine_mean"])
    # LayerNorm leaves every context with a squared norm of D.
    mismatch, mean = np.abs(1 - mse / 2 - cosine).max(), 1 - whole["mse"] / 2
    root = math.sqrt(whole["mse"])
    return {"cosine_from_mse": mean, "largest_mismatch": mismatch, "root_mse": root}


def _c4() -> dict[str, Any]:
    return _ladder("001_scaling")


def _ladder(name: str) -> dict[str, Any]:
    law = _law(published.table(name))
    return {what: getattr(law, what) for what in ("alpha", "r2", "A", "per_doubling")}


def _ends(name: str, values: pd.Series) -> dict[str, float]:
    return {f"{name}_least": values.min(), f"{name}_most": values.max()}


def _c5() -> dict[str, float]:
    found: dict[str, float] = {}
    for design, name in (("equal_decrease", "001_scaling"), ("every_layer", "002_scaling")):
        table = published.table(name)
        both = prediction.correlation(table.val_er, table.val_ppl)
        found[f"r_{design}"], found[f"p_{design}"] = both.r, both.p
        # What log tokens explain is taken out of both.
        logs = np.log(table.tokens)
        pair = table.val_er, np.log(table.val_ppl)
        rest = [values - np.polyval(np.polyfit(logs, values, 1), logs) for values in pair]
        found[f"partial_r_{design}"] = prediction.correlation(*rest).r
    return found


def _c6() -> dict[str, Any]:
    ladder = _ladder("002_scaling")
    return ladder | {"A_published_ratio": 195_000 / ladder["A"]}


def _c7() -> dict[str, float]:
    law = _law(published.table("002_scaling"))
    found = {f"ppl_{t}m": law.predict(t * 1e6) for t in (1, 5, 10)}
    for name in ("002_scaling", "001_scaling", "004_window_sizes"):
        table = published.table(name)
        largest = table.iloc[-1]
        found[f"error_{name[:3]}"] = _law(table[:-1]).predict(largest.tokens) / largest.val_ppl - 1
    return found


def _c8() -> dict[str, Any]:
    table = published.table("003_results")
    laws = [_law(runs) for _, runs in table.groupby("experiment", sort=True)]
    found: dict[str, Any] = {"crossover": scaling.crossover(*laws).tokens}
    for name, law in zip(("deep", "wide"), laws, strict=True):
        found |= {f"{what}_{name}": getattr(law, what) for what in ("alpha", "A", "per_doubling")}
    return found


def _c9() -> dict[str, float]:
    table = published.table("003_overfitting")
    names = "rise_" + table.experiment + "_" + table.samples.astype(str)
    return dict(zip(names, table.epoch4_val_ppl / table.epoch2_val_ppl - 1, strict=True))


def _c10() -> dict[str, float]:
    found: dict[str, float] = {}
    gained = []
    for samples, epochs in published.table("002_epochs").groupby("samples"):
        best, after = epochs.iloc[-2], epochs.iloc[-1]
        found[f"best_{samples}"], found[f"next_{samples}"] = best.val_ppl, after.val_ppl
        found[f"change_{samples}"] = after.val_ppl / best.val_ppl - 1
        gained.append(after.val_acc - best.val_acc)
    return found | _ends("accuracy_gain", pd.Series(gained))


def _c11() -> dict[str, float]:
    runs = _configurations()
    before, after = (runs[runs.version == version] for version in ("v1", "v2"))
    pairs = before.merge(after, on="context_dim", validate="1:1")  # w 0.8 and 0.9
    er, alpha = pairs.best_val_er_y - pairs.best_val_er_x, pairs.alpha_y - pairs.alpha_x
    return {**_ends("er", er), **_ends("alpha", alpha), "pairs": len(pairs)}


def _c12() -> dict[str, float]:
    runs = _configurations()
    both = prediction.correlation(runs.alpha, runs.best_val_er)
    return {"r": both.r, "p": both.p, "configurations": len(runs)}


def _c13() -> dict[str, float]:
    sizes = published.table("004_window_sizes")
    one, two = published.table("004_input_tokens").val_ppl
    er_one, er_two = published.table("004_input_tokens").val_er
    # Note 002 cut a tenth of the same 500 samples off for validation; note 004 held samples out.
    tokens = published.table("002_scaling").tokens.max() / 0.9
    same = math.exp(np.interp(math.log(tokens), np.log(sizes.tokens), np.log(sizes.val_ppl)))
    changes = {"change_same_tokens": same / one - 1, "change_published": two / one - 1}
    return {"tokens": tokens, "ppl_two_same_tokens": same, "er_change": er_two - er_one, **changes}


def _c14() -> dict[str, float]:
    runs = _configurations()
    runs = runs[runs.num_input_tokens == 1]
    names = runs.version + "_" + runs.context_dim.astype(str)
    return dict(zip(names, runs.best_val_er, strict=True))


def _c15() -> dict[str, Any]:
    sizes = published.table("004_window_sizes")
    first, last = _law(sizes[sizes.in_window_1]), _law(sizes[sizes.in_window_2])
    errors = {"error_first": first.alpha_error, "error_last": last.alpha_error}
    alphas = {"alpha_first": first.alpha, "alpha_last": last.alpha}
    return {**alphas, **errors, "change": last.alpha - first.alpha}


def _c16() -> dict[str, float]:
    runs = _configurations()
    er, ppl = runs.best_val_er.to_numpy(), runs.best_val_ppl.to_numpy()
    both = prediction.correlation(er, ppl)
    errors = np.abs((500 - 4 * er) / ppl - 1)
    # Each PPL predicted from the others: by their line, by their mean.
    predicted = []
    for number in range(len(er)):
        others, left = np.delete(er, number), np.delete(ppl, number)
        predicted.append((np.polyval(np.polyfit(others, left, 1), er[number]), left.mean()))
    line, mean = np.abs(np.array(predicted) / ppl[:, None] - 1).mean(axis=0)
    more = (runs.samples_high > 500).sum()
    found: dict[str, float] = {"configurations": len(runs), "more_samples": more}
    found |= {"r": both.r, "p": both.p, "error_mean": errors.mean(), "error_most": errors.max()}
    return found | {"line_error": line, "mean_error": mean, "gain": mean - line}


def _c17() -> dict[str, float]:
    runs = published.table("004_configs")
    others = [published.table(name) for name in ("001_scaling", "003_results")]
    # Ranges over the sizes: which ends belong together is not printed.
    low, high = runs.train_er_low - runs.val_er_high, runs.train_er_high - runs.val_er_low
    most = max((table.train_er - table.val_er).max() for table in others)
    return {"gap_least": low.min(), "gap_most": high.max(), "gap_most_other_notes": most}


def _c18() -> dict[str, float]:
    runs = _configurations()
    runs = runs[runs.samples_high == 500]
    bands = published.table("004_er_thresholds").set_index("verdict")
    found = {}
    for key, name in (("moderate", "moderate"), ("review", "needs review")):
        inside = runs.best_val_er.between(bands.val_er_low[name], bands.val_er_high[name])
        found[f"ppl_{key}"] = runs[inside].best_val_ppl.mean()
    return found


def _c19() -> dict[str, float]:
    equal, v3 = published.table("001_scaling"), published.table("004_window_sizes").val_er
    every = published.table("002_scaling").val_er
    found = {"val_low": equal.val_er.min(), "val_high": equal.val_er.max()}
    found |= {"train_high": equal.train_er.max(), "v3_low": v3.min(), "v3_high": v3.max()}
    return found | {"every_layer_first": every.iloc[0], "every_layer_last": every.iloc[-1]}
