"""Choosing fields on development conversations: equally many trials for all that is compared."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvfp import cache, packs
from cvfp.config import PRESETS, Experiment, ParameterError, toml
from cvfp.progress import Whole
from cvfp.result import Result
from cvfp.sweep import runs

Choices = dict[str, dict[str, Any]]  # by kind and size, as text: choice, inside, trials
Groups = dict[str, list[Result]]  # runs by kind
Place = tuple[int, ...]  # on the axes
Axes = Mapping[str, Sequence[float]]  # by field, its values from the least to the largest

CVFP, SCALED, SETTLE = "CVFP, as published", "CVFP, own scales", "CVFP, first term alone"
RANDOM, RANDOM_SCALED = "random block, as published", "random block, own scales"
ZERO, SHUFFLED, WINDOW = "no contexts, n = {}", "shuffled contexts", "plain window"
JOINT, LSTM, TRANSFORMER = "end to end", "LSTM", "transformer"
TRAINED_TABLE, REMEMBER, NEXT = "CVFP, table trained on", "remember", "next token as target"
DELAY, DELAY_RANDOM = "delay line, PCA", "delay line, random"
FINE_TUNED = "remember, then end to end"
LEAKY, LEAKY_REMEMBER = "leaky block, untrained", "leaky block, remember"
LEAKY_JOINT = "leaky block, end to end"


@dataclass(frozen=True)
class Kind:
    """A kind of run: the fields in which it differs from the Experiment; those that it chooses for
    itself, by equally many trials; or the kind whose choice it shares."""

    fields: Mapping[str, Any]
    tuned: tuple[str, ...] = ()
    like: str | None = None


READ = toml("kinds")


def _kinds() -> dict[str, dict[str, Kind]]:
    """The kinds of kinds.toml, by group."""

    def kind(fields: dict[str, Any] | None = None, tuned: Sequence[str] = (), **like: str) -> Kind:
        fields = dict(fields or {})
        fields = {**PRESETS[fields.pop("preset", "mini")], **fields}
        names = [name for one in tuned for name in (SCALES if one == "scales" else (one,))]
        return Kind(fields, tuple(names), **like)

    return {g: {k: kind(**x) for k, x in rows.items()} for g, rows in READ["kinds"].items()}


SCALES = ("phase2_learning_rate", "context_std", "input_std", "token_block_std")
GROUPS: Mapping[str, Mapping[str, Kind]] = _kinds()
KINDS = {name: kind for group in GROUPS.values() for name, kind in group.items()}
# What notebook 09 may run, by name.
STUDIES: Mapping[str, Sequence[str]] = READ["studies"] | {k: list(GROUPS[k]) for k in GROUPS}
FREE = ("device", "precision", "seed")  # that choices hold for, whatever they are


def finished(file: Path, base: Experiment, choices: Choices, sizes: Sequence[int]) -> Groups:
    """The finished runs of each kind with these choices in a pack (`python -m cvfp pack`): on any
    device, in any precision, with any seed but those that chose. Raises `ParameterError`: none."""
    there = packs.results(file)
    free = {name: getattr(base, name) for name in FREE}
    groups: Groups = {}
    for kind in KINDS:
        chose = {row["seed"] for row in choices.get(KINDS[kind].like or kind, {}).values()}
        judge = [(r, r.experiment.replace(**free)) for r in there if r.experiment.seed not in chose]
        for size in dict.fromkeys(sizes):
            one = started(base.replace(samples=size), kind, choices, size).replace(**free)
            groups[kind] = groups.get(kind, []) + [run for run, same in judge if same == one]
    if not any(groups.values()):
        raise ParameterError("finished", str(file), "a pack with runs of these sizes and choices")
    return {kind: runs for kind, runs in groups.items() if runs}


def axes(names: Sequence[str], context_dim: int) -> Axes:
    """The values of these fields that may be tried. Scales go with 1/√D."""
    scales = [2.0**power / math.sqrt(context_dim) for power in range(-4, 4)]
    known = {**READ["axes"], **dict.fromkeys(READ["start"], scales)}
    return {name: [float(f"{value:.3g}") for value in known[name]] for name in names}


def search(
    experiment: Experiment, axes: Axes, trials: int, n_jobs: int = 1
) -> tuple[list[Result], bool]:
    """So many runs around the best so far, and whether the best is better than all its neighbours.

    From the values nearest to the Experiment's, the best place's neighbours along one axis after
    the other are tried, one value up and one down; where all its neighbours were, those of the next
    best, until the trials are used up (a compass search: Kolda, Lewis and Torczon 2003). A best
    value at the end of its axis is not bounded, unless it is 0: there is nothing less. Raises
    `ParameterError`: an Experiment whose epochs are not chosen on development conversations.
    `FloatingPointError`: all trials diverged."""
    if type(trials) is not int or trials < 1:
        raise ParameterError("trials", trials, "an integer of at least 1")
    if experiment.selection != "development":
        accepted = "'development', on which all is chosen"
        raise ParameterError("selection", experiment.selection, accepted)
    begin = [_nearest(values, getattr(experiment, name)) for name, values in axes.items()]
    done: dict[Place, Result | None] = {}
    wanted, turn = [tuple(begin)], 0
    while wanted:
        made = runs([_at(experiment, axes, place) for place in wanted], n_jobs)
        done |= zip(wanted, made, strict=True)
        order = sorted(done, key=lambda place: (_loss(done[place]), place))
        untried = (
            [place for place in pair if place not in done]
            for best in order
            for pair in _around(best, axes, turn)
        )
        wanted = next(filter(None, untried), [])[: trials - len(done)]
        turn += 1
    best = order[0]
    if done[best] is None:
        raise FloatingPointError(f"all {len(done)} trials diverged; accepted: smaller rates")
    tried = all(place in done for pair in _around(best, axes) for place in pair)
    placed = zip(axes.values(), best, strict=True)
    ends = [values[at] for values, at in placed if at in (0, len(values) - 1)]
    return [one for one in done.values() if one is not None], tried and not any(ends)


def choose(
    base: Experiment,
    sizes: Sequence[int],
    trials: int,
    *,
    file: Path | None = None,
    kinds: Sequence[str] = tuple(GROUPS["controls"]),
    n_jobs: int = 1,
) -> Choices:
    """Each kind's choice at these sizes: those in the file, and by `search` what it lacks, written
    to it. A search begins at the choice of the nearest size, if there is one. `base` has the seed
    and epochs of all; its `selection` is set."""
    choices, searched = read(file), []
    for size, kind in ((size, kind) for size in sizes for kind in kinds if KINDS[kind].tuned):
        one = base.replace(samples=size, selection="development")
        of = cache.digest({k: v for k, v in one.key_fields().items() if k not in FREE})
        if (row := choices.get(kind, {}).get(str(size))) is None:
            searched.append((kind, one, of))
        elif row.get("of", of) != of:
            accepted = f"choices of the same Experiment ({kind} at {size} is of another)"
            raise ParameterError("choices", str(file), accepted)
    work = sum(one.samples for _, one, _ in searched)
    with Whole("Choosing", trials * len(searched), trials * work):
        for kind, one, of in searched:
            there, names = choices.setdefault(kind, {}), KINDS[kind].tuned
            begin = experiment(one, kind, **(choice(choices, kind, one.samples) if there else {}))
            results, inside = search(begin, axes(names, base.context_dim), trials, n_jobs)
            best = min(results, key=_loss)
            rows = [{**_values(r, names), "dev_ppl": r.dev_ppl} for r in results]
            row = {"choice": _values(best, names), "dev_ppl": best.dev_ppl, "inside": inside}
            there[str(one.samples)] = {**row, "seed": base.seed, "of": of, "trials": rows}
            if file is not None:
                write(file, choices)
    return choices


def experiment(base: Experiment, kind: str, **choice: Any) -> Experiment:
    """The Experiment as a kind of run, with what was chosen; else where its search begins."""
    one, start = KINDS[kind], READ["start"].items()
    scales = {k: v / math.sqrt(base.context_dim) for k, v in start if k in one.tuned}
    return base.replace(**scales, **one.fields).replace(**choice)


def started(base: Experiment, kind: str, choices: Choices, samples: int) -> Experiment:
    """The Experiment as a kind of run with its choice; without one, where the search begins of the
    kind whose choices it takes."""
    own = KINDS[kind].like or kind
    chosen = choice(choices, kind, samples) if own in choices else {}
    begin = {name: getattr(experiment(base, own), name) for name in KINDS[own].tuned}
    return experiment(base, kind, **{**begin, **chosen})


def studied(studies: str) -> list[str]:
    """The kinds of `STUDIES`, the reference first; raises `ParameterError`: another name."""
    kinds = list(STUDIES["main"])
    for name in studies.split(","):
        if (name := name.strip()) not in STUDIES:
            raise ParameterError("studies", name, " or ".join(map(repr, STUDIES)))
        kinds += STUDIES[name]
    return list(dict.fromkeys(kinds))


def choice(choices: Choices, kind: str, samples: int) -> dict[str, Any]:
    """What a kind chose at the tuned size nearest to this one (by ratio); raises `ParameterError`:
    it was chosen for no size."""
    own = KINDS[kind].like or kind
    if not (sizes := choices.get(own, {})):
        raise ParameterError("choices", sorted(choices), f"choices for {kind!r}")
    nearest = min(sizes, key=lambda size: abs(math.log(int(size) / samples)))
    return {k: v for k, v in sizes[nearest]["choice"].items() if k in KINDS[own].tuned}


def _values(result: Result, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(result.experiment, name) for name in names}


def read(file: Path | None) -> Choices:
    """The choices in a file; none where there is none. Raises `ParameterError`: it is no such
    file."""
    if file is None or not file.exists():
        return {}
    try:
        read = dict(json.loads(file.read_text(encoding="utf-8")))
        rows = [row for by_size in read.values() for row in by_size.values()]
        if any(not isinstance(row["choice"], dict) or "seed" not in row for row in rows):
            raise ValueError("rows without a choice, or a seed")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        accepted = f"a file that cvfp.tuning wrote ({error})"
        raise ParameterError("choices", str(file), accepted) from None
    return read


def write(file: Path, choices: Choices) -> None:
    """Keep choices for others to read before they are judged."""
    with cache.whole(file) as temporary:
        text = json.dumps(choices, indent=1, sort_keys=True, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def _at(experiment: Experiment, axes: Axes, place: Place) -> Experiment:
    values = {name: axes[name][at] for (name, at) in zip(axes, place, strict=True)}
    return experiment.replace(**{k: type(getattr(experiment, k))(v) for k, v in values.items()})


def _around(place: Place, axes: Axes, first: int = 0) -> list[list[Place]]:
    """A place's neighbours along each axis, beginning with axis number `first`."""
    pairs = []
    for number, values in enumerate(axes.values()):
        moved = (place[number] + way for way in (1, -1))
        there = [at for at in moved if 0 <= at < len(values)]
        pairs.append([(*place[:number], at, *place[number + 1 :]) for at in there])
    first %= len(pairs)
    return pairs[first:] + pairs[:first]


def _nearest(values: Sequence[float], value: float) -> int:
    away = [abs(math.log((one + 1e-9) / (value + 1e-9))) for one in values]
    return away.index(min(away))


def _loss(result: Result | None) -> float:
    """Of the development conversations; infinite for a run that diverged."""
    return math.inf if result is None or result.dev_ppl is None else result.dev_ppl
