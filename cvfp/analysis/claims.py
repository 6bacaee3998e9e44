"""The ledger: each claim of the notes recomputed from their tables, measured again, and judged.

The sentences, regions and the rule of `verdict` stand here before any run. A notebook that measures
a claim keeps the measurement with `record`; `python -m cvfp.analysis.claims FILE` writes the page.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from cvfp import cache
from cvfp.analysis import prediction, published, scaling
from cvfp.analysis.scaling import PowerLaw
from cvfp.config import ParameterError

Verdict = Literal["agrees", "contradicts", "inconclusive", "not run"]

Floats = NDArray[np.float64]

FEWEST_SEEDS = 3


@dataclass(frozen=True)
class Recomputed:
    """What the notes' own tables give.

    Attributes:
        figures: by name; shares and relative changes as fractions, effective rank in percent.
        words: the same in a sentence.
        stands: whether the tables bear out the claim and every figure in `Claim.published`,
            rounding aside; None if there is no table, or none that could tell.
    """

    figures: dict[str, float]
    words: str
    stands: bool | None

    def __post_init__(self) -> None:
        # Of plain floats, whatever pandas and numpy computed them in.
        plain = {name: float(value) for name, value in self.figures.items()}
        object.__setattr__(self, "figures", plain)


@dataclass(frozen=True)
class Claim:
    """One published claim, in a form that other corpora and tokenisers can contradict.

    Attributes:
        id: "C1" to "C19".
        title: a few words.
        notes: the note and section that it is from.
        sentence: what would be false if the claim were.
        quantity: what is measured, one number, with its unit.
        region: where the claim says that the quantity lies; its ends do not belong to it.
        published: what the note says.
        recompute: the note's figures once more, from the tables in `published` alone.
        notebook: the notebook that measures it.
        takes: the runs that a measurement needs.
    """

    id: str
    title: str
    notes: str
    sentence: str
    quantity: str
    region: tuple[float, float]
    published: str
    recompute: Callable[[], Recomputed]
    notebook: str
    takes: str

    @property
    def where(self) -> str:
        """The region in words: "above 0", "between -2 and 2"."""
        low, high = self.region
        if math.isinf(high):
            return f"above {low:g}"
        return f"below {high:g}" if math.isinf(low) else f"between {low:g} and {high:g}"


@dataclass(frozen=True)
class Measurement:
    """What a notebook measured for a claim.

    Attributes:
        value: the claim's quantity, in its unit; None if the runs gave none.
        low, high: its 95 % interval; None if there is none.
        seeds: how many seeds are behind it.
        words: what exactly was measured.
        notebook: which one measured it.
        parameters: the notebook's parameters that were not its defaults; JSON-able.
        ran_on: corpus, tokeniser, model and device, in words.

    Raises:
        ValueError: a figure that is not finite, half an interval or one upside down, an interval
            without a value, seeds that are no count, parameters that JSON cannot hold.
    """

    value: float | None
    low: float | None
    high: float | None
    seeds: int
    words: str
    notebook: str
    parameters: dict[str, Any]
    ran_on: str

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):
            figure = getattr(self, name)
            number = isinstance(figure, int | float) and not isinstance(figure, bool)
            if figure is not None and not (number and math.isfinite(figure)):
                raise ParameterError(name, figure, "a finite number or None")
        ends = (self.low, self.high)
        if (self.low is None) != (self.high is None):
            raise ParameterError("low, high", ends, "both or neither")
        if self.low is not None and self.high is not None:
            if self.value is None:
                raise ParameterError("value", self.value, "a number where there is an interval")
            if self.low > self.high:
                raise ParameterError("low, high", ends, "the lower end first")
        if isinstance(self.seeds, bool) or not isinstance(self.seeds, int) or self.seeds < 0:
            raise ParameterError("seeds", self.seeds, "a whole number, 0 or more")
        if not isinstance(self.parameters, dict):
            raise ParameterError("parameters", self.parameters, "a dict")
        try:
            # As they will be read again: tuples become lists, for one.
            plain = json.loads(json.dumps(self.parameters, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ParameterError("parameters", self.parameters, "JSON-able values") from error
        object.__setattr__(self, "parameters", plain)

    @property
    def figure(self) -> str:
        """Value and interval: "0.7941 [0.7511, 0.8405]"."""
        if self.value is None:
            return "no value"
        if self.low is None or self.high is None:
            return f"{self.value:.4g}, no interval"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    @property
    def command(self) -> str:
        """The command that makes it again."""
        words = ["papermill", f"notebooks/{self.notebook}.ipynb", "out.ipynb"]
        for name, value in self.parameters.items():
            # Notebooks take lists as "0,1,2".
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += ["-p", name, text]
        return shlex.join(words)


def verdict(claim: Claim, measurement: Measurement | None) -> Verdict:
    """What a measurement says of a claim; the same rule for all.

    "not run" without a measurement; "inconclusive" on fewer than three seeds or without an
    interval; "agrees" if the whole interval lies in the claim's region (its ends excluded),
    "contradicts" if none of it does, "inconclusive" otherwise.
    """
    if measurement is None:
        return "not run"
    if measurement.seeds < FEWEST_SEEDS or measurement.low is None or measurement.high is None:
        return "inconclusive"
    low, high = claim.region
    if low < measurement.low and measurement.high < high:
        return "agrees"
    if measurement.high <= low or high <= measurement.low:
        return "contradicts"
    return "inconclusive"


def record(id: str, measurement: Measurement) -> Path:
    """Keep a claim's measurement in the store, in place of an earlier one; returns its file.

    Raises:
        ValueError: no claim of that id.
    """
    _known(id)
    path = cache.home() / "claims" / f"{id}.json"
    with cache.whole(path) as temporary:
        text = json.dumps(asdict(measurement), indent=1, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text, encoding="utf-8")
    return path


def measurements() -> dict[str, Measurement]:
    """The store's measurements by claim, in the ledger's order.

    Raises:
        ValueError: a file of the store's folder belongs to no claim or holds no measurement.
    """
    found = {}
    # Not the hidden files: they are being written.
    for path in (cache.home() / "claims").glob("[!.]*.json"):
        try:
            _known(path.stem)
            found[path.stem] = Measurement(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: got {error}; accepted: a file that claims.record wrote"
            ) from error
    return {id: found[id] for id in CLAIMS if id in found}


def load(path: Path) -> dict[str, Measurement]:
    """The measurements of a ledger, from the .json beside its page.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for id in found:
            _known(id)
        return {id: Measurement(**one) for id, one in found.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: got {error}; accepted: what this module wrote") from error


def row(claim: Claim, measurement: Measurement | None) -> dict[str, str]:
    """A claim's row of the ledger."""
    if measurement is None:
        measured, seeds, by = f"not run; takes {claim.takes}", "–", claim.notebook
    else:
        measured = f"{measurement.figure} ({measurement.words})"
        seeds, by = str(measurement.seeds), measurement.notebook
    return {
        "claim": claim.id,
        "sentence": claim.sentence,
        "published": claim.published,
        "recomputed": _recomputed(claim),
        "measured": measured,
        "n": seeds,
        "verdict": verdict(claim, measurement),
        "by": by,
    }


def frame(
    ids: Sequence[str] | None = None, measurements: Mapping[str, Measurement] | None = None
) -> pd.DataFrame:
    """The ledger, or these claims of it, one row a claim.

    Columns: claim, sentence, published, recomputed, measured (value and 95 % interval), n (seeds),
    verdict, by (the notebook).

    Args:
        ids: claims to show, in this order; all by default.
        measurements: by claim; by default the store's.

    Raises:
        ValueError: no claim of that id; a file of the store that holds no measurement.
    """
    kept = _kept() if measurements is None else measurements
    for id in [*(ids or ()), *kept]:
        _known(id)
    return pd.DataFrame([row(CLAIMS[id], kept.get(id)) for id in (CLAIMS if ids is None else ids)])


def rows(ids: Sequence[str], measurements: Mapping[str, Measurement]) -> str:
    """These claims of the ledger as a Markdown table, as notebooks print them; see `frame`."""
    return _lines(frame(ids, {id: one for id, one in measurements.items() if id in ids}))


def markdown(measurements: Mapping[str, Measurement]) -> str:
    """The whole ledger as a page: how to read it, the table, and each claim in full.

    Raises:
        ValueError: a measurement of no claim.
    """
    table = frame(measurements=measurements)
    counts = table.verdict.value_counts()
    summary = ", ".join(f"{name} {counts.get(name, 0)}" for name in get_args(Verdict))
    head = f"""# The claims of the notes, one by one

Each claim is put as one sentence that can be false on any corpus, about one number. *Published* is
what the note says; *recomputed* is the same from the note's own tables; *measured* is the number
from runs of this kit, with its 95 % interval, and *n* the seeds behind it. The verdict follows from
a rule fixed before the runs: the measurement *agrees* if its whole interval lies in the claim's
region, *contradicts* if none of it does, and is *inconclusive* otherwise, or on fewer than
{FEWEST_SEEDS} seeds. A verdict holds for the corpus, tokeniser and sizes it was measured on.

{len(measurements)} of {len(CLAIMS)} claims are measured. Verdicts: {summary}.
"""
    full = [_full(claim, measurements.get(claim.id)) for claim in CLAIMS.values()]
    return "\n\n".join([head + "\n" + _lines(table), *full]) + "\n"


def _kept() -> dict[str, Measurement]:
    # `frame` has a parameter of the name.
    return measurements()


def _known(id: str) -> None:
    if id not in CLAIMS:
        raise ParameterError("id", id, f"one of {', '.join(CLAIMS)}")


def _recomputed(claim: Claim) -> str:
    recomputed = claim.recompute()
    stands = {True: "stands", False: "does not stand as printed", None: "cannot be told"}
    return f"{stands[recomputed.stands]}: {recomputed.words}"


def _lines(table: pd.DataFrame) -> str:
    lines = [_cells(table.columns), _cells(["---"] * len(table.columns))]
    return "\n".join(lines + [_cells(cells) for cells in table.to_numpy().tolist()])


def _cells(cells: Iterable[str]) -> str:
    clean = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(clean)} |"


