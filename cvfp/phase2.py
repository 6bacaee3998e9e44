"""Phase 2: next-token prediction on fixed contexts (SPEC §4)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cvfp.config import Experiment
from cvfp.metrics import perplexity
from cvfp.model import CVFP, Predictor, TokenInputs, autocast

# Logits held at once when evaluating: near the cache on a CPU, enough to fill a GPU.
EVALUATION_LOGITS = {"cpu": 2**22, "cuda": 2**26, "mps": 2**24}


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
        contexts: [T, D]; position t reads row t-1, and zeros at t = 0.
        tokens: int64 [T], on the model's device.
    """

    def __init__(self, model: CVFP, contexts: Tensor, tokens: Tensor) -> None:
        self.model, self.contexts, self.tokens = model, contexts, tokens
        self.context_inputs = model.context_inputs(tokens)
        self.total = len(tokens) - 1  # the last token has no successor

    def outputs(self, positions: Tensor, seen: Tensor) -> list[Tensor]:
        """What the TokenBlock reads as c^(i) at `positions`, where the ContextBlock sees `seen`
        [B, n·E]: [B, widths[i]] each."""
        read = self.contexts[(positions - 1).clamp(min=0)] * (positions > 0)[:, None]
        return self.model.context_block(read, seen)

    def hidden(self, positions: Tensor, inputs: TokenInputs) -> Tensor:
        """h [B, E] at `positions`; `inputs` are what the TokenBlock reads."""
        with torch.no_grad():
            seen = self.context_inputs.dense(positions)
            outputs = self.outputs(positions, seen)
        e = seen if self.model.context_table is None else inputs.dense(positions)
        return self.model.token_block(outputs, e)

    def logits(self, positions: Tensor, inputs: TokenInputs) -> Tensor:
        """[B, V] at `positions`."""
        return self.model.logits(self.hidden(positions, inputs))

    def token_inputs(self) -> TokenInputs:
        """e_t from the table as it is now; the graph reaches the table if it is being trained."""
        if self.model.context_table is None:
            return self.context_inputs
        return TokenInputs(self.tokens, self.model.embedding, self.model.num_input_tokens)


class FrozenHead:
    """Cross-entropy through a head that is not trained, with its gradient by hand, on the CPU.

    Softmax minus one-hot is the gradient of the logits, so one softmax serves loss and gradient;
    and the two [B, V] buffers are kept, since fresh ones cost the CPU as much as the softmax.
    """

    def __init__(self, weight: Tensor, rows: int, precision: str) -> None:
        self.weight = weight.to(torch.bfloat16 if precision == "bfloat16" else weight.dtype)
        self.logits = self.weight.new_empty(rows, len(weight))
        self.shares = torch.empty_like(self.logits)

    def loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Mean nats of `target` [B], from h [B, E]; the graph reaches `hidden` only."""
        return _FrozenHeadLoss.apply(hidden, target, self)


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, target: Tensor, head: FrozenHead) -> Tensor:
        rows = len(hidden)
        logits, shares = head.logits[:rows], head.shares[:rows]
        with torch.autocast("cpu", enabled=False):
            torch.mm(hidden.to(head.weight.dtype), head.weight.T, out=logits)
            torch.softmax(logits, dim=1, out=shares)
            right = shares.gather(1, target[:, None])
            shares.scatter_add_(1, target[:, None], torch.full_like(right, -1.0))
            ctx.save_for_backward((shares @ head.weight).to(hidden.dtype) / rows)
        # A share too small for its type counts as the smallest there is.
        return -right.float().clamp(min=torch.finfo(torch.float32).tiny).log().mean()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None


class NextToken:
    """Mean nats of the tokens that follow, through the model's head.

    Args:
        rows: most positions in a batch.
    """

    def __init__(self, model: Predictor, rows: int, precision: str) -> None:
        self.model = model
        weight = model.embedding
        self.frozen = None
        if model.head is None and not weight.requires_grad and weight.device.type == "cpu":
            self.frozen = FrozenHead(weight.detach(), rows, precision)

    def loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Of `target` [B], from h [B, E]."""
        if self.frozen is not None:
            return self.frozen.loss(hidden, target)
        return F.cross_entropy(self.model.logits(hidden), target)


@torch.no_grad()
def evaluate(stream: Positions) -> Evaluation:
    """Float32 evaluation of a stream of at least two tokens."""
    inputs = stream.token_inputs()
    return judge(stream.model, stream.tokens, lambda positions: stream.hidden(positions, inputs))


def judge(model: Predictor, tokens: Tensor, hidden: Callable[[Tensor], Tensor]) -> Evaluation:
    """Float32 evaluation of h [B, E] at positions [B]: all of a stream but the last."""
    nats, correct = [], []
    batch = max(1, EVALUATION_LOGITS[tokens.device.type] // len(model.embedding))
    for positions in torch.arange(len(tokens) - 1, device=tokens.device).split(batch):
        logits = model.logits(hidden(positions))
        target = tokens[positions + 1]
        nats.append(F.cross_entropy(logits, target, reduction="none"))
        correct.append(logits.argmax(dim=-1) == target)
    return Evaluation(torch.cat(nats).cpu().double(), torch.cat(correct).cpu())


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
        train, validation: of the same model, on its device.
        experiment: its `phase2` fields, and the precision of the products.
        generator: on the CPU; draws the order of the tokens.
        report: called with each row of the history. tick: called with each batch's tokens.

    Raises:
        FloatingPointError: the validation loss is not finite.
    """
    model, device = train.model, train.tokens.device
    model.context_block.requires_grad_(False)
    size = min(experiment.phase2_batch_size, train.total)
    head = NextToken(model, size, experiment.precision)

    def batches() -> Iterator[tuple[Tensor, int]]:
        order = (
            torch.randperm(train.total, generator=generator)
            if experiment.phase2_shuffle
            else torch.arange(train.total)
        ).to(device)
        for positions in order.split(size):
            with autocast(experiment.precision, device):
                hidden = train.hidden(positions, train.token_inputs())
                loss = head.loss(hidden, train.tokens[positions + 1])
            yield loss, len(positions)

    return fit(model, batches, lambda: evaluate(validation), experiment, report, tick)


def fit(
    model: Predictor,
    batches: Callable[[], Iterable[tuple[Tensor, int]]],
    validate: Callable[[], Evaluation],
    experiment: Experiment,
    report: Callable[[dict[str, float]], None] = lambda row: None,
    tick: Callable[[int], None] = lambda tokens: None,
    clip: float | None = None,
) -> Phase2:
    """Train what of the model is trainable in place, by epochs; keep the best.

    Args:
        batches: an epoch: mean loss and positions of each batch, made when it is asked for.
        validate: evaluates the model as it is.
        experiment: `phase2_learning_rate`, `phase2_epochs`, `phase2_patience`.
        report: called with each row of the history. tick: called with each batch's positions.
        clip: largest gradient norm.

    Raises:
        FloatingPointError: the validation loss is not finite.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.Adam(trained.values(), lr=experiment.phase2_learning_rate, fused=True)
    best: Phase2 | None = None
    best_weights: dict[str, Tensor] = {}
    history: list[dict[str, float]] = []
    for epoch in range(1, experiment.phase2_epochs + 1):
        total, count = torch.zeros((), device=model.embedding.device), 0
        for loss, positions in batches():
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(trained.values(), clip)
            optimiser.step()
            total += loss.detach() * positions
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
