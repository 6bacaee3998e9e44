"""ContextBlock, TokenBlock and the model that joins them (SPEC §2).

Shapes: B positions in a batch (any leading shape), T a stream's, D context_dim, E embedding_dim,
n num_input_tokens, V vocabulary, L num_layers. `widths[i]` is the width that ContextBlock layer i
puts out: D everywhere, or falling to D in the equal-decrease design.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from cvfp.data import Tokenizer
    from cvfp.kernels import Room

WEIGHT_STD = 0.1
BIAS_STD = 0.01


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Published initialisation: weights N(0, 0.1²), biases N(0, 0.01²), LayerNorm the identity.

    Drawn on the CPU in the order of the modules, so that every device starts from the same.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            _draw(part.weight, WEIGHT_STD, generator)
            _draw(part.bias, BIAS_STD, generator)
        elif isinstance(part, nn.LayerNorm):
            part.reset_parameters()
        elif list(part.parameters(recurse=False)):
            raise TypeError(f"no initialisation for {type(part).__name__}")


def _draw(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    drawn = torch.empty(parameter.shape, device="cpu").normal_(0.0, std, generator=generator)
    with torch.no_grad():
        parameter.copy_(drawn)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Products in bfloat16 if `precision` says so; parameters and sums stay float32."""
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def product_type(precision: str, like: Tensor) -> torch.dtype:
    """The type in which products are taken: bfloat16 if `precision` says so, else that of `like`.

    Everything between the products stays in the type of the weights.
    """
    return torch.bfloat16 if precision == "bfloat16" else like.dtype


# torch 2.8 and later multiply bfloat16 matrices on a GPU into a float32 one.
_MIXED_PRODUCT = "dtype" in torch.ops.aten.mm.overloads()


def exact_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a·b in `dtype`, where possible not rounded to the type of a and b."""
    if a.dtype != dtype and a.device.type == "cuda" and _MIXED_PRODUCT:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`total` + a·b in the place and the type of `total`."""
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    if total.device.type == "cuda" and _MIXED_PRODUCT:
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.add_((a @ b).to(total.dtype))


def exact_sum(rounded: Tensor, exact: Tensor) -> Tensor:
    """Their sum in the type of `exact`."""
    if rounded.device.type == "cpu" and rounded.dtype != exact.dtype:
        return rounded.to(exact.dtype).add_(exact)  # a mixed sum takes three times as long
    return rounded + exact


def looped(parameter: Tensor) -> bool:
    """Whether `kernels` has loops for what is done with it. They are imported where they are used:
    numba takes a third of a second, and a GPU does without."""
    return parameter.device.type == "cpu" and parameter.dtype == torch.float32


