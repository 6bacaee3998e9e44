"""One run over several devices, by torchrun (docs/scale_devices.md).

A process, a *rank*, has one device. Phase 1: each has whole groups of the loss, and keeps their
contexts. Phase 2: each has every R-th position of every batch, and gets the contexts that it reads
from the ranks that have them. One device's results, up to the order of sums.
"""

from __future__ import annotations

import atexit
import copy
import functools
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cvfp.errors import ParameterError

PATIENCE = timedelta(hours=2)  # for another rank, which may be counting words
LARGE = 2**22  # numbers from which a gradient is summed by itself, at once


class Ranks:
    """Rank `rank` of `size`. All call the same methods in the same order; one alone has all."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def own(self, total: int, unit: int) -> range:
        """Its rows of `total`: whole units, the last of which may be smaller; no rank has none."""
        if (units := math.ceil(total / unit)) < self.size:
            words = f"so few of {total:,} tokens that each of {self.size} devices has a group"
            raise ParameterError("loss_group", unit, words)
        ends = (min(total, units * r // self.size * unit) for r in (self.rank, self.rank + 1))
        return range(*ends)

    def agreed(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on the first rank; the others do not call it."""
        box = [None if self.rank else make()]
        if self.size > 1:
            dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def whole(self, rows: Tensor, own: range, total: int) -> Tensor:
        """All rows, given its own."""
        if self.size == 1:
            return rows
        every = rows.new_zeros(total, *rows.shape[1:])
        every[own.start : own.stop] = rows
        dist.all_reduce(every)
        return every

    def every(self, one: Tensor) -> Tensor:
        """Each rank's, [R, ...]."""
        return self.whole(one[None], range(self.rank, self.rank + 1), self.size)

    def add(self, tensors: Iterable[Tensor | None]) -> None:
        """Replace each tensor by its sum over the ranks, in one piece."""
        if self.size > 1:
            there = [one for one in tensors if one is not None]
            flat = torch.cat([one.flatten() for one in there])
            dist.all_reduce(flat)
            for one, total in zip(there, flat.split([one.numel() for one in there]), strict=True):
                one.copy_(total.view_as(one))

    def draws(self, rest: Any, draw: torch.Generator, inputs: Any, one: Any) -> Any:
        """`rest` for Phase 1 of an Experiment, in which this rank draws the others' initial
        contexts and noise, too, in one device's order, and throws them away."""
        total, unit, width = len(inputs), one.loss_group, one.context_dim
        own = self.own(total, unit)

        def skip(*starts: int) -> None:
            for start in starts:
                inputs.table.new_empty(min(unit, total - start), width).normal_(generator=draw)

        def steps(*state: Any) -> Iterator[int]:
            for step in rest(*state):
                skip(*range(own.stop, total, unit), *range(0, own.start, unit))
                yield step

        skip(*range(0, own.start, unit))
        return steps if one.phase1_noise else rest

    def part(self, whole: Any, batch: int = 0) -> Any:
        """Of `phase2.Positions` r, r + R, … of every `batch` (0: of all that are asked for at
        once). Batches are filled up with position 0 until all ranks have as many."""
        if self.size == 1:
            return whole
        model, part, shared = whole.model, copy.copy(whole), copy.copy(whole.model)

        def mine(positions: Tensor) -> Tensor:
            batches = positions.split(batch or len(positions))
            filled = [F.pad(one, (0, -len(one) % self.size)) for one in batches]
            return torch.cat([one[self.rank :: self.size] for one in filled])

        def nats(hidden: Tensor, target: Tensor) -> Tensor:
            count = len(target[self.rank :: self.size])
            some = slice(max(1, count))  # of a part of none, what fills it up, times 0
            loss: Tensor = model.nats(hidden[some], mine(target)[some]) * (count / len(target))
            dist.all_reduce(loss.detach())  # the value is the batch's; the gradient is this part's
            return loss

        def score(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            made = self.every(torch.stack(model.score(hidden, mine(target))))  # [R, 2, B / R]
            nats, correct = made.permute(1, 2, 0).flatten(1)[:, : len(target)]
            return nats, correct.bool()

        part.model, part.ranks = shared, self.size
        for name in ("previous", "outputs", "hidden"):
            method = getattr(whole, name)
            setattr(part, name, lambda at, *given, method=method: method(mine(at), *given))
        vars(shared).update(nats=nats, score=score)
        return part

    @contextmanager
    def gradients(self, model: nn.Module) -> Iterator[None]:
        """In here, what Phase 2's backward pass leaves is summed over ranks: a large gradient while
        the next are computed, the others in one piece. A CUDA graph records that, too."""
        named = model.named_parameters() if self.size > 1 else ()
        moving = [p for n, p in named if p.requires_grad and not n.startswith("context_block.")]
        coming: list[Any] = []  # of each parameter that is done

        def done(p: Tensor) -> None:
            coming.append(dist.all_reduce(p.grad, async_op=True) if p.numel() >= LARGE else None)
            if len(coming) == len(moving):
                self.add(p.grad for p in moving if p.numel() < LARGE)
                for one in filter(None, coming):
                    one.wait()
                coming.clear()

        hooks = [p.register_post_accumulate_grad_hook(done) for p in moving]
        yield
        for hook in hooks:
            hook.remove()


ALONE = Ranks(0, 1)


@functools.cache
def started() -> Ranks:
    """This process among those that torchrun started, or alone."""
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return ALONE
    if gpus := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast is not there on every host
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
        # After an error the others may be waiting for a sum: torchrun ends them.
        atexit.register(lambda: hasattr(sys, "last_value") or dist.destroy_process_group())
    if dist.get_rank():
        os.environ["CVFP_PROGRESS"] = "none"
        warnings.filterwarnings("ignore")
    return Ranks(dist.get_rank(), dist.get_world_size())


class Shards:
    """Contexts of `tokens`, of which each rank has the rows `own`. To index them, which all do at
    once and with as many positions, is an exchange; to split them is not."""

    def __init__(self, share: Ranks, rows: Tensor, own: range, tokens: Tensor) -> None:
        self.share, self.rows, self.start, self.device = share, rows, own.start, tokens.device
        self.shape = len(tokens), rows.shape[1]
        self.split = rows[: max(0, len(tokens) - own.start)].split
        self.numel = lambda: 0  # here

    def __getitem__(self, positions: Tensor) -> Tensor:
        at = self.share.every(positions).flatten() - self.start  # what all ask for: [R·B]
        here = (at >= 0) & (at < len(self.rows))
        rows = self.rows[(at * here).to(self.rows.device)].to(at.device) * here[:, None]
        came = torch.empty_like(rows)
        dist.all_to_all_single(came, rows)
        return came.view(self.share.size, len(positions), -1).sum(dim=0)  # one of them is not 0
