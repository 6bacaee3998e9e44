"""Phase 2: next-token prediction on fixed contexts (SPEC §4)."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cvfp import memory
from cvfp.config import Experiment
from cvfp.metrics import perplexity
from cvfp.model import (
    CVFP,
    Predictor,
    TokenInputs,
    TokenStep,
    exact_product,
    looped,
    product_type,
)
from cvfp.optimiser import Adam

if TYPE_CHECKING:
    from cvfp.kernels import Room

# Logits held at once when evaluating: in the cache on a CPU, enough to fill a GPU.
EVALUATION_LOGITS = {"cpu": 2**21, "cuda": 2**27, "mps": 2**24}
# Tokens that go through the frozen ContextBlock at once: a few batches, since small products cost a
# CPU as much as larger ones.
CHUNK = {"cpu": 2**13, "cuda": 2**14, "mps": 2**14}
# Steps of training from which recording one pays.
WORTH_RECORDING = 50
# A GPU's matrix units work in tiles: in bfloat16 50,257 logits cost more than 50,304.
TILE = {"cpu": 1, "cuda": 64, "mps": 1}


@dataclass
class Evaluation:
    """Per-token results on a stream of T tokens: position t predicts token t+1."""

    nats: Tensor  # [T-1], float64, cross-entropy of each predicted token
    correct: Tensor  # [T-1], bool, whether the likeliest token was right

    @property
    def loss(self) -> float:
        return float(self.nats.mean())

    @property
    def accuracy(self) -> float:
        return float(self.correct.double().mean())


@dataclass
class Phase2:
    """What Phase 2 leaves; the model holds the weights of the best epoch.

    Attributes:
        best_epoch: counted from 1, by validation loss.
        train_loss: mean nats per token while training in the best epoch (weights moving).
        validation: the best epoch's evaluation.
        history: one dict per epoch: epoch, train_loss, train_ppl, val_loss, val_ppl, val_acc.
    """

    best_epoch: int
    train_loss: float
    validation: Evaluation
    history: list[dict[str, float]] = field(default_factory=list)


class Positions:
    """Positions of a stream with all that predicting the next token takes: contexts and tokens.

    Args:
        contexts: [T, D], float32 or bfloat16; position t reads row t-1, and zeros at t = 0. Not
            necessarily on the model's device.
        tokens: int64 [T], on the model's device.
        precision: of the products.

    Raises:
        ValueError: contexts that end before the stream, or a token that the table has no row for.
    """

    def __init__(
        self, model: CVFP, contexts: Tensor, tokens: Tensor, precision: str = "float32"
    ) -> None:
        if contexts.numel() and len(contexts) < len(tokens) - 2:  # the last that is read
            raise ValueError(
                f"contexts: got {len(contexts)} rows; accepted: {len(tokens)}, as many as tokens"
            )
        self.model, self.contexts, self.tokens = model, contexts.contiguous(), tokens
        self.room: Room | None = None
        self.context_inputs = model.context_inputs(tokens)
        self.total = len(tokens) - 1  # the last token has no successor
        self.dtype = product_type(precision, self.context_inputs.table)
        with torch.no_grad():
            self.layers = model.context_block.layers(self.dtype)

    def reads(self, positions: Tensor) -> Tensor:
        """The contexts that `positions` read: [B, D], on the model's device."""
        if self.room is not None and self.contexts.device.type == "cpu":
            from cvfp import kernels

            size = len(positions), self.contexts.shape[1]
            place = self.room("contexts", size, self.contexts.dtype)
            return kernels.gather(self.contexts, (positions - 1)[:, None], place)
        source = (positions - 1).clamp(min=0)
        if self.contexts.device == positions.device:
            rows = self.contexts.index_select(0, source)
        else:
            rows = self.contexts.index_select(0, source.to(self.contexts.device))
            rows = rows.to(positions.device)
        return rows.mul_((positions > 0)[:, None])

    def outputs(self, positions: Tensor, reads: Tensor, seen: Tensor) -> list[Tensor]:
        """What the TokenBlock reads as c^(i) at `positions`, where the ContextBlock reads `reads`
        [B, D] and sees `seen` [B, n·E]: [B, widths[i]] each, or with columns beside it for the
        TokenBlock."""
        block, beside = self.model.context_block, self.model.token_block.reads
        if self.room is None:
            made, _ = block.outputs(reads, seen, self.layers)
            return [output.rounded for output in made]
        return block.outputs(reads, seen, self.layers, room=self.room, beside=beside)[1][1:]

    @torch.no_grad()
    def fixed(self, positions: Tensor, reads: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """What training does not change: e [B, n·E] as the ContextBlock sees it, and its outputs.
        While memory is reused, there is e beside the first, and room for h beside the others.

        Args:
            reads: the contexts that `positions` read, if they are at hand.
        """
        seen = self.context_inputs.dense(positions, self.room)
        reads = self.reads(positions) if reads is None else reads
        outputs = self.outputs(positions, reads, seen)
        if self.room is None:
            return seen, outputs
        joined, model = [], self.model
        widths = zip(outputs, model.context_widths, model.token_block.reads, strict=True)
        for i, (output, width, read) in enumerate(widths):
            if output.shape[1] == width:
                size = len(output), width + read
                joined.append(self.room.of("token layer", i)("both", size, self.dtype))
                joined[-1][:, :width].copy_(output)
            else:
                joined.append(output)
        joined[0][:, model.context_widths[0] :][:, : seen.shape[1]].copy_(seen)
        return seen, joined

    def hidden(
        self,
        positions: Tensor,
        inputs: TokenInputs,
        fixed: tuple[Tensor, list[Tensor]] | None = None,
    ) -> Tensor:
        """h [B, E] at `positions`.

        Args:
            inputs: what the TokenBlock reads.
            fixed: of `positions`, if it is at hand.
        """
        seen, outputs = fixed or self.fixed(positions)
        e = seen
        if self.model.context_table is not None:
            e = inputs.dense(positions)
            if self.room is not None:
                width = self.model.context_widths[0]
                outputs[0][:, width : width + e.shape[1]].copy_(e.detach())
        return self.model.token_block(outputs, e, self.dtype, self.room)

    @contextmanager
    def reusing(self) -> Iterator[None]:
        """On a CPU, take the same memory every time, until the outermost of these ends: what
        `reads`, `fixed` and `hidden` make is for use before they are next called. Fresh memory
        costs as much as what is done with it."""
        before = self.room
        if before is None and looped(self.context_inputs.table):
            from cvfp import kernels

            self.room = kernels.Room()
        try:
            yield
        finally:
            self.room = before

    def logits(self, positions: Tensor, inputs: TokenInputs) -> Tensor:
        """[B, V] at `positions`."""
        return self.model.logits(self.hidden(positions, inputs))

    def token_inputs(self) -> TokenInputs:
        """e_t from the table as it is now; the graph reaches the table if it is being trained."""
        if self.model.context_table is None:
            return self.context_inputs
        return TokenInputs(self.tokens, self.model.embedding, self.model.num_input_tokens)


class NextToken:
    """Mean nats of the tokens that follow, through the model's head, with gradients by hand.

    Softmax minus one-hot is the gradient of the logits, so one softmax serves loss and gradient,
    in the type of the products: float32 logits would be most of the memory that a step moves. The
    two [B, V] buffers are kept, since fresh ones cost as much as the softmax.

    A tied head that is not trained needs its logits on a CPU for a moment only: they become the
    softmax's weights in their place, and weigh the table's rows (`kernels.table_loss`).

    Args:
        rows: most positions in a batch.
    """

    def __init__(self, model: Predictor, rows: int, precision: str) -> None:
        self.model, self.rows = model, rows
        weight = model.embedding if model.head is None else model.head.weight
        device = weight.device.type
        self.dtype = product_type(precision, weight)
        self.weighs = looped(weight) and model.head is None and not weight.requires_grad
        tile = TILE[device] if self.dtype == torch.bfloat16 and not self.weighs else 1
        size = math.ceil(len(weight) / tile) * tile
        # Weights as the product takes them. What fills the last tile has no share in a softmax.
        self.weight: Tensor = torch.zeros(
            size, weight.shape[1], dtype=self.dtype, device=weight.device
        )
        self.bias = None
        if model.head is not None or size > len(weight):
            self.bias = torch.zeros(size, dtype=self.dtype, device=weight.device)
            self.bias[len(weight) :] = -math.inf
        self.refresh()
        self.longest = float(torch.linalg.vector_norm(self.weight.float(), dim=1).max())
        self.room: Room | None = None
        self.logits = self.shares = self.weight.new_empty(0, 0)

    def refresh(self) -> None:
        """Take the weights as they are now."""
        head = self.model.head
        weight = self.model.embedding if head is None else head.weight
        self.weight[: len(weight)].copy_(weight.detach())
        if head is not None and self.bias is not None:
            self.bias[: len(weight)].copy_(head.bias.detach())

    def with_gradient(self, query: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Where `weighs`: nats of `target` [B] and the gradient of their mean [B, E], for h [B, E]
        in the type of the products."""
        from cvfp import kernels

        self.room = self.room or kernels.Room()
        return kernels.table_loss(query, self.weight, self.longest, target, self.room)

    def loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Of `target` [B], from h [B, E]."""
        if self.weighs:
            return _TableLoss.apply(hidden, target, self)
        head = self.model.head
        weight, bias = (self.model.embedding, None) if head is None else (head.weight, head.bias)
        if weight.requires_grad:
            self.refresh()
        if not len(self.logits):
            self.logits = self.weight.new_empty(self.rows, len(self.weight))
            self.shares = torch.empty_like(self.logits)
        return _SoftmaxLoss.apply(hidden, weight, bias, target, self)


class _TableLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, target: Tensor, head: NextToken) -> Tensor:
        nats, gradient = head.with_gradient(hidden.to(head.dtype), target)
        ctx.save_for_backward(gradient)
        return nats.mean()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient if float(upstream) == 1 else gradient * upstream, None, None


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        head: NextToken,
    ) -> Tensor:
        rows = len(hidden)
        logits, shares = head.logits[:rows], head.shares[:rows]
        with torch.autocast(hidden.device.type, enabled=False):
            read = hidden.to(head.dtype)
            if head.bias is None:
                torch.mm(read, head.weight.T, out=logits)
            else:
                torch.addmm(head.bias, read, head.weight.T, out=logits)
            torch.softmax(logits, dim=1, out=shares)
        right = shares.gather(1, target[:, None])
        shares.scatter_add_(1, target[:, None], torch.full_like(right, -1.0))
        ctx.save_for_backward(hidden)
        ctx.head, ctx.shares, ctx.vocab_size = head, shares, len(weight)
        # A share too small for its type counts as the smallest there is.
        return -right.float().clamp(min=torch.finfo(torch.float32).tiny).log().mean()

    @staticmethod
    def backward(
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        (hidden,) = ctx.saved_tensors
        head, shares = ctx.head, ctx.shares
        scale = upstream / len(hidden)
        for_weight = for_bias = None
        with torch.autocast(hidden.device.type, enabled=False):
            for_hidden = exact_product(shares, head.weight, hidden.dtype).mul_(scale)
            if ctx.needs_input_grad[1]:
                read = (hidden * scale).to(head.dtype)
                for_weight = exact_product(shares.T, read, hidden.dtype)[: ctx.vocab_size]
            if ctx.needs_input_grad[2]:
                for_bias = shares.sum(0, dtype=hidden.dtype)[: ctx.vocab_size] * scale
        return for_hidden, for_weight, for_bias, None, None


@torch.no_grad()
def evaluate(stream: Positions) -> Evaluation:
    """Float32 evaluation of a stream of at least two tokens."""
    inputs = stream.token_inputs()
    with stream.reusing():
        return judge(
            stream.model, stream.tokens, lambda positions: stream.hidden(positions, inputs)
        )


@torch.no_grad()
def judge(model: Predictor, tokens: Tensor, hidden: Callable[[Tensor], Tensor]) -> Evaluation:
    """Float32 evaluation of h [B, E] at positions [B]: all of a stream but the last."""
    nats, correct = [], []
    room: Tensor | None = None
    device = tokens.device
    batch = max(1, EVALUATION_LOGITS[device.type] // len(model.embedding))
    for positions in torch.arange(len(tokens) - 1, device=device).split(
        max(batch, CHUNK[device.type])
    ):
        targets = tokens[positions + 1].split(batch)
        for some, target in zip(hidden(positions).split(batch), targets, strict=True):
            if room is None:  # one for all: a fresh one costs a CPU as much as the product
                room = some.new_empty(batch, len(model.embedding))
            logits = model.logits(some, room[: len(some)])
            if looped(logits):
                from cvfp import kernels

                found = kernels.judged(logits, target)
            else:
                found = _judged(logits, target)
            nats.append(found[0])
            correct.append(found[1])
    return Evaluation(torch.cat(nats).cpu().double(), torch.cat(correct).cpu())


def _judged(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `target` [B] under `logits` [B, V], which are lost, and whether its logit is
    above all others."""
    target = target[:, None]
    right = logits.gather(1, target)
    others = logits.scatter_(1, target, -math.inf).amax(dim=1, keepdim=True)
    # Once the target's own logit is apart: log(Σ exp) − right, in place.
    largest = torch.maximum(others, right)
    rest = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
    nats = (rest + (right - largest).exp()).log() + (largest - right)
    return nats.squeeze(1), (right > others).squeeze(1)


def train(
    train: Positions,
    validation: Positions,
    experiment: Experiment,
    generator: torch.Generator,
    report: Callable[[dict[str, float]], None] = lambda row: None,
    tick: Callable[[int], None] = lambda tokens: None,
) -> Phase2:
    """Train TokenBlock, head and table (what of them is trainable) in place; keep the best epoch.

    Args:
        train, validation: of the same model.
        experiment: its `phase2` fields, and the precision of the head's products.
        generator: on the CPU; draws the order of the tokens.
        report: called with each row of the history. tick: called with each batch's tokens.

    Raises:
        FloatingPointError: the validation loss is not finite.
    """
    model, device = train.model, train.tokens.device
    model.context_block.requires_grad_(False)
    size = min(experiment.phase2_batch_size, train.total)
    head = NextToken(model, size, experiment.precision)

    def batches() -> Iterator[tuple[Tensor, ...]]:
        order = (
            torch.randperm(train.total, generator=generator)
            if experiment.phase2_shuffle
            else torch.arange(train.total)
        ).to(device)
        chunks = order.split(size * max(1, CHUNK[device.type] // size))
        loaded = memory.prefetched(chunks, train.reads, train.contexts.device != device)
        for chunk, reads in zip(chunks, loaded, strict=True):
            seen, outputs = train.fixed(chunk, reads)
            targets = None
            if train.room is not None:
                targets = train.room("targets", chunk.shape, train.tokens.dtype)
            targets = torch.index_select(train.tokens, 0, chunk + 1, out=targets)
            whole = chunk, targets, seen, *outputs
            yield from zip(*(part.split(size) for part in whole), strict=True)

    def loss(positions: Tensor, targets: Tensor, seen: Tensor, *outputs: Tensor) -> Tensor:
        hidden = train.hidden(positions, train.token_inputs(), (seen, list(outputs)))
        return head.loss(hidden, targets)

    parameters, eps = model.token_block.in_order(), model.token_block.eps

    def by_hand(targets: Tensor, seen: Tensor, *outputs: Tensor) -> Tensor:
        """The same where nothing but the TokenBlock is trained, on a CPU, where autograd's own work
        counts."""
        assert train.room is not None
        step = TokenStep(parameters, eps, outputs, seen, train.dtype, train.room)
        nats, gradient = head.with_gradient(step.rounded, targets)
        made, _ = step.backward(gradient)
        for parameter, one in zip(parameters, made, strict=True):
            kernels.call(setattr, parameter, "grad", one)
        mean = train.room("mean", (), nats.dtype)
        kernels.call(partial(torch.mean, out=mean), nats, 0)
        return mean

    alone = head.weighs and head.dtype == train.dtype
    if alone:
        from cvfp import kernels

        repeated = kernels.Repeated(by_hand)

    steps = experiment.phase2_epochs * (train.total // size)
    with train.reusing(), validation.reusing():
        return fit(
            model,
            batches,
            (lambda positions, *given: repeated(*given)) if alone else loss,
            lambda: evaluate(validation),
            experiment,
            report,
            tick,
            replayed=device.type == "cuda" and steps >= WORTH_RECORDING,
        )


@functools.cache
def _beside() -> torch.cuda.Stream:
    """One stream for all recordings: each that multiplies matrices keeps memory for it."""
    return torch.cuda.Stream()


class Replayed:
    """A training step recorded as a CUDA graph, after a few that run as they are, and replayed:
    launching its kernels one by one takes longer than they do.

    Args:
        step: takes tensors, whose shapes are those of the first call (others run as they are), and
            returns one.
    """

    WARM_UP = 3

    def __init__(self, step: Callable[..., Tensor]) -> None:
        self.step = step
        self.calls = 0
        self.inputs: list[Tensor] = []
        self.shapes: list[torch.Size] = []

    def __call__(self, *given: Tensor) -> Tensor:
        shapes = [one.shape for one in given]
        self.calls += 1
        if self.calls == 1:
            self.shapes = shapes
        if shapes != self.shapes:
            return self.step(*given)
        if self.calls <= self.WARM_UP:
            side = _beside()  # recording needs what was made on another stream
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                made = self.step(*given)
            torch.cuda.current_stream().wait_stream(side)
            return made
        if not self.inputs:
            self.inputs = [one.clone() for one in given]
            self.graph = torch.cuda.CUDAGraph()
            with memory.DEVICE, torch.cuda.graph(self.graph):
                self.output = self.step(*self.inputs)
        for mine, one in zip(self.inputs, given, strict=True):
            mine.copy_(one)
        self.graph.replay()
        return self.output


def fit(
    model: Predictor,
    batches: Callable[[], Iterable[tuple[Any, ...]]],
    loss: Callable[..., Tensor],
    validate: Callable[[], Evaluation],
    experiment: Experiment,
    report: Callable[[dict[str, float]], None] = lambda row: None,
    tick: Callable[[int], None] = lambda tokens: None,
    clip: float | None = None,
    replayed: bool = False,
) -> Phase2:
    """Train what of the model is trainable in place, by epochs; keep the best.

    Args:
        batches: an epoch's batches, tuples whose first is the positions.
        loss: mean nats of a batch, given what is in its tuple: with a graph, or with the gradients
            in their place (of all that is trained).
        validate: evaluates the model as it is.
        experiment: `phase2_learning_rate`, `phase2_epochs`, `phase2_patience`.
        report: called with each row of the history. tick: called with each batch's positions.
        clip: largest gradient norm.
        replayed: batches are tensors alone, and a step may be recorded.

    Raises:
        FloatingPointError: the validation loss is not finite.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = Adam(trained.values(), experiment.phase2_learning_rate)

    def step(*batch: Any) -> Tensor:
        optimiser.zero_grad()
        nats = loss(*batch)
        if nats.requires_grad:
            nats.backward()
        elif any(parameter.grad is None for parameter in trained.values()):
            raise RuntimeError("loss: got neither a graph nor gradients; accepted: one of them")
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trained.values(), clip)
        optimiser.step()
        return nats.detach()

    move = Replayed(step) if replayed else step
    best: Phase2 | None = None
    best_weights: dict[str, Tensor] = {}
    history: list[dict[str, float]] = []
    for epoch in range(1, experiment.phase2_epochs + 1):
        total, count = torch.zeros((), device=model.embedding.device), 0
        for batch in batches():
            positions = batch[0].numel()
            total += positions * move(*batch)
            count += positions
            tick(positions)
        validation = validate()
        train_loss = float(total) / count
        row = {
            "epoch": float(epoch),
            "train_loss": train_loss,
            "train_ppl": perplexity(train_loss),
            "val_loss": validation.loss,
            "val_ppl": perplexity(validation.loss),
            "val_acc": validation.accuracy,
        }
        history.append(row)
        report(row)
        if not all(map(math.isfinite, row.values())):
            raise FloatingPointError(
                f"Phase 2 is not finite at epoch {epoch}: {row}; "
                "a smaller phase2_learning_rate would be accepted"
            )
        if best is None or validation.loss < best.validation.loss:
            best = Phase2(epoch, train_loss, validation, history)
            best_weights = {name: copy.deepcopy(p.detach()) for name, p in trained.items()}
        elif epoch - best.best_epoch >= experiment.phase2_patience:
            break
    assert best is not None
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(best_weights[name])
    return best
