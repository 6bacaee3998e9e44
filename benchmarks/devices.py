"""One run on several devices against one of them, in turn, in the same processes.

    torchrun --nproc-per-node 2 -m benchmarks.devices [--tokens 2000000] [--vocab 50257]
        [--batches 4096,16384] [--repeats 3] [--out FILE] [field=value ...]

The preset `published_size` on synthetic tokens (half follow from the token before, half are drawn
by Zipf's law) and a random table, so that nothing is fitted or fetched. In a turn of one device
the others wait. Timed are an iteration of Phase 1, exact contexts of the whole stream, and an epoch
of Phase 2 for each size of batch, each after a first that is not counted; a device is waited for
before its clock is read. Prints JSON: seconds of each turn, medians, the pairs' median ratio, and
what came out on one and on all.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cvfp import Experiment, controls, phase1, phase2, seeds, share
from cvfp.build import build_cvfp
from cvfp.experiment import joint
from cvfp.model import CVFP
from cvfp.share import ALONE, Ranks, Shards
from cvfp.watch import device_name

SHORT = 20_000  # tokens of validation


def stream(tokens: int, vocab: int) -> Tensor:
    """Tokens [T] by a fixed rule: the same for every process."""
    draw = torch.Generator().manual_seed(0)
    zipf = (1 / torch.arange(1, vocab + 1, dtype=torch.float64)).cumsum(0)
    drawn = torch.searchsorted(zipf / zipf[-1], torch.rand(tokens, generator=draw).double())
    after = torch.randperm(vocab, generator=draw)
    follows = torch.rand(tokens, generator=draw) < 0.5
    follows[0] = False
    # One that follows has before it another that was drawn, or follows in its turn: 32 at most.
    for _ in range(32):
        drawn[1:] = torch.where(follows[1:], after[drawn[:-1]], drawn[1:])
    return drawn


class Bench:
    """One setting on these devices."""

    def __init__(self, one: Experiment, tokens: int, vocab: int) -> None:
        self.exp, self.everyone = one.resolved(), share.started()
        self.device = torch.device(self.exp.device)
        every = stream(tokens + SHORT, vocab).to(self.device)
        self.train, self.val = every[:tokens], every[tokens:]
        draw = torch.Generator().manual_seed(1)
        assert self.exp.embedding_dim is not None
        self.table = torch.empty(vocab, self.exp.embedding_dim).normal_(generator=draw)

    def turn(self, ranks: Ranks, batches: list[int]) -> dict[str, Any]:
        """Seconds of every part on these ranks, and its figures."""
        gc.collect()
        model, draw = self.model(), self.draw("phase1")
        inputs = model.context_inputs(self.train)
        rest = ranks.draws(lambda steps, *state: steps, draw, inputs, self.exp)
        ends: list[float] = []
        report = self.stamp(ends)
        first = phase1.train(model.context_block, inputs, self.exp, draw, report, rest, ranks)
        made: dict[str, Any] = {"phase1_iteration": (ends[-1] - ends[0]) / (len(ends) - 1)}
        made["phase1_loss"] = first.history[-1]["loss"]

        joint(ranks, model.context_block, inputs.first(SHORT))
        start = self.now()
        exact = joint(ranks, model.context_block, inputs, whole=False)
        made["contexts"] = self.now() - start
        made |= {"contexts_sweeps": exact.sweeps, "contexts_converged": exact.converged}
        del exact

        judged = joint(ranks, model.context_block, model.context_inputs(self.val)).values
        rows: Any = first.contexts
        if ranks.size > 1:
            own = ranks.own(len(self.train), self.exp.loss_group)
            rows = Shards(ranks, rows, own, self.train)
        block = model.context_block.state_dict()
        for size in batches:
            model, exp = self.model(), self.exp.replace(phase2_batch_size=size)
            model.context_block.load_state_dict(block)
            train = ranks.part(controls.positions(model, rows, self.train, exp), size)
            choosing = ranks.part(controls.positions(model, judged, self.val, exp))
            ends.clear()
            with ranks.gradients(model):
                second = phase2.train(train, choosing, exp, self.draw("batches", "cpu"), report)
            made[f"phase2_epoch_{size}"] = (ends[-1] - ends[0]) / (len(ends) - 1)
            made[f"phase2_ppl_{size}"] = second.history[-1]["val_ppl"]
        return made

    def model(self) -> CVFP:
        return build_cvfp(self.exp, self.table.to(self.device))

    def draw(self, purpose: Any, device: str | None = None) -> torch.Generator:
        return seeds.generator(self.exp.seed, purpose, device or self.exp.device)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def stamp(self, ends: list[float]) -> Callable[[dict[str, float]], None]:
        return lambda row: ends.append(self.now())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--vocab", type=int, default=50_257)
    parser.add_argument("--batches", default="4096,16384")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("fields", nargs="*")
    given = parser.parse_args()
    batches = [int(size) for size in given.batches.split(",")]
    fixed: dict[str, Any] = dict(phase1_max_iterations=6, phase1_stop="never", phase2_epochs=3)
    fixed |= dict(phase2_patience=3, selection="validation")
    fixed |= dict(field.split("=", 1) for field in given.fields)
    bench = Bench(Experiment.preset("published_size", **fixed), given.tokens, given.vocab)
    turns: dict[str, list[dict[str, Any]]] = {"one": [], "all": []}
    for turn in range(given.repeats + 1):
        for name, ranks in (("one", ALONE), ("all", bench.everyone)):
            made = {} if name == "one" and bench.everyone.rank else bench.turn(ranks, batches)
            if bench.everyone.size > 1:  # the others wait for the one
                dist.broadcast_object_list([None], 0, device=torch.device("cpu"))
            if turn:
                turns[name].append(made)
            if not bench.everyone.rank:
                print(f"{name}: {made}", file=sys.stderr, flush=True)
    if bench.everyone.rank:
        return
    timed = ["phase1_iteration", "contexts", *(f"phase2_epoch_{size}" for size in batches)]
    found: dict[str, Any] = {
        "devices": bench.everyone.size,
        "device": device_name(bench.exp.device),
        "torch": torch.__version__,
        "tokens": given.tokens,
        "precision": bench.exp.precision,
        "turns": turns,
        "median": {
            name: {part: statistics.median(made[part] for made in each) for part in timed}
            for name, each in turns.items()
        },
        "ratio": {
            part: statistics.median(
                one[part] / every[part] for one, every in zip(*turns.values(), strict=True)
            )
            for part in timed
        },
    }
    text = json.dumps(found, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
