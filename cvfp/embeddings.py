"""Embedding tables [V, E]: fitted, random or pretrained."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cvfp import cache, ops, seeds
from cvfp.config import Experiment, ParameterError
from cvfp.data import Data
from cvfp.hub import pretrained
from cvfp.tokenizer import Stream

Report = Callable[[dict[str, float]], None]
RANDOM_STD = 0.02  # GPT-2's

# Chosen on conversations 401-500 of chitchat's fitting set with the table fitted on the first 400
# (perplexity there 142; without decay 160 after 100 steps, and rising): never on validation.
FIT_STEPS = 60
FIT_LEARNING_RATE = 0.05
FIT_DECAY = 3.0
FIT_STD = 0.1
FIT_SEED = 0
# Logits in memory at once when fitting: 4 M numbers, 16 MB, about a processor's cache.
FIT_LOGITS = 2**22

PPMI_WINDOW = 5
# Randomised SVD (Halko et al. 2011): extra directions, and power iterations.
PPMI_OVERSAMPLING = 32
PPMI_PASSES = 4
PPMI_NORM = 3.88  # about the mean norm of GPT-2's rows


@dataclass(frozen=True)
class BigramLM:
    """The language model whose table is `bigram`: logits LN(W·E[x] + E[x])·Eᵀ + b."""

    table: Tensor  # E, [V, E]
    weight: Tensor  # W, [E, E]
    bias: Tensor  # b, [V]

    def hidden(self, tokens: Tensor) -> Tensor:
        """LN(W·E[x] + E[x]) for each of `tokens`: [B, E]."""
        rows = self.table[tokens]
        return F.layer_norm(F.linear(rows, self.weight) + rows, rows.shape[-1:])

    @torch.no_grad()
    def nats(self, tokens: Tensor) -> Tensor:
        """Cross-entropy of tokens 1 … T-1 after the token before each: nats, float64 [T-1]."""
        pieces = []
        for current, target in zip(tokens[:-1].split(4096), tokens[1:].split(4096), strict=True):
            logits = F.linear(self.hidden(current), self.table, self.bias)
            pieces.append(F.cross_entropy(logits, target, reduction="none").double())
        return torch.cat(pieces)


@dataclass(frozen=True)
class Table:
    """An embedding table; with its language model, if it was fitted as one."""

    weight: Tensor  # [V, E] float32, on the CPU
    bigram: BigramLM | None = None

    @cached_property
    def fingerprint(self) -> str:
        return cache.digest(self.weight)


def load(experiment: Experiment, data: Data, report: Report = lambda row: None) -> Table:
    """The embedding table of an Experiment; a fitted one is cached on disk, and `report` called
    after each step of the fit with {"step", "fit_loss"}. Raises `ParameterError`: a table that
    cannot be loaded, has another width than `embedding_dim`, fewer rows than the tokeniser has
    tokens, or numbers of which nothing can be learnt."""
    if experiment.embedding == "random":
        assert experiment.embedding_dim is not None
        generator = seeds.generator(experiment.seed, "embedding")
        weight = torch.empty(data.vocab_size, experiment.embedding_dim)
        return Table(weight.normal_(0.0, RANDOM_STD, generator=generator))
    if experiment.embedding in ("bigram", "ppmi"):
        return _fitted(experiment, data, report)
    table = pretrained("embedding", experiment.embedding, _from_transformers)
    weight = table.weight
    if experiment.embedding_dim not in (None, weight.shape[1]):
        accepted = f"None, or {weight.shape[1]} with embedding {experiment.embedding!r}"
        raise ParameterError("embedding_dim", experiment.embedding_dim, accepted)
    if len(weight) < data.vocab_size:
        accepted = f"a table of at least {data.vocab_size} rows, for tokenizer "
        accepted += f"{experiment.tokenizer!r} (this one has {len(weight)})"
        raise ParameterError("embedding", experiment.embedding, accepted)
    finite = bool(weight.isfinite().all())
    if not finite or bool((weight == weight[0]).all()):
        accepted = "a table whose rows differ" if finite else "a table without NaN or infinity"
        raise ParameterError("embedding", experiment.embedding, accepted)
    return table


def _from_transformers(name: str, local: bool) -> Table:
    import transformers

    model: Any = transformers.AutoModel.from_pretrained(name, local_files_only=local)
    return Table(model.get_input_embeddings().weight.detach().float().clone())


def _fitted(experiment: Experiment, data: Data, report: Report) -> Table:
    kind, size, dim = experiment.embedding, data.vocab_size, experiment.embedding_dim
    assert dim is not None
    if kind == "ppmi" and dim > size:
        accepted = f"at most the vocabulary's {size} with embedding 'ppmi'"
        raise ParameterError("embedding_dim", dim, accepted)

    def fit() -> dict[str, Tensor]:
        if kind == "ppmi":
            return {"table": fit_ppmi(data.fitting, size, dim)}
        return vars(fit_bigram(data.fitting, size, dim, report))

    code = [cache.code_fingerprint("data", "embeddings"), torch.__version__]
    key = cache.digest(code, kind, size, dim, data.fitting.tokens, data.fitting.starts)
    return _table(_Fitted(cache.home(), key, fit))


@dataclass(frozen=True)
class _Fitted:
    home: Path
    key: str
    fit: Callable[[], dict[str, Tensor]] = field(compare=False)


@functools.lru_cache(maxsize=2)  # a table is large, and hashing it takes longer than loading
def _table(fitted: _Fitted) -> Table:
    tensors = cache.tensors("tables", fitted.key, fitted.fit)
    return Table(tensors["table"], BigramLM(**tensors) if len(tensors) > 1 else None)


def fit_ppmi(fitting: Stream, vocab_size: int, embedding_dim: int) -> Tensor:
    """Table [V, E] from positive pointwise mutual information (Levy, Goldberg and Dagan 2015):
    co-occurrences count up to `PPMI_WINDOW` tokens apart in a sample, weighted 1/distance. The
    table is U·√Σ of their PPMI matrix, its rows scaled to the norm `PPMI_NORM`. Tokens that do
    not occur get zeros. Good as inputs; as a tied head it lacks the tokens' frequencies."""
    sample = torch.bucketize(torch.arange(len(fitting)), fitting.starts, right=True)
    keys, weights = [], []
    for distance in range(1, PPMI_WINDOW + 1):
        inside = sample[distance:] == sample[:-distance]
        first, second = fitting.tokens[:-distance][inside], fitting.tokens[distance:][inside]
        keys += [first * vocab_size + second, second * vocab_size + first]
        weights += 2 * [torch.full((len(first),), 1 / distance, dtype=torch.float64)]
    pairs, which = torch.unique(torch.cat(keys), return_inverse=True)
    counts = torch.bincount(which, torch.cat(weights))
    first, second = pairs // vocab_size, pairs % vocab_size
    margin = torch.bincount(first, counts, vocab_size)
    information = torch.log(counts * counts.sum() / (margin[first] * margin[second]))
    positive = information > 0
    ends = torch.bincount(first[positive], minlength=vocab_size).cumsum(0)
    rank = min(vocab_size, embedding_dim + PPMI_OVERSAMPLING)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # "in beta state"
        values, shape = information[positive].float(), (vocab_size, vocab_size)
        matrix = torch.sparse_csr_tensor(F.pad(ends, (1, 0)), second[positive], values, shape)
        torch.manual_seed(FIT_SEED)
        left, singular, _ = torch.svd_lowrank(matrix, rank, niter=PPMI_PASSES)
    rows = left[:, :embedding_dim] * singular[:embedding_dim].sqrt()
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    occurs = (margin > 0)[:, None] & (norm > 0)
    return torch.where(occurs, rows * (PPMI_NORM / norm.clamp(min=1e-30)), 0.0)