def _full(claim: Claim, measurement: Measurement | None) -> str:
    said = [
        f"## {claim.id} · {claim.title}",
        f"**{claim.sentence}** (note {claim.notes})",
        f"- Number: {claim.quantity}. It agrees if its whole 95 % interval lies {claim.where}, and "
        "contradicts if none of it does.",
        f"- Published: {claim.published}.",
        f"- Recomputed: {_recomputed(claim)}.",
    ]
    if measurement is None:
        said.append(f"- Measured: not run; takes {claim.takes} (`{claim.notebook}`).")
    else:
        seeds = f"{measurement.seeds} seed{'' if measurement.seeds == 1 else 's'}"
        said += [
            f"- Measured: {measurement.figure}, {seeds}: {measurement.words}. "
            f"On {measurement.ran_on}.",
            f"- Verdict: **{verdict(claim, measurement)}**. Again by `{measurement.command}`",
        ]
    return "\n\n".join(said[:2]) + "\n\n" + "\n".join(said[2:])


def _law(name: str) -> PowerLaw:
    table = published.table(name)
    return scaling.fit(table.tokens, table.val_ppl)


def _correlation(x: ArrayLike, y: ArrayLike) -> tuple[float, float]:
    """Pearson's r and its p."""
    found = prediction.correlation(x, y)
    return found.r, found.p


