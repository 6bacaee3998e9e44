"""What tests/test_distributed.py has several processes do: `python devices.py FILE`, with the
environment that torchrun gives. Alone, the same is done by one."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from conftest import tiny_experiment
from test_phases import SMALL, make_model, make_tokens
from torch import Tensor

import cvfp
from cvfp import (
    Experiment,
    ParameterError,
    __main__,
    contexts,
    controls,
    ops,
    phase1,
    phase2,
    share,
)
from cvfp.experiment import joint
from cvfp.share import Ranks, Shards

# 1000 tokens in 15 groups of 64 and one of 40; batches of 32, in Phase 2 the last of a single one.
GROUPED, PREDICTED = 1000, 290
RUNS: dict[str, dict[str, Any]] = {
    "trained": dict(unlabelled_samples=2),
    "exact": dict(
        training_contexts="exact",
        weight_tying=False,
        freeze_embedding=False,
        selection="development",
        development_samples=2,
        phase2_batch_size=99,
    ),
    "shuffled": dict(contexts="shuffled", num_input_tokens=2, phase2_epochs=1),
    "zero": dict(contexts="zero", phase2_shuffle=False, phase2_epochs=1),
    "own source": dict(contexts="delay_random", phase2_epochs=1),
}
REFUSED: dict[str, dict[str, Any]] = {
    "model": dict(model="lstm"),
    "contexts": dict(contexts="end_to_end"),
    "phase1_step": dict(phase1_step="group"),
    "phase1_fresh": dict(phase1_fresh=True),
    "loss_group": dict(loss_group=10**6),
}


def experiment(**fields: Any) -> Experiment:
    given = dict(samples=4, validation_samples=1, embedding="random", convergence_rate=1.0)
    given |= dict(loss_group=500, fitting_samples=20)
    return tiny_experiment(**{**given, **fields})


def in_double(ranks: Ranks) -> dict[str, Any]:
    """Both phases and exact contexts in float64, where nothing but mistakes is to be seen."""
    fields: dict[str, Any] = dict(phase1_max_iterations=6, loss_group=64, phase1_noise=0.3)
    fields |= dict(convergence_rate=1.0, phase2_batch_size=32, phase2_epochs=3)
    one = Experiment(**SMALL, **fields)
    model, stream = make_model(tying=False, freeze=False).double(), make_tokens(GROUPED)
    with torch.no_grad():
        model.embedding.add_(ranks.rank)  # as if each machine had fitted a table
    model.load_state_dict(ranks.agreed(model.state_dict))
    inputs, draw = model.context_inputs(stream), torch.Generator().manual_seed(5)
    own, block = ranks.own(GROUPED, 64), model.context_block
    rest = ranks.draws(lambda steps, *state: steps, draw, inputs, one)
    first = phase1.train(block, inputs, one, draw, rest=rest, share=ranks)
    made: dict[str, Any] = {"phase1": first.history, "own": len(first.contexts)}
    made["contexts"] = ranks.whole(first.contexts, own, GROUPED)

    exact = joint(ranks, block, inputs)
    mine = joint(ranks, block, inputs, whole=False).values
    asked = torch.randperm(GROUPED, generator=torch.Generator().manual_seed(ranks.rank))[:100]
    assert torch.equal(mine[asked], exact.values[asked])
    made |= {"exact": exact.values, "converged": exact.converged, "bound": exact.error_bound}

    tokens = stream[:PREDICTED]
    shards = Shards(ranks, first.contexts, own, tokens) if ranks.size > 1 else first.contexts
    train = ranks.part(controls.positions(model, shards, tokens, one), 32)
    judge = ranks.part(controls.positions(model, exact.values[:100], tokens[:100], one))
    with ranks.gradients(model):
        second = phase2.train(train, judge, one, torch.Generator().manual_seed(2))
    made |= {"phase2": second.history, "nats": second.validation.nats}
    return made | {"weights": {k: v.detach() for k, v in model.named_parameters()}}


class Slow(torch.nn.Module):
    """Forgets a hundredth a token: no warm-up gets a start right."""

    context_dim = 10

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.map = torch.nn.Linear(8, 10).double()

    def forward(self, context: Tensor, inputs: Tensor) -> list[Tensor]:
        return [0.99 * context + self.map(inputs)]


class Grows(Slow):
    """Becomes infinite."""

    def forward(self, context: Tensor, inputs: Tensor) -> list[Tensor]:
        return [3.0 * context + self.map(inputs)]


def exactly(ranks: Ranks, block: Any) -> contexts.Contexts:
    inputs = make_model().double().context_inputs(make_tokens(GROUPED))
    return joint(ranks, block, inputs)


def runs(results: dict[str, Any]) -> None:
    """Every kind of run, its refusals, the store, the command line, and a run that is stopped."""
    for name, fields in RUNS.items():
        results[name] = cvfp.run(experiment(**fields), reuse=share.started().size > 1)
    if share.started().size == 1:
        return
    results["again"] = cvfp.run(experiment(**RUNS["trained"]))
    for name, fields in REFUSED.items():
        try:
            cvfp.run(experiment(**fields))
        except ParameterError as error:
            results[f"refused {name}"] = str(error)
    seen: list[float] = []

    def watch(row: dict[str, float]) -> bool:
        seen.append(row["phase"])
        return len(seen) == 2

    results["stopped"], results["seen"] = cvfp.run(experiment(seed=1), watch=watch), seen
    fields = experiment(**RUNS["trained"]).to_dict().items()
    said = [f"{k}={v}" for k, v in fields if v != Experiment().to_dict()[k]]
    command = mock.patch.object(sys, "argv", ["cvfp", "run", "mini", *said])
    with command, contextlib.redirect_stdout(io.StringIO()) as printed:
        __main__.main()
    results["printed"] = printed.getvalue()


def main(folder: Path, *parts: str) -> None:
    ranks = share.started()
    # Short streams are shared, too, and some of these small gradients are large ones.
    ops.placement.SIDE_BY_SIDE["cpu"], share.LARGE = 4, 150
    found: dict[str, Any] = {}
    if "double" in parts:
        found = in_double(ranks)
        found |= {"slow": exactly(ranks, Slow()), "grows": exactly(ranks, Grows())}
    if "runs" in parts:
        runs(found)
        for name, one in found.items():
            if isinstance(one, cvfp.Result):
                found[name] = {
                    **one.to_dict(),
                    "from_store": one.from_store,
                    "partial": one.partial,
                }
    torch.save(found, folder / f"{ranks.rank}.pt")


if __name__ == "__main__":
    # Another machine's home: nobody but the first rank needs one that can be written.
    os.environ["CVFP_HOME"] += os.environ["RANK"]
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
