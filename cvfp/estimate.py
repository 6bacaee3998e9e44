"""What memory and time a run takes, told before it trains."""

from __future__ import annotations

import torch

from cvfp import ops
from cvfp.config import Experiment, ParameterError, resolve_device, resolve_precision
from cvfp.embeddings import FIT_LOGITS
from cvfp.ops import placement

# Numbers for each that is trained: itself, gradient, two moments of Adam, the best epoch's.
TRAINED = 5
# The fields that memory grows with, besides the table's two.
FIELDS = ["context_dim", "num_layers", "num_input_tokens", "window_tokens", "phase2_batch_size"]
FIELDS += ["loss_group"]
WITH_PHASE1 = ("trained", "shuffled", "fine_tuned")


def memory(experiment: Experiment, vocab_size: int, embedding_dim: int, tokens: int) -> int:
    """Bytes on the device at the peak, to within a factor of about two; without contexts."""
    table, layers = vocab_size * embedding_dim, experiment.num_layers
    context, token = _blocks(experiment, embedding_dim)
    fit = 3 * (table + FIT_LOGITS) + TRAINED * embedding_dim**2
    # A group at least, with what each layer keeps of it.
    kept = placement.LAYER_BYTES // 4 * layers + 12
    group = kept * experiment.context_dim + embedding_dim * experiment.num_input_tokens
    first = TRAINED * context + min(experiment.loss_group, tokens) * group
    ends = table * ((not experiment.weight_tying) + (not experiment.freeze_embedding))
    position = 3 * token // (layers * embedding_dim) + 2 * vocab_size
    batch = min(experiment.phase2_batch_size, tokens)
    second = TRAINED * (token + ends) + context + batch * position
    return 4 * (3 * table + max(fit * (experiment.embedding == "bigram"), first, second))


def seconds(one: Experiment, vocab_size: int, embedding_dim: int, tokens: int) -> float:
    """Of both phases where neither stops early, nearly, at usual sizes: their products at
    a quarter of the rate that this machine reaches in large ones. Small batches, and token after
    token, take several times as long."""
    context, token = _blocks(one, embedding_dim)
    sweeps = one.phase1_max_iterations if one.contexts in WITH_PHASE1 else 2
    epoch = 6 * (token + vocab_size * embedding_dim) + 2 * context
    per_token = 6 * context * sweeps + epoch * one.phase2_epochs
    dtype = getattr(torch, resolve_precision(one.precision, one.device))
    rate = max(ops.product_rate(one.device, dtype) for _ in range(4))
    return 4 * tokens * per_token / rate


def check(one: Experiment, vocab_size: int | None, embedding_dim: int | None, tokens: int) -> None:
    """Refuse an Experiment whose tensors cannot fit the device: a `ParameterError` that names up to
    three fields and values that fit, each alone. `vocab_size`, `embedding_dim`: None where not
    known yet; `tokens` to train on, as far as known."""
    device = torch.device(resolve_device(one.device))
    most = placement.memory(device)
    sizes = {"vocab_size": vocab_size or 1, "embedding_dim": embedding_dim or 1}
    sizes |= {name: getattr(one, name) for name in FIELDS}

    def needed(**changed: int) -> int:
        vocab, dim, *others = (sizes | changed).values()
        return memory(one.replace(**dict(zip(FIELDS, others, strict=True))), vocab, dim, tokens)

    if needed() <= most:
        return
    helping: dict[str, int] = {}
    for name, value in sizes.items():
        while value > 3 and needed(**{name: value}) > most:
            value //= 2
        if needed(**{name: value}) <= most:
            helping[name] = value
    best = sorted(helping, key=lambda name: sizes[name] / helping[name])[:3] or ["num_layers"]
    helps = " or ".join(f"{name} of at most about {helping[name]:,}" for name in best if helping)
    size = f"{needed() / 2**30:,.0f} GiB, this {device.type} has {most / 2**30:,.0f}"
    accepted = f"{helps or 'far smaller sizes'} (the run needs {size})"
    raise ParameterError(best[0], sizes[best[0]], accepted)


def _blocks(experiment: Experiment, embedding_dim: int) -> tuple[int, int]:
    """Weights of the published ContextBlock and of the TokenBlock, nearly."""
    layers, width = experiment.num_layers, experiment.context_dim
    inputs, sees, squares = embedding_dim * experiment.num_input_tokens, layers, 1
    if not experiment.token_input_all_layers:  # equal-decrease: residuals have weights, too
        width, sees, squares = width + inputs // 2, 1, 2
    reads = experiment.window_tokens * embedding_dim if experiment.contexts == "window" else width
    context = squares * layers * width**2 + sees * width * inputs
    return context, layers * embedding_dim * (reads + embedding_dim)