def _partial(table: pd.DataFrame) -> float:
    """r of Val ER and log PPL, once what log tokens explain is taken out of both."""
    logs = np.log(table.val_ppl)
    return prediction.partial_correlation(table.val_er, logs, np.log(table.tokens)).r


def _left_out(x: Floats, y: Floats) -> tuple[float, float]:
    """Mean relative error of each y as predicted from the others: by their line in x, by their
    mean."""
    line, mean = [], []
    for number in range(len(x)):
        others = np.arange(len(x)) != number
        fitted = stats.linregress(x[others], y[others])
        line.append(abs((fitted.intercept + fitted.slope * x[number]) / y[number] - 1))
        mean.append(abs(y[others].mean() / y[number] - 1))
    return float(np.mean(line)), float(np.mean(mean))


def _configurations() -> pd.DataFrame:
    """Note 004's eight configurations: settings, alpha, Val ER and PPL at the largest size."""
    settings = published.table("004_configs").drop(columns="alpha")
    return published.table("004_summary").merge(settings, on="config", validate="1:1")


def _c1() -> Recomputed:
    designs = published.table("002_designs").set_index("design")
    ours, theirs = designs.loc["token input in every layer"], designs.loc["equal-decrease"]
    ratio = published.table("002_scaling").val_ppl / published.table("001_scaling").val_ppl
    figures = {
        "ppl_change": ours.val_ppl / theirs.val_ppl - 1,
        "accuracy_change": ours.val_acc / theirs.val_acc - 1,
        "er_ratio": ours.val_er / theirs.val_er,
        "ppl_change_least": ratio.max() - 1,
        "ppl_change_most": ratio.min() - 1,
    }
    return Recomputed(
        figures,
        "PPL {ppl_change:+.0%}, accuracy {accuracy_change:+.0%}, ER {er_ratio:.1f} times at 500 "
        "samples; PPL {ppl_change_least:+.0%} to {ppl_change_most:+.0%} over the four "
        "sizes".format(**figures),
        True,
    )


def _c2() -> Recomputed:
    whole = published.table("000_agreement").set_index("metric").value
    positions = published.table("000_positions")
    mse = np.append(positions.mse, whole["mse"])
    cosine = np.append(positions.cosine, whole["cosine_mean"])
    figures = {
        # LayerNorm leaves every context with a squared norm of D.
        "cosine_from_mse": 1 - whole["mse"] / 2,
        "largest_mismatch": np.abs(1 - mse / 2 - cosine).max(),
        "root_mse": math.sqrt(whole["mse"]),
    }
    return Recomputed(
        figures,
        "cosine = 1 − MSE/2 after LayerNorm gives {cosine_from_mse:.4f}, and at the three "
        "positions the printed ones to {largest_mismatch:.0e}; root MSE {root_mse:.1%} bounds the "
        "mean relative error, as it must".format(**figures),
        True,
    )


