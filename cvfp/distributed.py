"""One run over several devices, by torchrun (docs/scale.md, *One run over several GPUs*).

A process, a *rank*, has one device. Phase 1: each has whole groups of the loss, and keeps their
contexts; gradients are summed before a step, and one context goes to the next rank. Phase 2: each
has every R-th position of every batch, and gets the contexts that it reads from the ranks that have
them: 1.5 kB a position at D = 768, little beside a step's gradients, where copies of all would not
fit. One device's results, up to the order of sums. Decisions are the first rank's.
"""

from __future__ import annotations

import atexit
import copy
import functools
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cvfp import controls, ops
from cvfp.config import Experiment, ParameterError
from cvfp.contexts import ENLARGED, SHORTEST_BLOCK, WARM_UP, Contexts, evaluate
from cvfp.inputs import TokenInputs
from cvfp.metrics import relative_errors
from cvfp.model import CVFP, Block
from cvfp.phase2 import Positions
from cvfp.registry import JOINTLY
from cvfp.share import Share

PATIENCE = timedelta(hours=2)  # for another rank, which may be counting words
LARGE = 2**22  # numbers from which a tensor is summed by itself, without a copy
TOLERANCE = 1e-5  # as in `contexts.evaluate`
AHEAD = 64  # a rank's warm-up is that part of its range: to be wrong would take twice as long
REFUSED: dict[str, tuple[Any, ...]] = {"model": ("lstm", "transformer"), "contexts": JOINTLY}
REFUSED |= {"phase1_step": ("group",), "phase1_fresh": (True,), "device": ("mps",)}


@functools.cache
def ranks() -> Ranks:
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


