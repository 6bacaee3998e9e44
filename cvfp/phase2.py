"""Phase 2: next-token prediction on frozen contexts (docs/method.md, *Phase 2*)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cvfp import ops
from cvfp.inputs import TokenInputs
from cvfp.metrics import perplexity
from cvfp.model import CVFP, Predictor

if TYPE_CHECKING:
    from cvfp.config import Experiment


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
    """What Phase 2 leaves; the model holds the weights of the best epoch."""

    best_epoch: int  # from 1, by validation loss
    train_loss: float  # mean nats per token while training in that epoch (weights moving)
    validation: Evaluation  # of that epoch
    # One dict per epoch: epoch, train_loss, train_ppl, val_loss, val_ppl, val_acc
    history: list[dict[str, float]] = field(default_factory=list)


class Positions:
    """A stream's positions with what predicting the next token takes: contexts and tokens.

    Args:
        contexts: [T, D]; position t reads row t-1, and zeros at t = 0. On any device.
        tokens: int64 [T], on the model's device.
    """

    def __init__(self, model: CVFP, contexts: Tensor, tokens: Tensor) -> None:
        if contexts.numel() and len(contexts) < len(tokens) - 2:  # the last that is read
            raise ValueError(f"contexts: got {len(contexts)} rows; accepted: {len(tokens)}")
        self.model, self.contexts, self.tokens = model, contexts, tokens
        self.context_inputs = model.context_inputs(tokens)
        self.total = len(tokens) - 1  # the last token has no successor
        self.ranks = 1  # devices, each with the outputs of its part of a batch (`share`)

    def previous(self, positions: Tensor) -> Tensor:
        """The contexts that `positions` [B] read: [B, D], on the model's device."""
        before = (positions - 1).clamp(min=0).to(self.contexts.device)
        return self.contexts[before].to(positions.device) * (positions > 0)[:, None]

    @torch.no_grad()
    def outputs(self, positions: Tensor, previous: Tensor) -> list[Tensor]:
        """What the TokenBlock reads as c^(i) at `positions`: [B, widths[i]] each."""
        e = self.context_inputs.dense(positions)  # [B, n·E]
        return list(self.model.context_block(previous, e))

    def hidden(self, positions: Tensor, outputs: list[Tensor], inputs: TokenInputs) -> Tensor:
        """h [B, E] at `positions`; the TokenBlock reads `outputs` and `inputs`."""
        return self.model.token_block(outputs, inputs.dense(positions))

    def token_inputs(self) -> TokenInputs:
        """What the TokenBlock reads, from the table as it is now."""
        if self.model.context_table is None:
            return self.context_inputs
        return self.model.token_inputs(self.tokens)


def evaluate(stream: Positions) -> Evaluation:
    """Float32 evaluation of a stream of at least two tokens."""
    inputs, outputs = stream.token_inputs(), lambda at: stream.outputs(at, stream.previous(at))
    return score(stream.model, stream.tokens, lambda at: stream.hidden(at, outputs(at), inputs))


@torch.no_grad()
def score(model: Predictor, tokens: Tensor, hidden: Callable[[Tensor], Tensor]) -> Evaluation:
    """Float32 evaluation of h [B, E] at positions [B]: all of a stream but the last."""
    positions = torch.arange(len(tokens) - 1, device=tokens.device)
    batches = positions.split(ops.rows_at_once(len(model.embedding), tokens.device))
    scored = [model.score(hidden(batch), tokens[batch + 1]) for batch in batches]
    nats, correct = map(torch.cat, zip(*scored, strict=True))
    return Evaluation(nats.cpu(), correct.cpu())