def _c3() -> Recomputed:
    return Recomputed({}, "two timings in the text, no table", None)


def _c4() -> Recomputed:
    return _ladder("001_scaling")


def _ladder(name: str) -> Recomputed:
    law = _law(name)
    assert law.r2 is not None
    figures = {"alpha": law.alpha, "r2": law.r2, "A": law.A, "per_doubling": law.per_doubling}
    words = "α {alpha:.4f}, R² {r2:.4f}, A {A:,.0f}, {per_doubling:+.1%} PPL per doubling"
    return Recomputed(figures, words.format(**figures), True)


def _c5() -> Recomputed:
    equal, every = published.table("001_scaling"), published.table("002_scaling")
    figures: dict[str, float] = {}
    for name, table in (("equal_decrease", equal), ("every_layer", every)):
        figures[f"r_{name}"], figures[f"p_{name}"] = _correlation(table.val_er, table.val_ppl)
        figures[f"partial_r_{name}"] = _partial(table)
    return Recomputed(
        figures,
        "r {r_equal_decrease:.2f} (p {p_equal_decrease:.2f}) over the note's four sizes, but "
        "{r_every_layer:.2f} (p {p_every_layer:.2f}) over note 002's; ER grows with tokens there; "
        "at given tokens r is {partial_r_equal_decrease:.2f} and {partial_r_every_layer:.2f} with "
        "one degree of freedom each".format(**figures),
        None,
    )


def _c6() -> Recomputed:
    ladder = _ladder("002_scaling")
    figures = ladder.figures | {"A_published_ratio": 195_000 / ladder.figures["A"]}
    ratio = figures["A_published_ratio"]
    words = f"{ladder.words}: α and R² agree, the published A is {ratio:.1f} times too large"
    return Recomputed(figures, words, False)


def _c7() -> Recomputed:
    law = _law("002_scaling")
    figures = {f"ppl_{t}m": law.predict(t * 1e6) for t in (1, 5, 10)}
    last = published.table("004_window_sizes")
    tables = {"002": published.table("002_scaling"), "001": published.table("001_scaling")}
    for note, table in {**tables, "004": last}.items():
        before, largest = table[:-1], table.iloc[-1]
        predicted = scaling.fit(before.tokens, before.val_ppl).predict(largest.tokens)
        figures[f"error_{note}"] = predicted / largest.val_ppl - 1
    return Recomputed(
        figures,
        "{ppl_1m:.1f} / {ppl_5m:.1f} / {ppl_10m:.1f} from the same fit; a law of all sizes but the "
        "largest is off there by {error_001:+.1%} (note 001), {error_002:+.1%} (002) and "
        "{error_004:+.1%} (004, v3)".format(**figures),
        False,
    )


def _c8() -> Recomputed:
    table = published.table("003_results")
    deep, wide = (
        scaling.fit(runs.tokens, runs.val_ppl) for _, runs in table.groupby("experiment", sort=True)
    )
    figures = {
        "alpha_deep": deep.alpha,
        "alpha_wide": wide.alpha,
        "A_deep": deep.A,
        "A_wide": wide.A,
        "crossover": math.exp(math.log(deep.A / wide.A) / (wide.alpha - deep.alpha)),
        "per_doubling_deep": deep.per_doubling,
        "per_doubling_wide": wide.per_doubling,
    }
    return Recomputed(
        figures,
        "α {alpha_deep:.4f} and {alpha_wide:.4f}, through two points each; crossover at "
        "{crossover:,.0f} tokens, {per_doubling_deep:+.1%} and {per_doubling_wide:+.1%} per "
        "doubling".format(**figures),
        False,
    )


def _c9() -> Recomputed:
    table = published.table("003_overfitting")
    rise = table.epoch4_val_ppl / table.epoch2_val_ppl - 1
    names = table.experiment + "_" + table.samples.astype(str)
    figures = {f"rise_{name}": share for name, share in zip(names, rise, strict=True)}
    words = "PPL {:+.0%} / {:+.0%} / {:+.0%} / {:+.0%} from epoch 2 to 4, at 0.002 only"
    return Recomputed(figures, words.format(*figures.values()), True)


def _c10() -> Recomputed:
    figures: dict[str, float] = {}
    gained: list[float] = []
    for samples, epochs in published.table("002_epochs").groupby("samples"):
        best, after = epochs.iloc[-2], epochs.iloc[-1]
        figures[f"best_{samples}"], figures[f"next_{samples}"] = best.val_ppl, after.val_ppl
        figures[f"change_{samples}"] = after.val_ppl / best.val_ppl - 1
        gained.append(after.val_acc - best.val_acc)
    figures["accuracy_gain_least"], figures["accuracy_gain_most"] = min(gained), max(gained)
    return Recomputed(
        figures,
        "note 002's PPL worsens at the epoch after the best at every size "
        "({best_500:.1f} -> {next_500:.1f} at 500 samples, {change_500:+.1%}), while accuracy "
        "gains {accuracy_gain_least:.1f} to {accuracy_gain_most:.1f} points; the falling "
        "accuracies are of different tail tokens".format(**figures),
        False,
    )