class Ranks(Share):
    """Rank `rank` of `size`. All call the same methods in the same order."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.losses: list[Tensor] = []  # this rank's part of a step's, until they are summed

    def check(self, one: Experiment, tokens: int = 0) -> None:
        """Refuse what several devices cannot share (`ParameterError`)."""
        for name, values in REFUSED.items() if self.size > 1 else ():
            if (got := getattr(one, name)) in values:
                usual = Experiment.__dataclass_fields__[name].default
                raise ParameterError(name, got, f"{usual!r} on {self.size} devices")
        unit, phase1 = min(one.loss_group, tokens), one.contexts in ("trained", "shuffled")
        if phase1 and tokens and math.ceil(tokens / unit) // self.size * unit < one.context_dim:
            words = f"so few of {tokens:,} tokens that {self.size} devices have context_dim each"
            raise ParameterError("loss_group", one.loss_group, words)

    def agreed(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on the first rank; the others do not call it."""
        box = [None if self.rank else make()]
        if self.size > 1:
            dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def same(self, model: nn.Module) -> None:
        """Give all ranks the first one's weights: a table may have been fitted on each machine."""
        for tensor in model.state_dict().values() if self.size > 1 else ():
            dist.broadcast(tensor, 0)

    def every(self, one: Tensor) -> Tensor:
        """Each rank's, [R, ...]."""
        made = one.new_empty(self.size, *one.shape)
        dist.all_gather([*made], one.contiguous())
        return made

    def own(self, total: int, unit: int) -> range:
        units = math.ceil(total / unit)
        ends = (min(total, units * r // self.size * unit) for r in (self.rank, self.rank + 1))
        return range(*ends)

    def before(self, last: Tensor) -> Tensor:
        return self.every(last)[self.rank - 1]

    def add(self, tensors: Iterable[Tensor | None]) -> None:
        there = [tensor for tensor in tensors if tensor is not None]
        small = [one for one in there if one.numel() < LARGE]
        flat = torch.cat([there[0].new_empty(0), *(one.reshape(-1) for one in small)])
        for one in [flat, *(one for one in there if one.numel() >= LARGE)]:
            dist.all_reduce(one)
        for one, total in zip(small, flat.split([one.numel() for one in small]), strict=True):
            one.copy_(total.view_as(one))

    def whole(self, rows: Tensor, own: range, total: int) -> Tensor:
        every = rows.new_zeros(total, *rows.shape[1:])
        every[own.start : own.stop] = rows
        dist.all_reduce(every)
        return every

    def draws(self, rest: Any, draw: torch.Generator, inputs: TokenInputs, one: Experiment) -> Any:
        """`rest` for Phase 1, with the generator moved past other ranks' draws of each [T, D]: a
        GPU's by its offset, which one draw of a size tells; a CPU's by drawing."""
        total, table, gpu = len(inputs), inputs.table, inputs.table.is_cuda
        own = self.own(total, unit := min(one.loss_group, total))
        others = [min(unit, total - i) for i in range(0, total, unit) if i not in own]
        first = own.start // unit

        def skip(groups: list[int]) -> None:
            for rows, count in Counter(groups).items():
                at, fresh = draw.get_offset() if gpu else 0, table.new_empty(rows, one.context_dim)
                for _ in range(1 if gpu else count):
                    fresh.normal_(generator=draw)
                if gpu:
                    draw.set_offset(at + count * (draw.get_offset() - at))

        def steps(*state: Any) -> Iterator[int]:
            for step in rest(*state):
                skip(others[first:] + others[:first])
                yield step

        skip(others[:first])
        return steps

    @torch.no_grad()
    def exact(self, block: Block, inputs: TokenInputs, whole: bool = True) -> Contexts:
        """`contexts.evaluate`, with a rank for a block once more: each evaluates its range from
        where a warm-up ends, and again if it is handed another start. Not `whole`: its own.
        The bound takes a start's error to last. Where blocks are short already each does all."""
        few = len(inputs) <= SHORTEST_BLOCK * ops.side_by_side(inputs.table.device)
        if self.size == 1 or (whole and few):
            return evaluate(block, inputs)
        own, start = self.own(len(inputs), 1), inputs.table.new_zeros(1, block.context_dim)
        if own.start:
            ahead = min(own.start, max(WARM_UP, len(own) // AHEAD))
            start = evaluate(block, inputs.first(ahead, own.start - ahead)).values[-1:]
        residuals: list[dict[str, float]] = []
        moved = [True]
        while any(moved) and len(residuals) <= self.size:
            made = evaluate(block, inputs.first(len(own), own.start), initial=start[0])
            came = self.before(made.values[-1:])
            handed = came if own.start else start
            told = [relative_errors(start, handed)[0], start.new_tensor(made.error_bound)]
            jumps, bounds = self.every(torch.stack(told)).T.tolist()
            residuals.append({"relative": max(jumps)})
            moved = [not jump <= TOLERANCE for jump in jumps]  # NaN, too
            start = handed if moved[self.rank] else start
        bound = math.inf if any(moved) else max(bounds) + ENLARGED * sum(jumps)
        rows: Any = made.values
        rows = self.whole(rows, own, len(inputs)) if whole else Shards(self, rows, own, start)
        count = len(residuals)
        steps = made.sweeps * count, made.steps * count
        return Contexts(rows, residuals, *steps, bound < math.inf, bound)

    def part(
        self, model: CVFP, one: Experiment, contexts: Any, tokens: Tensor, batch: int = 0
    ) -> Positions:
        """A stream's, of which this rank takes r, r + R, … of every `batch` (0: of all that are
        asked for at once). Batches are filled up with position 0 until all ranks have as many."""
        whole = controls.positions(model, contexts, tokens, one)
        if self.size == 1:
            return whole

        def mine(positions: Tensor) -> Tensor:
            batches = positions.split(batch or len(positions))
            filled = [F.pad(one, (0, -len(one) % self.size)) for one in batches]
            return torch.cat([one[self.rank :: self.size] for one in filled])

        def nats(hidden: Tensor, target: Tensor) -> Tensor:
            """The gradient is of this part's share in a batch's mean; `gradients` makes the value
            the whole mean."""
            count = len(range(self.rank, len(target), self.size))
            some = slice(max(1, count))  # of a part of none, what fills it up, times 0
            loss = model.nats(hidden[some], mine(target)[some]) * (count / len(target))
            self.losses.append(loss.detach())
            return loss

        def score(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            made = self.every(torch.stack(model.score(hidden, mine(target))))  # [R, 2, B / R]
            nats, correct = made.permute(1, 2, 0).flatten(1)[:, : len(target)]
            return nats, correct.bool()

        part, shared = copy.copy(whole), copy.copy(model)  # of the same parameters
        part.model, part.ranks = shared, self.size
        for name in ("previous", "outputs", "hidden"):
            method = getattr(whole, name)
            setattr(part, name, lambda at, *given, method=method: method(mine(at), *given))
        vars(shared).update(nats=nats, score=score)
        return part

    @contextmanager
    def gradients(self, model: nn.Module) -> Iterator[None]:
        """In here, what a backward pass leaves is summed over ranks: a large gradient while the
        next are computed, the others in one piece. A CUDA graph records that, too."""
        named = model.named_parameters() if self.size > 1 else ()
        moving = [p for n, p in named if p.requires_grad and not n.startswith("context_block.")]
        coming: list[Any] = []  # of each parameter that is done

        def done(parameter: Tensor) -> None:
            large = parameter.numel() >= LARGE
            coming.append(dist.all_reduce(parameter.grad, async_op=True) if large else None)
            if len(coming) == len(moving):
                self.add([*(p.grad for p in moving if p.numel() < LARGE), *self.losses])
                for one in filter(None, coming):
                    one.wait()
                coming.clear()
                self.losses.clear()

        hooks = [parameter.register_post_accumulate_grad_hook(done) for parameter in moving]
        yield
        for hook in hooks:
            hook.remove()


ALONE = Ranks(0, 1)


class Shards:
    """Contexts of which each rank has the rows `own`. To index them, which all do at once and with
    as many positions, is an exchange. like: a tensor on the device of the model that reads them."""

    def __init__(self, ranks: Ranks, rows: Tensor, own: range, like: Tensor) -> None:
        self.ranks, self.start, self.device = ranks, own.start, like.device
        short = max(0, rows.shape[1] - len(rows))  # as many values in a spectrum as on other ranks
        self.rows = F.pad(rows, (0, 0, 0, short)) if short else rows

    def numel(self) -> int:
        return 0  # here

    def __getitem__(self, positions: Tensor) -> Tensor:
        at = self.ranks.every(positions).flatten() - self.start  # what all ask for: [R·B]
        here = (at >= 0) & (at < len(self.rows))
        rows = self.rows[at.clamp(0, len(self.rows) - 1).to(self.rows.device)].to(at.device)
        rows = torch.where(here[:, None], rows, 0)
        came = torch.empty_like(rows)
        dist.all_to_all_single(came, rows)
        return came.view(self.ranks.size, len(positions), -1).sum(dim=0)  # one of them is not 0