def bigram_counts(stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct bigrams within the stream's samples, sorted: first [K], second [K], count [K]."""
    inside = torch.ones(len(stream) - 1, dtype=torch.bool)
    inside[stream.starts[1:] - 1] = False  # samples do not continue one another
    pairs = torch.stack([stream.tokens[:-1], stream.tokens[1:]])[:, inside]
    unique, counts = torch.unique(pairs, dim=1, return_counts=True)
    return unique[0], unique[1], counts


def _sums_of_runs(rows: Tensor, weights: Tensor, lengths: Tensor) -> Callable[[Tensor], Tensor]:
    """table [V, E] -> weighted sums of its `rows`, one for each run of `lengths` of them."""
    begins = lengths.cumsum(0) - lengths
    how: dict[str, Any] = dict(mode="sum", per_sample_weights=weights)
    return lambda table: F.embedding_bag(rows, table, begins, **how)


def fit_bigram(
    fitting: Stream, vocab_size: int, embedding_dim: int, report: Report = lambda row: None
) -> BigramLM:
    """Fit the bigram language model on the stream's bigram counts, full batch, with AdamW; `report`
    is called after each step with {"step", "fit_loss"}, the loss in nats per bigram."""
    generator = torch.Generator().manual_seed(FIT_SEED)
    first, second, counts = bigram_counts(fitting)  # sorted by first
    share = (counts / counts.sum()).float()
    unigram = torch.bincount(second, share.double(), vocab_size).float()
    contexts, row, pairs = torch.unique_consecutive(first, return_inverse=True, return_counts=True)
    context_share = torch.bincount(row, share.double()).float()
    followers_of = _sums_of_runs(second, share, pairs)
    by_second = torch.argsort(second, stable=True)
    successors, pairs = torch.unique_consecutive(second[by_second], return_counts=True)
    preceders_of = _sums_of_runs(row[by_second], share[by_second], pairs)
    model = BigramLM(
        torch.empty(vocab_size, embedding_dim).normal_(0, FIT_STD, generator=generator),
        torch.empty(embedding_dim, embedding_dim).normal_(0, FIT_STD / 10, generator=generator),
        torch.zeros(vocab_size),  # E has to learn the frequencies: only E is used afterwards
    )
    parameters = [one.requires_grad_() for one in (model.table, model.weight, model.bias)]
    decayed = {"params": [model.table, model.weight], "weight_decay": FIT_DECAY}
    others = {"params": [model.bias], "weight_decay": 0.0}
    optimiser = torch.optim.AdamW([decayed, others], lr=FIT_LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, FIT_STEPS)
    chunk = max(1, FIT_LOGITS // vocab_size)
    for step in range(1, FIT_STEPS + 1):
        optimiser.zero_grad(set_to_none=True)
        # Cross-entropy = Σ_x n(x)·logsumexp(x) − Σ_xy n(x,y)·logit(x,y). The second sum runs over
        # observed pairs only, its gradients by hand: autograd's sums depend on the order of the
        # threads, and the same fit would not give the same table twice.
        hidden = model.hidden(contexts)
        leaf = hidden.detach().requires_grad_(True)
        followers = followers_of(model.table.detach())
        loss = -(leaf.detach() * followers).sum()
        # The first sum in chunks of contexts, so that any vocabulary fits in memory.
        for piece, weight in zip(leaf.split(chunk), context_share.split(chunk), strict=True):
            part = ops.log_partition(piece, model.table, model.bias, weight)
            part.backward()
            loss += part.detach()
        part = -(unigram * model.bias).sum()
        part.backward()
        loss += part.detach()
        assert leaf.grad is not None
        hidden.backward(leaf.grad - followers)
        assert model.table.grad is not None
        model.table.grad[successors] -= preceders_of(leaf.detach())
        optimiser.step()
        schedule.step()
        report({"step": float(step), "fit_loss": float(loss)})
    return BigramLM(*(parameter.detach() for parameter in parameters))