class ResidualNorm:
    """LayerNorm(residual + ReLU(bias + a·b)) [B, W], which is a layer of either block, and its
    gradients by hand: autograd keeps more, casts more and takes more passes.

    Args:
        a: [B, K], and b [K, W], in the type of the products.
        bias: [W]; residual: [B, W], both in any type.
        keep: what the gradients take.
        room: on a CPU, for the results; None: memory of their own.
        place: a matrix in the type of the products, and from which of its columns on it takes the
            rounded result.

    Attributes:
        out: the result, in the type of the LayerNorm's parameters.
        rounded: the same in the type of the products.
    """

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        bias: Tensor,
        residual: Tensor,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        keep: bool = False,
        room: Room | None = None,
        place: tuple[Tensor, int] | None = None,
    ) -> None:
        self.looped = looped(scale)
        self.room = room
        self.kept: tuple[Any, ...] = ()
        if self.looped:
            from cvfp import kernels

            room = self.room = room or kernels.Room()
            size = a.shape[0], b.shape[1]
            product = kernels.matmul(a, b, room("product", size, a.dtype))
            moments: Any
            self.out, self.rounded, moments = kernels.residual_norm(
                product, bias, residual, scale, shift, eps, keep, room, place
            )
            under = residual
        else:
            product = torch.addmm(bias.to(a.dtype), a, b)
            under = exact_sum(product.relu_(), residual.to(scale.dtype))
            # with mean and inverse deviation
            self.out, *moments = torch.native_layer_norm(under, scale.shape, scale, shift, eps)
            if place is None:
                self.rounded = self.out.to(product.dtype)
            else:
                matrix, column = place
                self.rounded = matrix[:, column : column + b.shape[1]].copy_(self.out)
        if keep:
            self.kept = bias, scale, shift, product, under, moments

    def backward(
        self,
        gradient: Tensor,
        added: tuple[Tensor, Tensor] | None = None,
        room: Room | None = None,
    ) -> tuple[Tensor, Tensor, Sequence[Tensor] | Tensor]:
        """Gradients of the residual, of the product (in its type), and of scale, shift and bias.

        Args:
            gradient: that of `out`.
            added: two matrices in the type of the products, whose product `gradient` lacks; its
                place is then taken.
            room: as above, and not where `gradient` and `added` are.
        """
        bias, scale, shift, product, under, moments = self.kept
        if self.looped:
            from cvfp import kernels

            room = room or kernels.Room()
            more = None
            if added is not None:
                more = kernels.matmul(*added, room("more", product.shape, product.dtype))
            return kernels.residual_norm_backward(
                gradient, more, product, bias, under, scale, moments, self.room, room
            )
        if added is not None:
            gradient = add_product(gradient, *added)
        for_total, *for_norm = torch.ops.aten.native_layer_norm_backward(
            gradient, under, scale.shape, *moments, scale, shift, [True, True, True]
        )
        into = torch.ops.aten.threshold_backward(for_total.to(product.dtype), product, 0.0)
        return for_total, into, (*for_norm, into.sum(0, dtype=scale.dtype))


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products as exact as their type: no autocast, no TF32, whatever the caller has set."""
    matmuls: list[Any] = [
        torch.backends.cuda.matmul,
        getattr(torch.backends.mkldnn, "matmul", None),
    ]
    if not hasattr(matmuls[0], "fp32_precision"):  # torch before 2.9: one setting for all
        legacy = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.autocast(device.type, enabled=False):
                yield
        finally:
            torch.set_float32_matmul_precision(legacy)
        return
    everywhere: Any = torch.backends
    above = [everywhere.fp32_precision, everywhere.mkldnn.fp32_precision]
    # What reads the same as the setting above it may be inherited, and is left to inherit.
    before = [m.fp32_precision for m in matmuls]
    back = ["none" if one == up else one for one, up in zip(before, above, strict=True)]
    try:
        for matmul in matmuls:
            matmul.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for matmul, setting in zip(matmuls, back, strict=True):
            matmul.fp32_precision = setting


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class Linear(nn.Linear):
    """nn.Linear that `initialise` draws: to draw twice takes longer than all else that is done to
    make a model. Until then it is no number, and what forgets it fails."""

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.constant_(parameter, float("nan"))


class TokenInputs:
    """e_t for every position of a stream, without storing it: a normalised table and its rows.

    Args:
        tokens: int64 [T].
        table: [V, E], the embedding table; LayerNorm'ed here, without affine.
        num_input_tokens: n; position t sees tokens t-n+1 … t, oldest first, zeros before the start.
        history: int64 [n-1], tokens before the stream, where it continues another.
    """

    def __init__(
        self,
        tokens: Tensor,
        table: Tensor,
        num_input_tokens: int,
        history: Tensor | None = None,
    ) -> None:
        self.table = normalised_rows(table)  # [V+1, E], the last row zeros
        before = num_input_tokens - 1
        if history is None:
            history = tokens.new_full((before,), len(table))
        # [T, n]: a view onto the padded stream, nothing is copied
        self.rows = torch.cat([history, tokens]).unfold(0, num_input_tokens, 1)

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, length: int) -> TokenInputs:
        """The same for the first `length` positions; nothing is copied."""
        part = copy.copy(self)
        part.rows = self.rows[:length]
        return part

    def to(self, dtype: torch.dtype) -> TokenInputs:
        """The same in another type."""
        other = copy.copy(self)
        other.table = self.table.to(dtype)
        return other

    def dense(self, positions: Tensor | slice = slice(None), room: Room | None = None) -> Tensor:
        """e_t at `positions`: [B, n·E].

        Args:
            room: on a CPU, memory for it, which the next call takes again.
        """
        rows = self.rows[positions]
        if room is None:
            return F.embedding(rows, self.table).flatten(-2)
        from cvfp import kernels

        size = len(rows), rows.shape[1] * self.table.shape[1]
        return kernels.gather(self.table, rows, room("e", size, self.table.dtype))


def normalised_rows(table: Tensor) -> Tensor:
    """[V, E] -> [V+1, E]: rows LayerNorm'ed without affine, and a row of zeros for "no token"."""
    return F.pad(F.layer_norm(table, table.shape[-1:]), (0, 0, 0, 1))


