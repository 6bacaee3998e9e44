"""Choosing fields on development conversations: equally many trials for all that is compared."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvfp import cache, packs
from cvfp.config import Experiment, ParameterError
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
TRAINED_TABLE = "CVFP, table trained on"


@dataclass(frozen=True)
class Kind:
    """A kind of run: the fields in which it differs from the Experiment; those that it chooses for
    itself, by equally many trials; or the kind whose choice it shares."""

    fields: Mapping[str, Any]
    tuned: tuple[str, ...] = ()
    like: str | None = None


_RATE, _RATE1, _DECAY = "phase2_learning_rate", "phase1_learning_rate", "weight_decay"
_SCALES = (_RATE, "context_std", "input_std", "token_block_std")
_PEER = (_RATE, "dropout", _DECAY, "unroll")
KINDS: Mapping[str, Kind] = {
    CVFP: Kind({}, (_RATE, _RATE1, _DECAY)),
    SCALED: Kind({}, _SCALES),
    SETTLE: Kind({"objective": "settle"}, _SCALES),
    RANDOM: Kind({"contexts": "random"}, (_RATE, _DECAY)),
    RANDOM_SCALED: Kind({"contexts": "random"}, _SCALES),
    **{
        ZERO.format(n): Kind(
            {"contexts": "zero", "num_input_tokens": n}, (_RATE, "token_block_std", _DECAY)
        )
        for n in (1, 2, 3, 4)
    },
    WINDOW: Kind(
        {"contexts": "window", "window_tokens": 2},
        (_RATE, "token_block_std", "window_tokens", _DECAY),
    ),
    SHUFFLED: Kind({"contexts": "shuffled"}, like=SCALED),
    JOINT: Kind({"contexts": "end_to_end"}, (*_SCALES, *_PEER[1:])),
    LSTM: Kind({"model": "lstm"}, _PEER),
    TRANSFORMER: Kind({"model": "transformer"}, _PEER),
    TRAINED_TABLE: Kind({"freeze_embedding": False}, _SCALES),
}
FREE = ("device", "precision", "seed")  # that choices hold for, whatever they are
# Where a search begins: the middle of what a first look found good.
START = {"context_std": 0.5, "input_std": 2.0, "token_block_std": 1.0}  # times 1/√D


def finished(file: Path, base: Experiment, choices: Choices, sizes: Sequence[int]) -> Groups:
    """The finished runs of each kind with these choices that a pack holds (`python -m cvfp pack`),
    in place of running them: on another device, in whatever precision, with any seed but those
    that chose."""
    there = packs.results(file)
    groups: Groups = {}
    for kind in KINDS:
        chose = {row["seed"] for row in choices.get(KINDS[kind].like or kind, {}).values()}
        for size in dict.fromkeys(sizes) if chose else ():
            chosen = choice(choices, kind, size)
            one = experiment(base.replace(samples=size), kind, **chosen)
            found = [r for r in there if _is(r.experiment, one)]
            found = [r for r in found if r.experiment.seed not in chose]
            groups[kind] = groups.get(kind, []) + found
    return {kind: runs for kind, runs in groups.items() if runs}


def _is(run: Experiment, one: Experiment) -> bool:
    free = dict(device=one.device, precision=one.precision, seed=one.seed)
    return run.replace(**free) == one


def axes(names: Sequence[str], context_dim: int) -> Axes:
    """The values of these fields that may be tried. Scales go with 1/√D."""
    scales = [2.0**power / math.sqrt(context_dim) for power in range(-4, 4)]
    known: dict[str, Sequence[float]] = {
        "phase2_learning_rate": [x * 10**p for p in (-5, -4, -3, -2) for x in (1, 2, 5)],
        "phase1_learning_rate": [x * 10**p for p in (-5, -4, -3, -2) for x in (1, 2, 5)],
        **dict.fromkeys(("context_std", "input_std", "token_block_std"), scales),
        "dropout": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5],
        "weight_decay": [0.0, 0.01, 0.03, 0.1, 0.3, 1.0],
        "unroll": [8, 16, 32, 64, 128],
        "window_tokens": [1, 2, 3, 4, 6, 8, 12, 16, 24, 32],
    }
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
    inside = tried and not any(
        values[at] and at in (0, len(values) - 1)
        for values, at in zip(axes.values(), best, strict=True)
    )
    return [one for one in done.values() if one is not None], inside


def choose(
    base: Experiment,
    sizes: Sequence[int],
    trials: int,
    *,
    file: Path | None = None,
    kinds: Sequence[str] = tuple(KINDS),
    n_jobs: int = 1,
) -> Choices:
    """Each kind's choice at these sizes: those in the file, and by `search` what it lacks, written
    to it. A search begins at the choice of the nearest size, if there is one. `base` has the seed
    and epochs of all; its `selection` is set."""
    choices = read(file)
    searched = [(size, kind) for size in sizes for kind in kinds if KINDS[kind].tuned]
    for size, kind in searched:
        there = choices.setdefault(kind, {})
        one = base.replace(samples=size, selection="development")
        of = cache.digest({k: v for k, v in one.key_fields().items() if k not in FREE})
        if (row := there.get(str(size))) is not None:
            if row.get("of", of) != of:
                accepted = f"choices of the same Experiment ({kind} at {size} is of another)"
                raise ParameterError("choices", str(file), accepted)
            continue
        begin = experiment(one, kind, **(choice(choices, kind, size) if there else {}))
        names = KINDS[kind].tuned
        results, inside = search(begin, axes(names, base.context_dim), trials, n_jobs)
        best = min(results, key=_loss)
        rows = [{**_values(r, names), "dev_ppl": r.dev_ppl} for r in results]
        row = {"choice": _values(best, names), "dev_ppl": best.dev_ppl, "inside": inside}
        there[str(size)] = {**row, "seed": base.seed, "of": of, "trials": rows}
        if file is not None:
            write(file, choices)
    return choices


def experiment(base: Experiment, kind: str, **choice: Any) -> Experiment:
    """The Experiment as a kind of run, with what was chosen; else where its search begins."""
    one = KINDS[kind]
    scales = {k: v / math.sqrt(base.context_dim) for k, v in START.items() if k in one.tuned}
    return base.replace(**scales, **one.fields).replace(**choice)


def choice(choices: Choices, kind: str, samples: int) -> dict[str, Any]:
    """What a kind chose at the tuned size nearest to this one (by ratio); raises `ParameterError`:
    it was chosen for no size."""
    sizes = choices.get(KINDS[kind].like or kind, {})
    if not sizes:
        raise ParameterError("choices", sorted(choices), f"choices for {kind!r}")
    nearest = min(sizes, key=lambda size: abs(math.log(int(size) / samples)))
    tuned = KINDS[KINDS[kind].like or kind].tuned
    return {name: value for name, value in sizes[nearest]["choice"].items() if name in tuned}


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
    return min(
        range(len(values)), key=lambda at: abs(math.log((values[at] + 1e-9) / (value + 1e-9)))
    )


def _loss(result: Result | None) -> float:
    """Of the development conversations; infinite for a run that diverged."""
    return math.inf if result is None or result.dev_ppl is None else result.dev_ppl