def train(
    train: Positions,
    validation: Positions,
    experiment: Experiment,
    generator: torch.Generator,
    report: Callable[[dict[str, float]], None] = lambda row: None,
    tick: Callable[[int], None] = lambda tokens: None,
    rest: Callable[..., Iterable[int]] = lambda steps, *state: steps,
) -> Phase2:
    """Train TokenBlock, head and table (what of them is trainable) in place; keep the best epoch.

    Args:
        generator: on the CPU; draws the order of the tokens.
        report: called with each row of the history. tick: called with each batch's tokens.
        rest: (epochs, the loop's state) -> the epochs still to do (`checkpoint.Checkpoint.rest`).

    Raises:
        FloatingPointError: the validation loss is not finite.
    """
    model, device = train.model, train.tokens.device
    model.context_block.requires_grad_(False)
    size = min(experiment.phase2_batch_size, train.total)

    def batches() -> Iterator[tuple[Tensor, ...]]:
        total, shuffle = train.total, experiment.phase2_shuffle
        order = torch.randperm(total, generator=generator) if shuffle else torch.arange(total)
        # The ContextBlock is frozen: it takes several batches at once.
        many = size * ops.batches_at_once(size, model.context_widths, device)
        several = order.to(device).split(many)
        elsewhere = train.contexts.device != device
        for positions, previous in ops.prefetch(several, train.previous, elsewhere):
            with ops.autocast(experiment.precision, device):
                outputs = train.outputs(positions, previous)  # [B, widths[i]] each
            mine = [one.split(math.ceil(size / train.ranks)) for one in outputs]
            yield from zip(positions.split(size), *mine, strict=True)

    def loss(positions: Tensor, *outputs: Tensor) -> Tensor:
        with ops.autocast(experiment.precision, device):
            hidden = train.hidden(positions, list(outputs), train.token_inputs())
            return model.nats(hidden, train.tokens[positions + 1])

    given = model, batches, loss, partial(evaluate, validation), experiment, generator
    return fit(*given, report, tick, rest, steps=experiment.phase2_epochs * (train.total // size))


def fit(
    model: Predictor,
    batches: Callable[[], Iterable[tuple[Tensor, ...]]],
    loss: Callable[..., Tensor],
    validate: Callable[[], Evaluation],
    experiment: Experiment,
    generator: torch.Generator,
    report: Callable[[dict[str, float]], None] = lambda row: None,
    tick: Callable[[int], None] = lambda tokens: None,
    rest: Callable[..., Iterable[int]] = lambda steps, *state: steps,
    clip: float | None = None,
    steps: int = 0,
) -> Phase2:
    """Train the parameters that require gradients; restore the best epoch's. Beside `train`'s:

    Args:
        batches: an epoch's batches, tuples of tensors whose first is the positions.
        loss: mean nats of a batch, given what is in its tuple.
        validate: evaluates the model as it is.
        clip: largest gradient norm.
        steps: batches of the same shape in all, if `loss` depends on their tensors alone and may be
            recorded; 0: it may not.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rate, decay = experiment.phase2_learning_rate, experiment.weight_decay
    optimiser = ops.optimiser(list(trained.values()), rate, decay)

    def step(*batch: Tensor) -> Tensor:
        optimiser.zero_grad()
        nats = loss(*batch)
        nats.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trained.values(), clip)
        optimiser.step()
        return nats.detach()

    move = ops.recorded(step, steps)
    history: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}  # of the best epoch: weights, nats and hits in validation
    parts = [*trained.values(), *model.buffers(), optimiser]
    for epoch in rest(range(1, experiment.phase2_epochs + 1), parts, generator, history, best):
        total, count = torch.zeros((), device=model.embedding.device), 0
        for batch in batches():
            positions = batch[0].numel()
            total += positions * move(*batch)
            count += positions
            tick(positions)
        validation = validate()
        train_loss = float(total) / count
        row = {"epoch": float(epoch), "train_loss": train_loss, "train_ppl": perplexity(train_loss)}
        row |= {"val_loss": validation.loss, "val_ppl": perplexity(validation.loss)}
        if not all(map(math.isfinite, row.values())):
            hint = "a smaller phase2_learning_rate would be accepted"
            raise FloatingPointError(f"Phase 2 is not finite at epoch {epoch}: {row}; {hint}")
        history.append(row | {"val_acc": validation.accuracy})
        report(history[-1])
        leader = min(history, key=itemgetter("val_loss"))
        if leader is history[-1]:
            best |= {name: copy.deepcopy(p.detach()) for name, p in trained.items()}
            best |= {"nats": validation.nats, "correct": validation.correct}
        elif epoch - leader["epoch"] >= experiment.phase2_patience:
            break
    validation = Evaluation(best.pop("nats"), best.pop("correct"))
    model.load_state_dict(best, strict=False)
    return Phase2(int(leader["epoch"]), leader["train_loss"], validation, history)