def _c11() -> Recomputed:
    runs = _configurations()
    before, after = (runs[runs.version == version] for version in ("v1", "v2"))
    pairs = before.merge(after, on="context_dim", validate="1:1")  # w 0.8 and 0.9
    er = pairs.best_val_er_y - pairs.best_val_er_x
    alpha = pairs.alpha_y - pairs.alpha_x
    figures = {
        "er_least": er.min(),
        "er_most": er.max(),
        "alpha_least": alpha.min(),
        "alpha_most": alpha.max(),
        "pairs": len(pairs),
    }
    return Recomputed(
        figures,
        "ER {er_least:+.1f} to {er_most:+.1f} points agrees; α {alpha_least:+.3f} to "
        "{alpha_most:+.3f} over {pairs} pairs; v1 was cut off at 40 iterations and v2 converged, "
        "so w is not all that differs".format(**figures),
        False,
    )


def _c12() -> Recomputed:
    runs = _configurations()
    r, p = _correlation(runs.alpha, runs.best_val_er)
    words = f"r {r:.2f} (p {p:.2f}) over the {len(runs)} configurations"
    return Recomputed({"r": r, "p": p, "configurations": len(runs)}, words, False)


def _c13() -> Recomputed:
    sizes = published.table("004_window_sizes")
    one, two = published.table("004_input_tokens").val_ppl
    er_one, er_two = published.table("004_input_tokens").val_er
    # Note 002 cut a tenth of the same 500 samples off for validation; note 004 held samples out.
    tokens = published.table("002_scaling").tokens.max() / 0.9
    same = math.exp(np.interp(math.log(tokens), np.log(sizes.tokens), np.log(sizes.val_ppl)))
    figures = {
        "tokens": tokens,
        "ppl_two_same_tokens": same,
        "change_same_tokens": same / one - 1,
        "change_published": two / one - 1,
        "er_change": er_two - er_one,
    }
    return Recomputed(
        figures,
        f"500 samples against 800: v3 between its neighbouring sizes, in log-log, has {same:.1f} "
        f"at v2's {tokens:,.0f} tokens ({figures['change_same_tokens']:+.1%}): no gain in PPL; ER "
        f"{figures['er_change']:+.1f} points",
        False,
    )


def _c14() -> Recomputed:
    runs = _configurations()
    runs = runs[runs.num_input_tokens == 1]
    names = runs.version + "_" + runs.context_dim.astype(str)
    figures = dict(zip(names, runs.best_val_er, strict=True))
    return Recomputed(
        figures,
        "{v2_768:.1f} / {v2_1200:.1f} / {v2_1537:.1f} % (v2) and {v1_768:.1f} / {v1_1200:.1f} / "
        "{v1_1537:.1f} % (v1) agree; v4 (1085, {v4_1085:.1f} %) breaks the order, but was cut off "
        "at 60 iterations".format(**figures),
        True,
    )


def _c15() -> Recomputed:
    sizes = published.table("004_window_sizes")
    first, last = (
        scaling.fit(window.tokens, window.val_ppl)
        for window in (sizes[sizes.in_window_1], sizes[sizes.in_window_2])
    )
    assert first.alpha_error is not None
    assert last.alpha_error is not None
    figures = {
        "alpha_first": first.alpha,
        "alpha_last": last.alpha,
        "change": last.alpha - first.alpha,
        "error_first": first.alpha_error,
        "error_last": last.alpha_error,
    }
    return Recomputed(
        figures,
        "{alpha_first:.4f} -> {alpha_last:.4f} ({change:+.3f}), standard errors {error_first:.3f} "
        "and {error_last:.3f}; the windows share three of their four sizes".format(**figures),
        True,
    )


def _c16() -> Recomputed:
    runs = _configurations()
    er, ppl = runs.best_val_er.to_numpy(), runs.best_val_ppl.to_numpy()
    r, p = _correlation(er, ppl)
    errors = np.abs((500 - 4 * er) / ppl - 1)
    line, mean = _left_out(er, ppl)
    figures = {
        "r": r,
        "p": p,
        "error_mean": errors.mean(),
        "error_most": errors.max(),
        "line_error": line,
        "mean_error": mean,
        "gain": mean - line,
    }
    larger = (runs.samples_high > 500).sum()
    return Recomputed(
        figures,
        f"r {r:.2f} (p {p:.2f}) over {len(runs)} configurations, {larger} of them at more samples "
        "than the others; the rule's error is {error_mean:.1%} in the mean, {error_most:.0%} at "
        "most; a line in ER fitted to the others misses a configuration by {line_error:.1%}, "
        "their mean PPL by {mean_error:.1%}".format(**figures),
        False,
    )


