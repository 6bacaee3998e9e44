"""Does a Newton-type method find the exact contexts sooner than sweeps or blocks?

    python benchmarks/newton.py [tokens=20000] [samples=50] [any field of the Experiment=value ...]

Quasi-DEER (Gonzalez et al. 2024, after Lim et al. 2024): linearise the recurrence around the
current guess with the diagonal of its Jacobian, and solve the linear recurrence that results by a
parallel scan. The diagonal is taken exactly (D derivatives a token: it only shows how few
iterations the method could do with) or estimated from one random derivative (Hutchinson's). A full
Newton step needs D x D numbers a token, and their products in the scan: not tried.

Prints sweeps to a relative change of 1e-5, seconds (median of 3), and the difference to the loop.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import cvfp
from cvfp import contexts, experiment, metrics, ops, phase1, seeds
from cvfp.build import build_cvfp
from cvfp.model import Block

TOL = 1e-5
MOST = 80
Diagonal = Callable[[Callable[[Tensor], Tensor], Tensor], tuple[Tensor, Tensor]]


def scan(factor: Tensor, offset: Tensor) -> Tensor:
    """x_t = factor_t · x_{t-1} + offset_t from x_{-1} = 0, all [T, D], in log2 T passes."""
    factor, offset = factor.clone(), offset.clone()
    step = 1
    while step < len(offset):
        offset[step:] = offset[step:] + factor[step:] * offset[:-step]
        factor[step:] = factor[step:] * factor[:-step]
        step *= 2
    return offset


def exact_diagonal(apply: Callable[[Tensor], Tensor], read: Tensor) -> tuple[Tensor, Tensor]:
    diagonal = torch.empty_like(read)
    for column in range(read.shape[1]):
        direction = torch.zeros_like(read)
        direction[:, column] = 1
        made, tangent = torch.func.jvp(apply, (read,), (direction,))[:2]
        diagonal[:, column] = tangent[:, column]
    return made, diagonal


def estimated_diagonal(apply: Callable[[Tensor], Tensor], read: Tensor) -> tuple[Tensor, Tensor]:
    signs = torch.empty_like(read).bernoulli_(0.5).mul_(2).sub_(1)
    made, tangent = torch.func.jvp(apply, (read,), (signs,))[:2]
    # An estimate over 1 would make the scan blow up where the recurrence does not.
    return made, (tangent * signs).clamp(-1, 1)


def no_diagonal(apply: Callable[[Tensor], Tensor], read: Tensor) -> tuple[Tensor, Tensor]:
    return apply(read), torch.zeros_like(read)


@torch.no_grad()
def newton(block: Block, dense: Tensor, diagonal: Diagonal) -> tuple[Tensor, int | None]:
    """Contexts from zeros, and the iterations taken (None: not converged in `MOST`)."""
    values = dense.new_zeros(len(dense), block.context_dim)
    for iteration in range(1, MOST + 1):
        read = torch.cat([torch.zeros_like(values[:1]), values[:-1]])
        with ops.using("plain"):  # forward-mode derivatives
            made, factor = diagonal(lambda c: block(c, dense)[-1], read)
        new = made if diagonal is no_diagonal else scan(factor, made - factor * read)
        change = metrics.relative_errors(values, new).max()
        values = new
        if change <= TOL:
            return values, iteration
        if not torch.isfinite(change):
            break
    return values, None


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    tokens = int(given.pop("tokens", 20_000))
    exp = cvfp.Experiment.preset("mini", **{"samples": "50", **given}).resolved()
    data, table = experiment.prepare(exp)
    model = build_cvfp(exp, table.weight.to(exp.device), data.tokenizer)
    block, inputs = model.context_block, model.context_inputs(data.train.tokens.to(exp.device))
    phase1.train(block, inputs, exp, seeds.generator(exp.seed, "phase1", exp.device))
    block.requires_grad_(False)
    inputs = inputs.first(min(tokens, len(inputs)))
    dense = inputs.dense()
    right = contexts.evaluate(block, inputs, method="sequential").values

    def line(name: str, call: Callable[[], tuple[Tensor, int | None]], repeats: int = 3) -> None:
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            values, sweeps = call()
            if exp.device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        off = float(metrics.relative_errors(values, right).max())
        print(f"{name:38} {sweeps!s:>6} {statistics.median(taken):9.3f} s {off:9.1e}", flush=True)

    def blocks() -> tuple[Tensor, int | None]:
        made = contexts.evaluate(block, inputs, tol=TOL)
        return made.values, made.sweeps

    print(f"{exp.num_layers} x {exp.context_dim}, {len(inputs):,} tokens, {exp.device}")
    print(f"{'method':38} {'sweeps':>6} {'median':>11} {'off by':>9}")
    line("blocks", blocks)
    line("Jacobi sweeps", lambda: newton(block, dense, no_diagonal))
    line("quasi-DEER, estimated diagonal", lambda: newton(block, dense, estimated_diagonal))
    short = dense[: min(len(dense), 2000)]
    right = right[: len(short)]
    print(f"first {len(short):,} tokens, for the sweeps alone:")
    line("Jacobi sweeps", lambda: newton(block, short, no_diagonal), 1)
    line("quasi-DEER, exact diagonal", lambda: newton(block, short, exact_diagonal), 1)


if __name__ == "__main__":
    main(sys.argv[1:])
