"""A notebook's parameters -> the Experiment of its runs, checked before anything runs.

The cell tagged `parameters` declares the notebook's own. Every field of the Experiment is a
parameter too: papermill (`-p num_layers 6`) writes it into a cell after that one, and a person can
write it into the cell."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from cvfp import data
from cvfp.config import Experiment, ParameterError, UpTo, nearest, plain
from cvfp.parameters import PLAIN, SIZES, parsed

if TYPE_CHECKING:
    import pandas as pd

    from cvfp.analysis.claims import Measurement
    from cvfp.analysis.measures import Source
    from cvfp.result import Result

FIELDS = [field.name for field in fields(Experiment)]
# `varies` of a notebook whose runs must all have a Phase 1 and a perplexity.
CVFP_ONLY = {
    "model": "every run here has a Phase 1; 06_controls has the other models",
    "contexts": "every run here has a Phase 1; 06_controls has the other contexts",
    "phase1_abort": "a run that is given up has no perplexity",
}


def given(
    namespace: Mapping[str, Any], /, *, varies: Mapping[str, str] | None = None, **own: str
) -> Given:
    """The parameters that a notebook was started with, read from its `globals()`.

    Called in the cell after the one tagged `parameters`, which assigns `preset` and all of `own`:
    the notebook's own parameters, each with its kind (`parameters.KINDS`), "… or None" where None
    is allowed; one with the name of a field takes the field's place. What is assigned there, and in
    cells of nothing but literals right after it (papermill's), must be a parameter; variables of
    other cells are left alone. `varies` has fields of the Experiment that may not be set, each with
    the own parameter that sets it, or with words that say why.

    Raises `ParameterError`: a name that is no parameter (the nearest one is named), a field that
    the notebook sets itself, an own parameter that is missing, ill-typed or out of range. Raises
    ValueError: a mistake of the notebook in `varies` or `own`."""
    varies = varies or {}
    if not set(varies) <= set(FIELDS) - set(own):
        raise ValueError(f"varies: got {', '.join(varies)}; accepted: fields not in own")
    declared = ("preset", *own)
    names, certain = _assigned(namespace, set(declared))
    accepted = list(dict.fromkeys((*declared, *FIELDS)))
    if unknown := [name for name in certain if name not in accepted]:
        raise ParameterError(unknown[0], namespace[unknown[0]], nearest(unknown[0], accepted))
    for name in names:
        if name in varies and namespace[name] is not None:
            why = varies[name]
            words = f"{why}, which sets it here" if why in own else f"no value ({why})"
            raise ParameterError(name, namespace[name], words)
    if missing := [name for name in declared if name not in namespace]:
        raise ParameterError(missing[0], "nothing", "a value in the cell tagged 'parameters'")
    chosen = [name for name in names if name in FIELDS and name not in (*own, *varies)]
    return Given(namespace, chosen, own)


class Given:
    """A notebook's parameters; its own ones are attributes, parsed: `given.seeds`. `parameters` is
    all that it takes to repeat the runs, as it was written: without those left at None, and without
    `n_jobs`. `chosen`: the Experiment's fields that were set; `kinds`: of its own parameters."""

    def __init__(
        self, namespace: Mapping[str, Any], chosen: Sequence[str], kinds: Mapping[str, str]
    ) -> None:
        self.preset = str(namespace["preset"])
        self._chosen = {name: plain(namespace[name]) for name in chosen}
        self._own = {name: parsed(name, namespace[name], kind) for name, kind in kinds.items()}
        self._sizes = [n for n, kind in kinds.items() if kind.removesuffix(" or None") in SIZES]
        # What is no JSON, such as a range, is recorded as parsed.
        written = {n: namespace[n] for n in kinds if isinstance(namespace[n], PLAIN)}
        everything = {"preset": self.preset, **self._chosen, **self._own, **written, "n_jobs": None}
        self.parameters = {k: value for k, value in everything.items() if value is not None}

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__.get("_own", {})
        if name not in own:
            raise AttributeError(f"no parameter {name!r}; there are {', '.join(own)}")
        return own[name]

    def experiment(self, **overrides: Any) -> Experiment:
        """The preset with the fields that were set, `overrides` in their place, and sizes settled.
        Raises `ParameterError`: a value that cannot be used, on this machine or with this corpus; a
        size, in any of the notebook's parameters, that the corpus does not have."""
        experiment = Experiment.preset(self.preset, **{**self._chosen, **overrides})
        experiment.resolved()
        for name in self._sizes or ["samples"]:
            value = self._own.get(name) or experiment.samples
            sizes = value if isinstance(value, list) else [value]
            # The corpus must have the largest; the smallest must have a tail to cut off.
            for size in (max(sizes), min(sizes)):
                tried = experiment.replace(samples=size)
                try:
                    became = tried.settled(data.load(tried).sizes)
                except ParameterError as error:
                    if error.parameter != "samples":
                        raise
                    raise ParameterError(name, error.value, error.accepted) from error
                alone = isinstance(size, UpTo)
                experiment = became if alone else became.replace(samples=experiment.samples)
        return experiment

    def source(self, notebook: str, one: Result) -> Source:
        """What repeats a measurement: the notebook's file name without its ending, and parameters;
        `one` is any of its runs, all of the same corpus, tokeniser and device."""
        from cvfp.analysis.measures import Source  # loads SciPy and pandas

        return Source(notebook, one, **self.parameters)


def record(results: Sequence[Result], judged: Sequence[Measurement] = ()) -> pd.DataFrame:
    """The last cell: stores the measurements of claims, and lists the runs that they come from."""
    from cvfp.analysis import ledger, tables

    for measurement in judged:
        ledger.record(measurement)
    return tables.record(results)


def _cell(source: str) -> tuple[set[str], bool]:
    """Names that a cell that ran assigns, and whether it only assigns literals."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        body = []
    assigns = [one for one in body if isinstance(one, (ast.Assign, ast.AnnAssign)) and one.value]
    nodes = [node for one in assigns for node in ast.walk(one) if isinstance(node, ast.Name)]
    names = {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
    return names, 0 < len(assigns) == len(body) and all(_literal(one.value) for one in assigns)


def _literal(value: ast.expr | None) -> bool:
    try:
        ast.literal_eval(value or "")
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        # papermill has float('nan') for the float that has no literal.
        return value is not None and ast.unparse(value).startswith("float('")
    return True


def _assigned(namespace: Mapping[str, Any], declared: set[str]) -> tuple[list[str], list[str]]:
    """Names that may be parameters, and those of them that must be.

    IPython has the sources of the cells that ran in `In`. The last that assigns all of `declared`
    is the parameters cell, in whatever order cells are run again. What it assigns must be
    parameters, and so must what is assigned in cells of literals right after it; such a cell that
    was run later may set a field. Where the parameters cell was split, all cells of literals count;
    without a history, as in a script, all variables of plain values do."""
    history = namespace.get("In")
    if not isinstance(history, list):
        must = may = {name for name, value in namespace.items() if isinstance(value, PLAIN)}
    else:
        cells = [_cell(str(source)) for source in history]
        own = [i for i, (names, _) in enumerate(cells) if declared <= names]
        own = [i for i in own if not history[i].startswith("# Parameters\n")]  # papermill's
        later = cells[own[-1] + 1 :] if own else []
        block = [cells[own[-1]]] if own else [cell for cell in cells if cell[1]]
        block += itertools.takewhile(lambda cell: cell[1], later)
        must = set().union(*(names for names, _ in block))
        may = must.union(*(names for names, literal in later if literal))
    names = [name for name in namespace if name in may and not name.startswith("_")]
    return names, [name for name in names if name in must and isinstance(namespace[name], PLAIN)]