def _c17() -> Recomputed:
    runs = published.table("004_configs")
    others = [published.table(name) for name in ("001_scaling", "003_results")]
    exact = pd.concat([table.train_er - table.val_er for table in others])
    figures = {
        # Ranges over the sizes: which ends belong together is not printed.
        "gap_least": (runs.train_er_low - runs.val_er_high).min(),
        "gap_most": (runs.train_er_high - runs.val_er_low).max(),
        "gap_most_other_notes": exact.max(),
    }
    return Recomputed(
        figures,
        "{gap_least:.1f} to {gap_most:.1f} points at the ranges' far ends, up to "
        "{gap_most_other_notes:.1f} in notes 001 and 003; train ER is the higher "
        "everywhere".format(**figures),
        True,
    )


def _c18() -> Recomputed:
    runs = _configurations()
    runs = runs[runs.samples_high == 500]
    bands = published.table("004_er_thresholds")
    names = {"moderate": "moderate", "review": "needs review"}
    figures = {}
    for key, name in names.items():
        band = bands[bands.verdict == name].iloc[0]
        inside = runs.best_val_er.between(band.val_er_low, band.val_er_high)
        figures[f"ppl_{key}"] = runs[inside].best_val_ppl.mean()
    return Recomputed(
        figures,
        "no outcome was fixed to judge by; at 500 samples the configurations judged moderate have "
        "a mean PPL of {ppl_moderate:.1f}, those to be reviewed {ppl_review:.1f}".format(**figures),
        None,
    )


def _c19() -> Recomputed:
    equal, every = published.table("001_scaling"), published.table("002_scaling")
    v3 = published.table("004_window_sizes")
    figures = {
        "val_low": equal.val_er.min(),
        "val_high": equal.val_er.max(),
        "train_high": equal.train_er.max(),
        "every_layer_first": every.val_er.iloc[0],
        "every_layer_last": every.val_er.iloc[-1],
        "v3_low": v3.val_er.min(),
        "v3_high": v3.val_er.max(),
    }
    return Recomputed(
        figures,
        "Val ER {val_low:.1f}-{val_high:.1f} % and {v3_low:.1f}-{v3_high:.1f} %; train ER reaches "
        "{train_high:.1f} %; in note 002 Val ER rises {every_layer_first:.1f} -> "
        "{every_layer_last:.1f} %".format(**figures),
        False,
    )