class ContextLayer(NamedTuple):
    """One layer of a ContextBlock as a step applies it."""

    weight: Tensor  # [K, width], transposed: of c and, where the layer sees the tokens, of e
    bias: Tensor  # [width]
    residual: tuple[Tensor, Tensor] | None  # weight and bias; None: the identity
    norm: nn.LayerNorm
    read: int  # the width of c

    @property
    def norming(self) -> tuple[Tensor, Tensor, float]:
        return self.norm.weight, self.norm.bias, self.norm.eps


class ContextBlock(nn.Module):
    """c <- LayerNorm(c + ReLU(Linear([c ; e]))), L times.

    Args:
        input_dim: n·E, the width of e.
        token_input_all_layers: every layer sees e. If False (equal-decrease), only layer 1 does
            and the width falls linearly from D + n·E to D; where it changes, the residual goes
            through a Linear.

    The Linear of a layer that sees e has the columns [c ; e]; the product is taken as the sum of
    its two halves, so that the tokens' share can be computed apart from the recurrence (`share`).
    """

    def __init__(
        self, num_layers: int, context_dim: int, input_dim: int, token_input_all_layers: bool
    ) -> None:
        super().__init__()
        self.context_dim, self.input_dim = context_dim, input_dim
        self.widths = (
            [context_dim] * num_layers
            if token_input_all_layers
            else [
                context_dim + input_dim - input_dim * i // num_layers
                for i in range(1, num_layers + 1)
            ]
        )
        reads = [context_dim, *self.widths[:-1]]
        self.sees_tokens = [token_input_all_layers or i == 0 for i in range(num_layers)]
        self.linears = nn.ModuleList(
            Linear(read + input_dim * sees, width)
            for read, width, sees in zip(reads, self.widths, self.sees_tokens, strict=True)
        )
        self.residuals = nn.ModuleList(
            nn.Identity() if read == width else Linear(read, width)
            for read, width in zip(reads, self.widths, strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.widths)

    @property
    def share_widths(self) -> list[int]:
        """Width of each layer's token share; 0 where the layer does not see the tokens."""
        return [w * sees for w, sees in zip(self.widths, self.sees_tokens, strict=True)]

    def token_weight(self) -> Tensor:
        """The columns of all layers' Linears that multiply e, stacked: [Σ, n·E]."""
        columns = [
            linear.weight[:, -self.input_dim :]
            for linear, sees in zip(self._linears(), self.sees_tokens, strict=True)
            if sees
        ]
        return torch.cat(columns)

    def token_bias(self) -> Tensor:
        """The biases of those Linears: [Σ]. They travel with the tokens' share."""
        layers = zip(self._linears(), self.sees_tokens, strict=True)
        return torch.cat([linear.bias for linear, sees in layers if sees])

    def _linears(self) -> Iterable[nn.Linear]:
        return cast(Iterable[nn.Linear], self.linears)

    def layers(self, dtype: torch.dtype | None = None) -> list[ContextLayer]:
        """What a step applies; ask once before a loop of many steps.

        Args:
            dtype: that the products are taken in; None: that of the weights.
        """
        norms = cast(Iterable[nn.LayerNorm], self.norms)
        reads = [self.context_dim, *self.widths[:-1]]
        return [
            ContextLayer(
                linear.weight.to(dtype).t(),
                linear.bias.to(dtype),
                (residual.weight.to(dtype), residual.bias.to(dtype))
                if isinstance(residual, nn.Linear)
                else None,
                norm,
                read,
            )
            for linear, residual, norm, read in zip(
                self._linears(), self.residuals, norms, reads, strict=True
            )
        ]

    def share(self, inputs: Tensor) -> Tensor:
        """e [B, n·E] -> the tokens' share of every layer's product: [B, Σ share_widths], the
        product in the type of e."""
        weight, bias = self.token_weight(), self.token_bias()
        return F.linear(inputs, weight.to(inputs.dtype), bias.to(inputs.dtype))

    def step(
        self, context: Tensor, share: Tensor, layers: list[ContextLayer] | None = None
    ) -> list[Tensor]:
        """One application to c [B, D] and the share: each layer's output [B, widths[i]]."""
        outputs = []
        shares = iter(share.split([w for w in self.share_widths if w], dim=-1))
        for layer, sees in zip(layers or self.layers(), self.sees_tokens, strict=True):
            bias = next(shares) if sees else layer.bias
            read = context.to(layer.weight.dtype)
            product = torch.addmm(bias, read, layer.weight[: layer.read])
            kept = context if layer.residual is None else F.linear(read, *layer.residual)
            made = exact_sum(F.relu(product, inplace=True), kept)
            context = layer.norm(made.to(layer.norm.weight.dtype))
            outputs.append(context)
        return outputs

    @torch.no_grad()
    def outputs(
        self,
        context: Tensor,
        inputs: Tensor,
        layers: Sequence[ContextLayer],
        keep: bool = False,
        room: Room | None = None,
        beside: Sequence[int] = (),
    ) -> tuple[list[ResidualNorm], list[Tensor]]:
        """One application without a graph.

        Args:
            context: [B, D], in any type.
            inputs: e [B, n·E], in any type.
            layers: in the type of the products.
            keep: what the gradients take.
            room: on a CPU, memory for the outputs, which the next application takes again.
            beside: columns that the caller takes beside each layer's output.

        Returns:
            Every layer's output in two types, and what it read, [B, K or more]: c and, where the
            layer sees the tokens, e beside it. One product of both is faster than the sum of two.
            With `beside`, also what another layer would read: c, beside it nothing yet. The columns
            beside c may be taken then, at least as many as `beside` says.
        """
        dtype, sizes = layers[0].weight.dtype, [len(layer.weight) for layer in layers]
        if beside:
            taken = [width + more for width, more in zip(self.widths, beside, strict=True)]
            sizes[1:] = map(max, [*sizes[1:], 0], taken)

        def memory(name: str, *shape: int) -> Tensor:
            if room is not None:
                return room(name, shape, dtype)
            return torch.empty(shape, dtype=dtype, device=context.device)

        seeing = sum(self.sees_tokens)  # all layers, or the first
        seen = memory("seeing", seeing, len(context), sizes[0])
        seen[:, :, self.context_dim :].copy_(inputs)
        seen[0, :, : self.context_dim].copy_(context)
        reads = list(seen.unbind())
        reads += [memory(f"read {i}", len(context), n) for i, n in enumerate(sizes[seeing:])]
        made: list[ResidualNorm] = []
        for i, layer in enumerate(layers):
            residual, read = context, reads[i][:, : len(layer.weight)]
            if layer.residual is not None:
                residual = F.linear(read[:, : layer.read], *layer.residual)
            mine = None if room is None else room.of("context layer", i)
            place = (reads[i + 1], 0) if i + 1 < len(reads) else None
            made.append(
                ResidualNorm(
                    read, layer.weight, layer.bias, residual, *layer.norming, keep, mine, place
                )
            )
            context = made[-1].out
        return made, reads

    def forward(self, context: Tensor, inputs: Tensor) -> list[Tensor]:
        """c [B, D], e [B, n·E] -> all layers' outputs; the last is the new context [B, D]."""
        return self.step(context, self.share(inputs))


class TokenBlock(nn.Module):
    """h <- LayerNorm(r + ReLU(Linear([c^(i) ; h]))), L times; c^(i) from ContextBlock layer i.

    Layer 1 takes h = e (n·E wide) and puts out E, its residual the current token's part of e.
    """

    def __init__(self, widths: Sequence[int], embedding_dim: int, input_dim: int) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.reads = [input_dim] + [embedding_dim] * (len(widths) - 1)  # of h
        self.linears = nn.ModuleList(
            Linear(width + read, embedding_dim)
            for width, read in zip(widths, self.reads, strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(embedding_dim) for _ in widths)

    def forward(
        self,
        contexts: Sequence[Tensor],
        inputs: Tensor,
        dtype: torch.dtype | None = None,
        room: Room | None = None,
    ) -> Tensor:
        """c^(i) [B, widths[i]] each, e [B, n·E] -> h [B, E].

        Args:
            dtype: that the products are taken in; None: autocast's, or that of the weights.
            room: on a CPU, memory for all there is to keep, which the next call takes again: h and
                its gradients are for use before that. Contexts are then given in that type and with
                columns beside them, at least `reads[i]`: e is in those beside the first already,
                and h is put into those beside the others.
        """
        if dtype is None:  # what a caller's autocast asks for, if there is one
            device = inputs.device.type
            mixed = torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if mixed else inputs.dtype
        return _TokenLayers.apply(self, dtype, room, inputs, *contexts, *self.in_order())

    @property
    def eps(self) -> float:
        return cast(nn.LayerNorm, self.norms[0]).eps

    def in_order(self) -> list[nn.Parameter]:
        """Weight, bias, scale and shift of every layer."""
        parts = cast(Iterable[Any], zip(self.linears, self.norms, strict=True))
        return [
            parameter
            for linear, norm in parts
            for parameter in (linear.weight, linear.bias, norm.weight, norm.bias)
        ]


class TokenStep:
    """One application of a TokenBlock, with its gradients by hand.

    Autograd would also push the gradient into contexts that nobody trains, and take twice as many
    kernels, which at these sizes is what a step costs.

    Args:
        parameters: the block's, in order. The others: as `TokenBlock.forward` has them.

    Attributes:
        hidden: h [B, E]; rounded: the same in the type of the products.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        eps: float,
        contexts: Sequence[Tensor],
        inputs: Tensor,
        dtype: torch.dtype,
        room: Room | None = None,
    ) -> None:
        self.room = room
        self.shape = inputs.shape[:-1]
        self.kept: list[tuple[Tensor, Tensor, int, ResidualNorm]] = []
        hidden = read = inputs.flatten(0, -2)
        with torch.autocast(inputs.device.type, enabled=False):
            for i, context in enumerate(contexts):
                weight, bias, scale, shift = parameters[4 * i : 4 * i + 4]
                width, size = weight.shape[1] - read.shape[1], weight.shape[0]
                both, mine, place = context.flatten(0, -2), None, None
                if room is None:
                    columns = weight.to(dtype)
                    both = torch.cat([both.to(dtype), read.to(dtype)], dim=1)
                else:
                    from cvfp import kernels

                    both, mine = both[:, : weight.shape[1]], room.of("token layer", i)
                    columns = kernels.copied(weight, mine("columns", weight.shape, dtype))
                    if i + 1 < len(contexts):
                        place = contexts[i + 1], parameters[4 * i + 4].shape[1] - size
                kept = hidden if hidden.shape[1] == size else hidden[:, -size:]
                made = ResidualNorm(
                    both, columns.t(), bias, kept, scale, shift, eps, True, mine, place
                )
                self.kept.append((both, columns, width, made))
                hidden, read = made.out, made.rounded
        self.out, self.rounded = hidden, read

    def _exact_product(self, a: Tensor, b: Tensor, dtype: torch.dtype, layer: int) -> Tensor:
        if self.room is None:
            return exact_product(a, b, dtype)
        from cvfp import kernels

        room, size = self.room.of("token layer", layer), (a.shape[0], b.shape[1])
        made = kernels.matmul(a, b, room("weight", size, a.dtype))
        return made if a.dtype == dtype else kernels.copied(made, room("weight", size, dtype))

    @property
    def hidden(self) -> Tensor:
        # Not kept: what autograd returns would hold itself, through the step, until the next
        # collection of garbage.
        return self.out.view(*self.shape, -1)

    def backward(
        self, gradient: Tensor, needed: Sequence[bool] = ()
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Gradients of the parameters, and of e and the contexts, given that of `hidden`.

        Args:
            needed: of e and the contexts, which are; none by default.
        """
        needed = needed or [False] * (1 + len(self.kept))
        for_parameters: list[Tensor] = []
        for_given: list[Tensor | None] = [None] * len(needed)
        exact = gradient.dtype
        added: tuple[Tensor, Tensor] | None = None
        gradient = gradient.flatten(0, -2)
        with torch.autocast(gradient.device.type, enabled=False):
            for i in reversed(range(len(self.kept))):
                both, columns, width, made = self.kept[i]
                mine = None if self.room is None else self.room.of("gradients", i % 2)
                gradient, into, sums = made.backward(gradient, added, mine)
                for_weight = self._exact_product(into.t(), both, exact, i)
                scale, shift, bias = sums
                for_parameters[:0] = [for_weight, bias, scale, shift]
                if needed[1 + i]:
                    for_seen = exact_product(into, columns[:, :width], exact)
                    for_given[1 + i] = for_seen.view(*self.shape, -1)
                added = into, columns[:, width:]
            if needed[0] and added is not None:
                for_inputs = exact_product(*added, exact)
                for_inputs[:, -gradient.shape[1] :] += gradient
                for_given[0] = for_inputs.view(*self.shape, -1)
        return for_parameters, for_given


class _TokenLayers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        block: TokenBlock,
        dtype: torch.dtype,
        room: Room | None,
        inputs: Tensor,
        *given: Tensor,
    ) -> Tensor:
        layers = len(block.norms)
        parameters, contexts = given[layers:], given[:layers]
        ctx.step = TokenStep(parameters, block.eps, contexts, inputs, dtype, room)
        return ctx.step.hidden

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        layers = len(ctx.step.kept)
        made, given = ctx.step.backward(gradient, ctx.needs_input_grad[3 : 4 + layers])
        return None, None, None, *given, *made


class Predictor(nn.Module):
    """What every language model here ends in: the embedding table, and the head over it.

    Args:
        table: [V, E].
        weight_tying: the table is the head; False: a Linear of its own, zero at first.
        freeze_embedding: the table is not trained.
    """

    def __init__(self, table: Tensor, *, weight_tying: bool, freeze_embedding: bool) -> None:
        super().__init__()
        vocab_size, width = table.shape
        self.embedding = nn.Parameter(table.clone(), requires_grad=not freeze_embedding)
        self.head = None if weight_tying else Linear(width, vocab_size)
        if self.head is not None:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """h [B, E] -> [B, V]: by the embedding table (tied), or by the head's own Linear.

        Args:
            out: a place for them, without a graph.
        """
        if out is None:
            return F.linear(hidden, self.embedding) if self.head is None else self.head(hidden)
        if self.head is None:
            return torch.mm(hidden, self.embedding.T, out=out)
        return torch.addmm(self.head.bias, hidden, self.head.weight.T, out=out)

    def end_counts(self) -> dict[str, int]:
        """Numbers of parameters of table and head; a tied head has none of its own."""
        head = 0 if self.head is None else count_parameters(self.head)
        return {"embedding": self.embedding.numel(), "head": head}


class CVFP(Predictor):
    """ContextBlock, TokenBlock, embedding table and head, with a tokeniser for text.

    Phase 1 learns the ContextBlock over the table it is given. If Phase 2 trains the table
    (`freeze_embedding=False`), the ContextBlock goes on reading the table as it was, or its
    contexts would no longer be the fixed points that Phase 1 found.

    Args:
        context_widths: of what the TokenBlock's layers read; None: the ContextBlock's outputs.
        generates: False for a control that reads no contexts of its own.
    """

    def __init__(
        self,
        table: Tensor,
        *,
        num_layers: int,
        context_dim: int,
        num_input_tokens: int,
        token_input_all_layers: bool,
        weight_tying: bool,
        freeze_embedding: bool,
        tokenizer: Tokenizer | None = None,
        context_widths: Sequence[int] | None = None,
        generates: bool = True,
    ) -> None:
        super().__init__(table, weight_tying=weight_tying, freeze_embedding=freeze_embedding)
        embedding_dim = table.shape[1]
        input_dim = num_input_tokens * embedding_dim
        self.num_input_tokens = num_input_tokens
        self.tokenizer = tokenizer
        self.generates = generates
        self.context_block = ContextBlock(
            num_layers, context_dim, input_dim, token_input_all_layers
        )
        self.context_widths = list(context_widths or self.context_block.widths)
        self.token_block = TokenBlock(self.context_widths, embedding_dim, input_dim)
        self.context_table: Tensor | None
        self.register_buffer("context_table", None if freeze_embedding else table.clone())

    def context_inputs(self, tokens: Tensor, history: Tensor | None = None) -> TokenInputs:
        """What the ContextBlock reads at each position of a stream (int64 [T]).

        Raises:
            ValueError: a token that the table has no row for.
        """
        if len(tokens):
            for found in (int(tokens.min()), int(tokens.max())):
                if not 0 <= found < len(self.embedding):
                    raise ValueError(
                        f"tokens: got {found}; accepted: 0 to {len(self.embedding) - 1}"
                    )
        table = self.embedding if self.context_table is None else self.context_table
        return TokenInputs(tokens, table.detach(), self.num_input_tokens, history)

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters by part; a tied head has none of its own."""
        return {
            "context_block": count_parameters(self.context_block),
            "token_block": count_parameters(self.token_block),
            **self.end_counts(),
        }

    @torch.no_grad()
    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> str:
        """`prompt` and its continuation; the state is one context vector and n tokens.

        Args:
            temperature: divides the logits before sampling; 0 takes the likeliest token.

        Raises:
            ValueError: no tokeniser, a prompt without tokens, or a number out of range.
        """
        if not self.generates:
            raise ValueError(
                "contexts: got a control without them; accepted: a model that has them"
            )
        if self.tokenizer is None:
            raise ValueError("tokenizer: got None; accepted: a model made with a tokeniser")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}; accepted: at least 1")
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature: got {temperature}; accepted: 0 or more")
        tokens = self.tokenizer.encode([prompt]).tokens.tolist()
        if not tokens:
            raise ValueError("prompt: got no tokens; accepted: text of at least one token")
        device = self.embedding.device
        generator = torch.Generator().manual_seed(seed)
        window: list[int] = [len(self.embedding)] * self.num_input_tokens
        table = normalised_rows(self.embedding)
        context_table = table if self.context_table is None else normalised_rows(self.context_table)
        context = torch.zeros(1, self.context_block.context_dim, device=device)
        for position in range(len(tokens) + max_new_tokens - 1):
            window = [*window[1:], tokens[position]]
            rows = torch.tensor(window, device=device)
            outputs = self.context_block(context, context_table[rows].flatten()[None])
            context = outputs[-1]
            if position + 1 < len(tokens):
                continue
            hidden = self.token_block(outputs, table[rows].flatten()[None])
            logits = self.logits(hidden)[0].float().cpu()
            if temperature == 0:
                tokens.append(int(logits.argmax()))
            else:
                weights = torch.softmax(logits / temperature, dim=-1)
                tokens.append(int(torch.multinomial(weights, 1, generator=generator)))
        return self.tokenizer.decode(tokens)
