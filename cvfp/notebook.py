"""A notebook's parameters -> the Experiment of its runs, checked before anything runs.

The cell tagged `parameters` declares what the notebook itself has a say in. Every other field of
the Experiment is a parameter too: papermill (`-p num_layers 6`) writes it into a cell after that
one, and a person can write it into the cell.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

from cvfp import data
from cvfp.config import Experiment, ParameterError, nearest
from cvfp.parameters import PLAIN, SIZES, parsed

if TYPE_CHECKING:
    import pandas as pd

    from cvfp.analysis.claims import Measurement
    from cvfp.analysis.measures import Source
    from cvfp.result import Result

FIELDS = tuple(field.name for field in fields(Experiment))
# `varies` of a notebook that reads Phase 1 and perplexity of all its runs.
CVFP_ONLY = {
    "model": "every run here has a Phase 1; 06_controls has the other models",
    "contexts": "every run here has a Phase 1; 06_controls has the other contexts",
    "phase1_abort": "a run that is given up has no perplexity",
}


def given(
    namespace: Mapping[str, Any], /, *, varies: Mapping[str, str] | None = None, **own: str
) -> Given:
    """The parameters that a notebook was started with, read from its `globals()`.

    Called in the cell after the one tagged `parameters`, which assigns `preset` and all of `own`.
    What is assigned there, and in cells of nothing but literals right after it (papermill's), must
    be a parameter; the variables of other cells are left alone.

    Args:
        varies: fields of the Experiment that may not be given, each with the own parameter that
            sets it, or with words that say why.
        own: the notebook's own parameters, each with its kind (`parameters.KINDS`), "… or None"
            for one that may be left open. One with the name of a field takes the field's place.

    Raises:
        ParameterError: a name that is no parameter (the nearest one is named), a field that the
            notebook sets itself, an own parameter that is missing, ill-typed or out of range.
        ValueError: a mistake in the notebook: `varies` has what is no field or is in `own`, or
            `own` has a kind that there is not.
    """
    varies = varies or {}
    if not set(varies) <= set(FIELDS) - set(own):
        raise ValueError(f"varies: got {', '.join(varies)}; accepted: fields not in own")
    declared = ("preset", *own)
    names, certain = _assigned(namespace, set(declared))
    accepted = dict.fromkeys((*declared, *FIELDS))
    for name in certain:
        if name not in accepted:
            raise ParameterError(name, namespace[name], nearest(name, accepted))
    for name in names:
        if name in varies and namespace[name] is not None:
            words = varies[name]
            words = f"{words}, which sets it here" if words in own else f"no value ({words})"
            raise ParameterError(name, namespace[name], words)
    for name in declared:
        if name not in namespace:
            raise ParameterError(name, "nothing", "a value in the cell tagged 'parameters'")
    chosen = [name for name in names if name in FIELDS and name not in (*own, *varies)]
    return Given(
        str(namespace["preset"]),
        {name: namespace[name] for name in chosen},
        {name: namespace[name] for name in own},
        own,
    )


class Given:
    """What `given` found; the notebook's own parameters are attributes, parsed: `given.seeds`.

    Attributes:
        preset: name of the preset.
        parameters: all of them as they were written, without those left at None, and without
            `n_jobs`, which moves no number: what it takes to make the notebook's runs again.
    """

    def __init__(
        self, preset: str, chosen: dict[str, Any], own: dict[str, Any], kinds: dict[str, str]
    ) -> None:
        self.preset, self._chosen = preset, chosen
        self._own = {name: parsed(name, value, kinds[name]) for name, value in own.items()}
        self._sizes = [name for name in own if kinds[name].removesuffix(" or None") in SIZES]
        # A range, say, is no JSON: it is kept as the list that it spells.
        kept = {k: x if isinstance(x, PLAIN) else self._own[k] for k, x in own.items()}
        self.parameters = {
            name: value
            for name, value in {"preset": preset, **chosen, **kept}.items()
            if value is not None and name != "n_jobs"
        }

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__.get("_own", {})
        if name not in own:
            raise AttributeError(f"no parameter {name!r}; there are {', '.join(own)}")
        return own[name]

    def experiment(self, **overrides: Any) -> Experiment:
        """The preset with the fields that were given, and `overrides` in place of them.

        Raises:
            ParameterError: a value that cannot be used, on this machine or with this corpus; a
                size, in any of the notebook's parameters, that the corpus does not have.
        """
        experiment = Experiment.preset(self.preset, **{**self._chosen, **overrides})
        experiment.resolved()
        for name in self._sizes or ["samples"]:
            found = self._own.get(name, experiment.samples)
            sizes = found if isinstance(found, list) else [found]
            # The corpus has the largest; a tail can be cut off the smallest.
            for size in () if found is None else (max(sizes), min(sizes)):
                try:
                    data.load(experiment.replace(samples=size))
                except ParameterError as error:
                    if error.parameter != "samples":
                        raise
                    raise ParameterError(name, error.value, error.accepted) from error
        return experiment

    def source(self, notebook: str, one: Result) -> Source:
        """How to measure again: the notebook's file name without its ending, and its parameters.

        Args:
            one: any of its runs, all of the same corpus, tokeniser and device.
        """
        from cvfp.analysis.measures import Source  # loads SciPy and pandas

        return Source(notebook, one, **self.parameters)


def record(
    results: Sequence[Result], judged: Mapping[str, Measurement] | None = None
) -> pd.DataFrame:
    """The last cell: keeps the measurements of claims in the store, and lists the runs behind."""
    from cvfp.analysis import ledger, tables

    for name, measurement in (judged or {}).items():
        ledger.record(name, measurement)
    return tables.record(results)


class _Cell(NamedTuple):
    """A cell that ran: the names it assigns; whether it does nothing but assign literals."""

    names: set[str]
    literal: bool


def _cell(source: str) -> _Cell:
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        body = []
    assigns = [one for one in body if isinstance(one, (ast.Assign, ast.AnnAssign)) and one.value]
    stored = [node for one in assigns for node in ast.walk(one) if isinstance(node, ast.Name)]
    names = {node.id for node in stored if isinstance(node.ctx, ast.Store)}
    literal = len(assigns) == len(body) and all(_literal(one.value) for one in assigns)
    return _Cell(names, literal and bool(body))


def _literal(value: ast.expr | None) -> bool:
    try:
        ast.literal_eval(value or "")
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        # papermill has float('nan') for the float that has no literal.
        return value is not None and ast.unparse(value).startswith("float('")
    return True


def _assigned(namespace: Mapping[str, Any], declared: set[str]) -> tuple[list[str], list[str]]:
    """Names that may be parameters, and those of them that must be.

    IPython keeps the sources of the cells that ran in `In`; the last that assigns all that is
    `declared` is the parameters cell, in whatever order cells are run again. What it assigns must
    be parameters, and what cells of literals right after it do; such a cell that was run later may
    set a field. Where the parameters cell was split, all cells of literals count; without a
    history, as in a script, all variables of plain values do.
    """
    history = namespace.get("In")
    if not isinstance(history, list):
        must = may = {name for name, value in namespace.items() if isinstance(value, PLAIN)}
    else:
        cells = [_cell(str(source)) for source in history]
        own = [i for i, cell in enumerate(cells) if declared <= cell.names]
        own = [i for i in own if not history[i].startswith("# Parameters\n")]  # papermill's
        later = cells[own[-1] + 1 :] if own else []
        block = [cells[own[-1]]] if own else [cell for cell in cells if cell.literal]
        block += itertools.takewhile(lambda cell: cell.literal, later)
        must = {name for cell in block for name in cell.names}
        may = must | {name for cell in later if cell.literal for name in cell.names}
    names = [name for name in namespace if name in may and not name.startswith("_")]
    return names, [name for name in names if name in must and isinstance(namespace[name], PLAIN)]