CLAIMS: dict[str, Claim] = {
    claim.id: claim
    for claim in (
        Claim(
            id="C1",
            title="Token input in every layer",
            notes="000 §1, 002",
            sentence="At the same training tokens, feeding the tokens to every layer gives a lower "
            "perplexity than the equal-decrease design.",
            quantity="ratio of validation PPL, tokens in every layer over equal-decrease, at the "
            "same training tokens (no unit)",
            region=(0.0, 1.0),
            published="PPL 324.5 vs 536.0, ER 75.9 vs 8.6 % at 500 samples",
            recompute=_c1,
            notebook="04_layers_vs_dim",
            takes="both designs at one size, 3 seeds",
        ),
        Claim(
            id="C2",
            title="Parallel contexts are the sequential ones",
            notes="000 §2",
            sentence="The contexts that Phase 1 leaves and the exact ones of its final weights "
            "have a mean cosine above 0.99.",
            quantity="cosine of parallel and exact contexts, mean over training tokens (no unit)",
            region=(0.99, math.inf),
            published="cosine 0.9969 mean, 0.9890 min, MSE 0.006156, relative error 7.5 %",
            recompute=_c2,
            notebook="02_parallel_vs_sequential",
            takes="Phase 1 and exact contexts at one size, 3 seeds",
        ),
        Claim(
            id="C3",
            title="The Phase 2 cache in parallel",
            notes="000 §3",
            sentence="A parallel method makes the step-by-step loop's contexts, equal to 1e-4, in "
            "less than a tenth of its time.",
            quantity="seconds of the step-by-step loop over seconds of the parallel method, on the "
            "same tokens and device (no unit)",
            region=(10.0, math.inf),
            published="51 s -> seconds",
            recompute=_c3,
            notebook="02_parallel_vs_sequential",
            takes="both methods timed alone on 10,000 tokens or more, models of 3 seeds",
        ),
        Claim(
            id="C4",
            title="Tokens dominate: equal-decrease scaling",
            notes="000 §4, 001",
            sentence="Equal-decrease perplexity falls as a power of the training tokens.",
            quantity="α of PPL = A · tokens^α over a ladder of the equal-decrease design (no unit)",
            region=(-math.inf, 0.0),
            published="α −0.459, R² 0.993, −27 % PPL per doubling",
            recompute=_c4,
            notebook="04_layers_vs_dim",
            takes="four sizes of the equal-decrease design, 3 seeds",
        ),
        Claim(
            id="C5",
            title="ER has no bearing on PPL",
            notes="001",
            sentence="At given training tokens, validation ER and log perplexity correlate by less "
            "than 0.3 either way.",
            quantity="correlation of Val ER and log PPL over configurations at the same training "
            "tokens (no unit)",
            region=(-0.3, 0.3),
            published="no correlation of ER with performance",
            recompute=_c5,
            notebook="05_phase1_to_phase2",
            takes="configurations that differ in ER at the same tokens, 3 seeds: about 45 to "
            "agree, far fewer to contradict",
        ),
        Claim(
            id="C6",
            title="All-layer scaling",
            notes="002",
            sentence="With tokens in every layer perplexity falls as a power of the training "
            "tokens.",
            quantity="α of PPL = A · tokens^α over a ladder with tokens in every layer (no unit)",
            region=(-math.inf, 0.0),
            published="α −0.403, R² 0.992, A ≈ 195,000",
            recompute=_c6,
            notebook="03_scaling",
            takes="four sizes with tokens in every layer, 3 seeds",
        ),
        Claim(
            id="C7",
            title="The law extrapolates",
            notes="002",
            sentence="A power law fitted to all sizes but the largest predicts its perplexity, a "
            "doubling or so beyond the fit, to 5 %.",
            quantity="predicted over measured PPL at the largest size, minus 1 (relative error)",
            region=(-0.05, 0.05),
            published="PPL 245 / 130 / 98 at 1 / 5 / 10 M tokens",
            recompute=_c7,
            notebook="03_scaling",
            takes="five sizes, the largest two to three times the one before, 3 seeds",
        ),
        Claim(
            id="C8",
            title="Deep and narrow against shallow and wide",
            notes="003",
            sentence="A shallow, wide model gains more per doubling of the tokens than a deep, "
            "narrow one.",
            quantity="α of the shallow-wide ladder minus α of the deep-narrow one (no unit)",
            region=(-math.inf, 0.0),
            published="α −0.287 vs −0.385, crossover ≈ 141,000 tokens, −22 % / −30 % per doubling",
            recompute=_c8,
            notebook="04_layers_vs_dim",
            takes="four sizes of half the layers and twice the width beside the deep model, 3 "
            "seeds",
        ),
        Claim(
            id="C9",
            title="Phase 2 overfits at learning rate 0.002",
            notes="003",
            sentence="At a Phase 2 learning rate of 0.002, perplexity two epochs after the best is "
            "more than 20 % higher.",
            quantity="validation PPL two epochs after the best over the best, minus 1 (relative "
            "rise)",
            region=(0.2, math.inf),
            published="+57 … +181 % from the best epoch, 2, to epoch 4",
            recompute=_c9,
            notebook="04_layers_vs_dim",
            takes="Phase 2 at 0.002, patience 2 or more, past its best epoch, 3 seeds; at 0.001 "
            "beside it",
        ),
        Claim(
            id="C10",
            title="Patience 1 stops too early",
            notes="000 §5",
            sentence="From 500 conversations on, patience 3 finds an epoch whose perplexity is "
            "more than 1 % lower than with patience 1.",
            quantity="best validation PPL with patience 3 over that with patience 1, minus 1, at "
            "500 conversations or more (relative change)",
            region=(-math.inf, -0.01),
            published="accuracy 17.6 -> 15.4 % from 200 to 500 samples",
            recompute=_c10,
            notebook="03_scaling",
            takes="one size of 500 conversations or more, patience 1 and 3, 3 seeds",
        ),
        Claim(
            id="C11",
            title="More weight on diversity raises ER",
            notes="004, trend 0",
            sentence="Raising w from 0.8 to 0.9 raises validation ER where Phase 1 converges with "
            "both.",
            quantity="Val ER at w = 0.9 minus Val ER at w = 0.8 (percentage points)",
            region=(0.0, math.inf),
            published="ER +1.7…4.0 points, α +0.04…0.07",
            recompute=_c11,
            notebook="05_phase1_to_phase2",
            takes="w 0.8 and 0.9, each with iterations enough to converge, 3 seeds; a ladder of "
            "each for α",
        ),
        Claim(
            id="C12",
            title="α and ER trade off",
            notes="004, trend 0",
            sentence="Over configurations, α is the higher (flatter) the higher validation ER is.",
            quantity="correlation of α and Val ER over configurations (no unit)",
            region=(0.0, math.inf),
            published="a positive correlation",
            recompute=_c12,
            notebook="05_phase1_to_phase2",
            takes="a ladder of each of eight configurations or more, 3 seeds",
        ),
        Claim(
            id="C13",
            title="Two input tokens",
            notes="004, trend 4",
            sentence="At the same training tokens, two input tokens give a lower perplexity than "
            "one.",
            quantity="validation PPL with n = 2 over that with n = 1, minus 1, at the same "
            "training tokens (relative change)",
            region=(-math.inf, 0.0),
            published="ER 79.2 -> 81.3 %, PPL 196.3 -> 168.0",
            recompute=_c13,
            notebook="05_phase1_to_phase2",
            takes="n = 1 and n = 2 at one size, 3 seeds",
        ),
        Claim(
            id="C14",
            title="A wider context has a lower ER",
            notes="004, trend 3",
            sentence="Widening the context lowers validation ER in percent of the width, where "
            "Phase 1 converges at both.",
            quantity="Val ER at the wider context minus that at the narrower (percentage points "
            "of the width)",
            region=(-math.inf, 0.0),
            published="79.2 / 75.6 / 72.6 % at 768 / 1200 / 1537",
            recompute=_c14,
            notebook="05_phase1_to_phase2",
            takes="two widths, one about twice the other, iterations enough to converge, 3 seeds",
        ),
        Claim(
            id="C15",
            title="α worsens with data",
            notes="004, trend 0.5",
            sentence="α over a window of the largest sizes is higher (flatter) than over one of "
            "the smallest.",
            quantity="α of the last window minus α of the first, windows of equally many sizes "
            "(no unit)",
            region=(0.0, math.inf),
            published="−0.504 -> −0.432",
            recompute=_c15,
            notebook="03_scaling",
            takes="five sizes or more, windows of four, 3 seeds",
        ),
        Claim(
            id="C16",
            title="Val ER predicts Val PPL",
            notes="004, candidates for a formula",
            sentence="Knowing validation ER besides the training tokens lowers the error with "
            "which a configuration's perplexity is predicted from the others.",
            quantity="mean relative error of PPL predicted from tokens alone minus that from "
            "tokens and ER, each configuration left out of the fit in turn (fraction)",
            region=(0.0, math.inf),
            published="the most reliable predictor; PPL ≈ 500 − 4·ER with 10-15 % error",
            recompute=_c16,
            notebook="05_phase1_to_phase2",
            takes="eight configurations or more that differ in ER, 3 seeds",
        ),
        Claim(
            id="C17",
            title="Train ER predicts Val ER",
            notes="004, predictability",
            sentence="Training and validation ER lie within 2 percentage points of one another.",
            quantity="distance of Train ER and Val ER, mean over runs (percentage points)",
            region=(-math.inf, 2.0),
            published="within 1-2 points",
            recompute=_c17,
            notebook="05_phase1_to_phase2",
            takes="Phase 1 at one size, 3 seeds",
        ),
        Claim(
            id="C18",
            title="The judgement rules",
            notes="004, practical criteria",
            sentence="The note's first rule, validation ER above 80 % good and under 75 % poor, is "
            "right about runs more often than as many calls at random.",
            quantity="share of calls that are right (PPL under the median at the same tokens for "
            "good, over it for poor) minus the share expected at random (fraction)",
            region=(0.0, math.inf),
            published="Val ER > 80 / 75-80 / < 75 %; iterations ≤ 25 / 26-30 / > 30; ER gap ≤ 2 / "
            "≥ 5 points; give up at iteration 20 if Val ER < 70 %, if convergence stalls after 15, "
            "or if the loss does not fall",
            recompute=_c18,
            notebook="05_phase1_to_phase2",
            takes="some twenty configurations on both sides of the thresholds at one size, 3 seeds",
        ),
        Claim(
            id="C19",
            title="ER does not depend on the token count",
            notes="000 §4, 001, 004",
            sentence="From the smallest to the largest size of a ladder, validation ER changes by "
            "less than 2 percentage points.",
            quantity="Val ER at the largest size minus that at the smallest, at least eight times "
            "the tokens apart (percentage points)",
            region=(-2.0, 2.0),
            published="7.8-9.0 %; 81.3-81.5 %",
            recompute=_c19,
            notebook="03_scaling",
            takes="the smallest and the largest size of a ladder, 3 seeds",
        ),
    )
}


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cvfp.analysis.claims",
        description="Write the ledger of claims. The measurements behind it are kept in a .json of "
        "the same name beside it; those of the store take the place of earlier ones.",
    )
    parser.add_argument("file", type=Path, help="where to, such as reports/claims.md")
    path: Path = parser.parse_args().file
    beside = path.with_suffix(".json")
    kept = {**(load(beside) if beside.exists() else {}), **measurements()}
    kept = {id: kept[id] for id in CLAIMS if id in kept}
    with cache.whole(beside) as temporary:
        plain = {id: asdict(one) for id, one in kept.items()}
        text = json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    path.write_text(markdown(kept), encoding="utf-8")
    print(f"{path}: {len(kept)} of {len(CLAIMS)} claims measured")


if __name__ == "__main__":
    _main()
