"""Models trained end to end by truncated backpropagation: the ContextBlock as a plain recurrent
network, and the peers that a user would pick instead, an LSTM and a small GPT-2.

The stream is cut into lanes, a batch of sequences, `unroll` tokens at a time; the state is carried
over and gradients are not. All of them have CVFP's inputs, normalised rows of the table, and its
head."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvfp import ops, phase2
from cvfp.config import Experiment, ParameterError
from cvfp.controls import parameter_counts
from cvfp.inputs import TokenInputs
from cvfp.model import CVFP, Predictor
from cvfp.phase2 import Evaluation, Phase2

# Gradients through time explode now and then; the usual remedy (Pascanu et al., 2013).
CLIP = 1.0
HEADS = 4
BLOCKS = 2
MATCH = 0.05
LONGEST = 4096  # tokens in a piece of a stream that is evaluated

State = tuple[Tensor, ...]
Read = tuple[Tensor, State]
# Positions [B, S] of a stream, and the state after those before -> h [B, S, E], and the state after
# these.
Reader = Callable[[TokenInputs, Tensor, State | None], Read]


class Peer(Predictor):
    """A sequence model between the table, whose rows it reads normalised, and the head."""

    def read(self, inputs: TokenInputs, positions: Tensor, state: State | None) -> Read:
        """A `Reader`."""
        raise NotImplementedError

    def pieces(self, positions: Tensor) -> Iterable[Tensor]:
        """All positions [T] of a stream, cut for `read` into [B, S] each; the last cut may be
        padded with repeats of the last position."""
        raise NotImplementedError

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, num_input_tokens: int) -> Evaluation:
        """Float32 evaluation of a stream, read from its start."""
        inputs = TokenInputs(tokens, self.embedding, num_input_tokens)
        parts, state = [], None
        # cuDNN's LSTM would take TF32 for float32.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for positions in self.pieces(torch.arange(len(tokens), device=tokens.device)):
                hidden, state = self.read(inputs, positions, state)
                parts.append(hidden.flatten(0, 1))
        hidden = torch.cat(parts)
        return phase2.score(self, tokens, lambda positions: hidden[positions])


class LSTM(Peer):
    """h = LayerNorm(e + Linear(LSTM(e))): the table's own prediction, and what the past adds."""

    def __init__(self, table: Tensor, hidden: int, num_input_tokens: int, **ends: bool) -> None:
        super().__init__(table, **ends)
        width = table.shape[1]
        self.lstm = nn.LSTM(num_input_tokens * width, hidden, batch_first=True)
        self.out = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)

    def read(self, inputs: TokenInputs, positions: Tensor, state: State | None) -> Read:
        e = inputs.dense(positions)
        outputs, (h, c) = self.lstm(e, state)
        hidden = self.norm(e[..., -self.norm.normalized_shape[0] :] + self.out(outputs))
        return hidden, (h.detach(), c.detach())

    def pieces(self, positions: Tensor) -> Iterable[Tensor]:
        return positions[None].split(LONGEST, dim=1)


class Transformer(Peer):
    """A small GPT-2 (Radford et al., 2019) over a window of twice `unroll` tokens, of which the
    second half predicts: every prediction sees at least `unroll` tokens before it."""

    def __init__(self, table: Tensor, inner: int, unroll: int, **ends: bool) -> None:
        from transformers import GPT2Config, GPT2Model  # seconds to import: for those who use it

        super().__init__(table, **ends)
        self.unroll = unroll
        how: dict[str, Any] = dict(n_layer=BLOCKS, n_head=HEADS, n_inner=inner, vocab_size=1)
        how |= dict(n_embd=table.shape[1], n_positions=2 * unroll, use_cache=False)
        how |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        how |= dict.fromkeys(("bos_token_id", "eos_token_id"))
        # Over windows this short, in bfloat16 on a CPU, twice as fast as the fused one.
        how["attn_implementation"] = "eager"
        self.gpt2 = GPT2Model(GPT2Config(**how))
        del self.gpt2.wte  # embeds nothing: the inputs are the table's rows

    def read(self, inputs: TokenInputs, positions: Tensor, state: State | None) -> Read:
        # No state: what came before is read again.
        before = positions[:, :1] - torch.arange(self.unroll, 0, -1, device=positions.device)
        whole = torch.cat([before, positions], dim=1)
        # Before the stream there is "no token", a row of zeros. (A mask would leave queries without
        # any key, whose attention is not a number.)
        e = inputs.dense(whole.clamp(min=0)) * (whole >= 0)[..., None]
        return self.gpt2(inputs_embeds=e).last_hidden_state[:, self.unroll :], ()

    def pieces(self, positions: Tensor) -> Iterable[Tensor]:
        # The last window may reach beyond the stream: its last token fills it.
        beyond = positions[-1:].expand(-len(positions) % self.unroll)
        windows = torch.cat([positions, beyond]).view(-1, self.unroll)
        return windows.split(max(1, LONGEST // self.unroll))


def peer(experiment: Experiment, table: Tensor, size: int, seed: int) -> Peer:
    """The Experiment's peer, untrained, with its body within 5 % of `size` parameters. Raises
    `ParameterError`: no width comes so close."""
    ends = dict(weight_tying=experiment.weight_tying, freeze_embedding=experiment.freeze_embedding)
    width = table.shape[1]
    if experiment.model == "transformer" and width % HEADS:
        raise ParameterError("embedding_dim", width, f"a multiple of {HEADS}, for a transformer")

    def build(number: int, table: Tensor) -> Peer:
        if experiment.model == "lstm":
            return LSTM(table, number, experiment.num_input_tokens, **ends)
        return Transformer(table, number, experiment.unroll, **ends)

    def count(number: int) -> int:
        with torch.device("meta"):
            return parameter_counts(build(number, torch.empty(1, width)), experiment)["body"]

    # Both grow with the number, by at least as much: one of these two is the nearest.
    high = 2 + bisect_left(range(2, size), size, key=count)
    best = min((high - 1, high), key=lambda number: abs(count(number) - size))
    if abs(count(best) / size - 1) > MATCH:
        nearest = f"the nearest {experiment.model} has {count(best):,}"
        accepted = f"a model of {size:,} parameters or more: {nearest}"
        raise ParameterError("model", experiment.model, accepted)
    # The libraries' own initialisation, which draws from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(best, table)


class Dropped(TokenInputs):
    """Inputs of which a share is dropped at random (Srivastava et al. 2014)."""

    share = 0.0

    def embed(self, windows: Tensor) -> Tensor:
        return F.dropout(super().embed(windows), self.share)


def unrolled(model: CVFP) -> Reader:
    """CVFP as a recurrent network: the ContextBlock learns with the TokenBlock."""

    width = model.context_block.context_dim

    def read(inputs: TokenInputs, positions: Tensor, state: State | None) -> Read:
        e = inputs.dense(positions)  # [B, S, n·E]
        context = e.new_zeros(len(e), width) if state is None else state[0]
        steps = []
        for column in e.unbind(1):
            steps.append(model.context_block(context, column))
            context = steps[-1][-1]
        stacked = [torch.stack(layer, dim=1) for layer in zip(*steps, strict=True)]
        return model.token_block(stacked, e), (context.detach(),)

    return read


def train(
    model: Predictor,
    read: Reader,
    validate: Callable[[], Evaluation],
    tokens: Tensor,
    experiment: Experiment,
    generator: torch.Generator,
    report: Callable[[dict[str, float]], None] = lambda row: None,
    tick: Callable[[int], None] = lambda tokens: None,
    rest: Callable[..., Iterable[int]] = lambda steps, *state: steps,
) -> Phase2:
    """Train the model in place over the stream's lanes; keep the best epoch.

    A batch is `phase2_batch_size` tokens: as many lanes as that takes, `unroll` tokens of each. The
    lanes start at a random token: what they leave out of the stream, fewer tokens than there are
    lanes, differs between epochs. `dropout` is that of what the model reads and of h (Zaremba et
    al. 2014). Raises `ParameterError`: a stream too short for a batch; FloatingPointError: the
    validation loss is not finite."""
    total, device = len(tokens) - 1, tokens.device
    steps = experiment.unroll
    lanes = min(max(1, experiment.phase2_batch_size // steps), total // steps)
    if lanes < 1:
        raise ParameterError("unroll", steps, f"at most the stream's {total} tokens")
    length = total // lanes
    # Of all lanes, overwritten in place, where a recorded step finds it.
    carried: list[Tensor] = []

    def inputs() -> Dropped:
        made = Dropped(tokens, model.embedding, experiment.num_input_tokens)
        made.share = experiment.dropout
        return made

    frozen = None if model.embedding.requires_grad else inputs()

    def batches() -> Iterator[tuple[Tensor]]:
        first = int(torch.randint(total - lanes * length + 1, (), generator=generator))
        if experiment.dropout:  # each epoch anew, so that one after a checkpoint draws the same
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        starts = first + length * torch.arange(lanes, device=device)
        for one in carried:
            one.zero_()
        for along in torch.arange(length, device=device).split(steps):
            yield (starts[:, None] + along,)

    def loss(positions: Tensor) -> Tensor:
        with ops.autocast(experiment.precision, device):
            before = tuple(one.clone() for one in carried) or None
            hidden, after = read(frozen or inputs(), positions, before)
            carried.extend(map(torch.zeros_like, after[len(carried) :]))
            for mine, one in zip(carried, after, strict=True):
                mine.copy_(one)
            hidden = F.dropout(hidden.flatten(0, 1), experiment.dropout)
            return model.nats(hidden, tokens[positions.flatten() + 1])

    given = model, batches, loss, validate, experiment, generator
    # A transformer makes its masks on the CPU, which cannot be recorded.
    eager = isinstance(model, Transformer)
    recorded = 0 if eager else experiment.phase2_epochs * (length // steps)
    # Dropout draws from torch's own generator, which alone a recorded step may draw from.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return phase2.fit(*given, report, tick, rest, CLIP, recorded)
