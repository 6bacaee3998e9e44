"""The exact evaluation of the recurrence, and its diagnosis, against plain loops in float64."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import math
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cvfp import contexts, phase1
from cvfp.config import Experiment
from cvfp.inputs import TokenInputs
from cvfp.model import ContextBlock, initialise
from cvfp.recurrence import diagnose

METHODS = ("sequential", "blocks")
D, E, V = 16, 12, 40


def stream(
    total: int, n: int = 1, dtype: torch.dtype = torch.float64, vocabulary: int = V, seed: int = 0
) -> TokenInputs:
    """Random tokens and table; the same numbers in either precision."""
    generator = torch.Generator().manual_seed(1000 * seed + total)
    table = torch.randn(vocabulary, E, generator=generator)
    inputs = TokenInputs(torch.randint(vocabulary, (total,), generator=generator), table, n)
    inputs.table = inputs.table.to(dtype)
    return inputs


@functools.cache
def _block(layers: int, n: int, every: bool, trained: bool) -> ContextBlock:
    block = ContextBlock(layers, D, n * E, every)
    initialise(block, torch.Generator().manual_seed(layers))
    if trained:
        experiment = Experiment(
            context_dim=D,
            embedding_dim=E,
            device="cpu",
            precision="float32",
            phase1_max_iterations=40,
            phase1_min_iterations=40,
        )
        generator = torch.Generator().manual_seed(1)
        # In float64, and to the end: half-trained blocks amplify differences a thousandfold, so
        # that rounding alone decides whether float32 keeps 1e-4, otherwise on every machine.
        phase1.train(block.double(), stream(400, n, seed=7), experiment, generator)
    return block


def make_block(
    layers: int, n: int = 1, every: bool = True, *, trained: bool = False, scale: float = 1.0
) -> ContextBlock:
    """A block in float64, with random weights or after some iterations of Phase 1."""
    block = copy.deepcopy(_block(layers, n, every, trained)).double()
    with torch.no_grad():
        for linear in block.linears:
            linear.weight.mul_(scale)
    return block


def formula(block: ContextBlock) -> Callable[[Tensor, Tensor], Tensor]:
    """c <- LayerNorm(residual(c) + ReLU(Linear([c ; e]))), L times, from the weights alone."""
    weights = {name: value.detach() for name, value in block.state_dict().items()}

    def linear(name: str, read: Tensor) -> Tensor:
        return F.linear(read, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def apply(c: Tensor, e: Tensor) -> Tensor:
        for i in range(len(block.linears)):
            reads = weights[f"linears.{i}.weight"].shape[1]
            made = F.relu(linear(f"linears.{i}", c if reads == len(c) else torch.cat([c, e])))
            kept = linear(f"residuals.{i}", c) if f"residuals.{i}.weight" in weights else c
            norm = weights[f"norms.{i}.weight"], weights[f"norms.{i}.bias"]
            c = F.layer_norm(kept + made, made.shape, *norm)
        return c

    return apply


def loop(block: ContextBlock, e: Tensor, initial: Tensor | None = None) -> Tensor:
    """The oracle: one token after the other."""
    apply = formula(block)
    c = e.new_zeros(block.context_dim) if initial is None else initial
    rows = []
    for row in e:
        c = apply(c, row)
        rows.append(c)
    return torch.stack(rows)


def largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def error(made: Tensor, wanted: Tensor) -> float:
    """The largest relative error of a context."""
    return float(((made - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


# --- Equal to the loop ---------------------------------------------------------------------------

# Deep equal-decrease blocks with random weights amplify any difference token by token (see the test
# of chaos below), so that rounding grows beyond the tolerance within 79 tokens, in the plain loop
# too: (layers, n) of those, which are compared on a stream as long as the precision reaches.
CHAOTIC = {(5, 1), (6, 1), (6, 2), (5, 3)}
WHOLE = {torch.float64: 79, torch.float32: 79}
REACH = {torch.float64: 40, torch.float32: 10}
PRECISION = {torch.float64: (1e-12, 1e-10), torch.float32: (1e-6, 1e-4)}  # tol, and the error

# 79 is no multiple of 7 (blocks shorter than the warm-up: none) and of 36 (with a warm-up).
WAYS: list[dict[str, Any]] = [
    dict(method="sequential"),
    dict(method="blocks", block_length=7),
    dict(method="blocks", block_length=36),
]


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize(
    "layers", [1, 2, 6, *(pytest.param(n, marks=pytest.mark.full) for n in (3, 4, 5))]
)
def test_every_method_equals_the_loop(layers: int, every: bool) -> None:
    for n, trained in itertools.product((1, 2, 3), (False, True)):
        block = make_block(layers, n, every, trained=trained)
        single = copy.deepcopy(block).float()
        e = stream(79, n).dense()
        wanted = loop(block, e)
        chaotic = not every and not trained and (layers, n) in CHAOTIC
        # Listed if and only if need be.
        assert (largest(loop(single, e.float()) - wanted) > 1e-4) == chaotic
        for made_by, (dtype, total) in itertools.product(
            WAYS, (REACH if chaotic else WHOLE).items()
        ):
            tol, most = PRECISION[dtype]
            given = block if dtype is torch.float64 else single
            for length in (1, total):
                made = contexts.evaluate(given, e[:length].to(dtype), tol=tol, **made_by)
                assert made.converged, (n, trained, made_by)
                assert made.values.dtype == dtype
                assert largest(made.values - wanted[:length]) < most, (n, trained, made_by)


def test_a_chaotic_block_is_exact_for_a_short_stream() -> None:
    """Trajectories part by 18 % a token: no evaluation, loop or not, is exact for long."""
    block, inputs = make_block(6, every=False), stream(1000)
    e = inputs.dense()
    values = contexts.evaluate(block, inputs, method="sequential").values
    found = diagnose(block, inputs, values)
    assert found.contraction_rate is not None
    assert found.contraction_rate > 1.1
    assert found.memory_length is None
    # A difference of 1e-9 at the start grows to the size of a context …
    wanted = loop(block, e[:300])
    nudged = loop(block, e[:300], torch.full((D,), 1e-9, dtype=torch.float64))
    assert error(nudged[:1], wanted[:1]) < 1e-7
    assert error(nudged, wanted) > 0.1
    # … but that of rounding does not within 40 tokens.
    assert largest(values[:40] - wanted[:40]) < 1e-10
    for length in (7, 36):
        made = contexts.evaluate(block, e[:40], tol=1e-12, block_length=length)
        assert made.converged
        assert largest(made.values - wanted[:40]) < 1e-10


LENGTHS = [None, 1, 7, 32, 500]


@pytest.mark.parametrize("length", LENGTHS)
def test_any_stream_length_and_block_length(length: int | None) -> None:
    block, e = make_block(1, scale=3), stream(200).dense()
    wanted = loop(block, e)
    for total in range(1, 201, {None: 1, 1: 11}.get(length, 5)):
        made = contexts.evaluate(block, e[:total], tol=1e-13, block_length=length)
        assert made.converged, total
        assert largest(made.values - wanted[:total]) < 1e-11, total


@pytest.mark.parametrize("method", METHODS)
def test_initial_state_continues_a_stream(method: Any) -> None:
    block, inputs = make_block(2), stream(90)
    whole = loop(block, inputs.dense())
    rest = contexts.evaluate(
        block,
        inputs.dense(slice(50, None)),
        method=method,
        tol=1e-12,
        initial=whole[49],
        block_length=8,
    )
    assert rest.converged
    assert largest(rest.values - whole[50:]) < 1e-10


def test_the_first_sweeps_of_blocks_are_as_described() -> None:
    """The last 32 tokens of each block from zeros, then all blocks from the states this gives."""
    block, e = make_block(2), stream(190).dense()
    cuts = range(40, 190, 40)
    warm = torch.stack([loop(block, e[cut - 32 : cut])[-1] for cut in cuts])
    whole = [loop(block, e[:40])] + [
        loop(block, e[cut : cut + 40], start) for cut, start in zip(cuts, warm, strict=True)
    ]
    handed = torch.stack([rows[-1] for rows in whole[:-1]])
    made = contexts.evaluate(block, e, block_length=40, max_sweeps=2)
    assert largest(made.values - torch.cat(whole)) < 1e-12
    first, second = made.residuals
    assert first == pytest.approx(dict(absolute=float(warm.norm(dim=1).max()), relative=1))
    assert second["absolute"] == pytest.approx(float((handed - warm).norm(dim=1).max()))
    assert second["relative"] == pytest.approx(error(warm, handed))


@pytest.mark.parametrize("total", [38, 40])
def test_what_is_final_is_not_run_again(total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chaotic block, in five blocks: every sweep makes one final, and runs those after it."""
    block, e = make_block(6, every=False), stream(total).dense()
    rows, forward = [], ContextBlock.forward
    monkeypatch.setattr(
        ContextBlock, "forward", lambda self, c, e: rows.append(len(c)) or forward(self, c, e)
    )
    made = contexts.evaluate(block, e, block_length=8, tol=1e-12)
    assert made.converged
    assert made.sweeps == 5
    assert sum(rows) == 8 * (5 + 4 + 3 + 2 + 1)  # the last block is cut when all is done


# --- Convergence, and what is said about it ------------------------------------------------------


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("length", [5, 16, 40, None])
def test_a_stiff_block_converges_or_says_so(length: int | None, every: bool) -> None:
    total = 150 if every else 60  # rounding grows: not 1e-10 for longer streams
    for layers in (2, 3):
        block, e = make_block(layers, every=every, scale=3), stream(total).dense()
        wanted = loop(block, e)
        for most in (1, 2, 3, 5, None):
            made = contexts.evaluate(block, e, tol=1e-12, block_length=length, max_sweeps=most)
            assert made.sweeps == len(made.residuals) <= (most or math.inf)
            if made.converged:
                assert largest(made.values - wanted) < 1e-10
        # One block is final by each sweep, and one sweep sees it; one more to warm up.
        assert made.converged
        assert made.sweeps <= math.ceil(total / (length or 64)) + 1


def test_one_sweep_is_not_enough() -> None:
    block, inputs = make_block(2), stream(200)
    for length in (10, 40):
        assert not contexts.evaluate(block, inputs, max_sweeps=1, block_length=length).converged


Spoil = Callable[[ContextBlock, Tensor, float], None]


def _spoil(part: str, position: int) -> Spoil:
    def spoil(block: ContextBlock, e: Tensor, value: float) -> None:
        state = block.state_dict()
        (e[position] if part == "e" else state[part].flatten())[3] = value

    return spoil


# In the middle of the stream; at its very end, which no hand-over sees; in each kind of weight.
SPOILT = [
    _spoil("e", 45),
    _spoil("e", 89),
    _spoil("linears.0.weight", 0),
    _spoil("linears.2.bias", 0),
    _spoil("norms.1.weight", 0),
    _spoil("norms.2.bias", 0),
    _spoil("residuals.1.weight", 0),
]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_values_that_are_not_finite_never_converge(method: Any, value: float) -> None:
    for spoil in SPOILT:
        block, e = make_block(3, every=False), stream(90).dense()
        spoil(block, e, value)
        lengths = (7, 40, 200) if method == "blocks" else (None,)
        for most, length in itertools.product((3, None), lengths):
            made = contexts.evaluate(block, e, method=method, max_sweeps=most, block_length=length)
            assert not made.converged
            assert not math.isfinite(float(made.values.sum()))
    block, inputs = make_block(3), stream(90)
    inputs.table[int(inputs.rows[45, 0]), 0] = value
    assert not contexts.evaluate(block, inputs, method=method).converged
    initial = torch.full((D,), value)
    assert not contexts.evaluate(block, e, method=method, initial=initial).converged


@functools.cache
def forgetful() -> list[tuple[ContextBlock, Tensor, Tensor]]:
    """Blocks, inputs and exact contexts, where rounding does not grow: the bound leaves it out."""
    found = []
    for layers, every, trained, scale in itertools.product(
        (1, 3, 6), (True, False), (True, False), (0.5, 1.0, 2.0)
    ):
        block = make_block(layers, 2, every, trained=trained, scale=scale)
        e = stream(300, 2).dense()
        wanted = contexts.evaluate(block, e, method="sequential").values
        nudge = torch.full((D,), 1e-13, dtype=torch.float64)
        nudged = contexts.evaluate(block, e, method="sequential", initial=nudge).values
        if error(nudged, wanted) < 1e-11:
            found.append((block, e, wanted))
    assert len(found) >= 30
    return found


ROUNDING = 1e-11


@pytest.mark.parametrize("tol", [1e-5, 1e-3])
@pytest.mark.parametrize("length", [7, 40])
def test_no_error_is_larger_than_its_bound(length: int, tol: float) -> None:
    for (block, e, wanted), most in itertools.product(forgetful(), (3, None)):
        made = contexts.evaluate(block, e, tol=tol, max_sweeps=most, block_length=length)
        assert error(made.values, wanted) <= made.error_bound + ROUNDING
        # Around `tol`, unless blocks are too short to forget in.
        tight = made.converged and length >= 40
        assert made.error_bound < 2000 * tol or not tight


def test_what_does_not_contract_has_no_small_bound() -> None:
    block, e = make_block(6, every=False), stream(400).dense()
    for most in (1, 2, 3, 5):
        made = contexts.evaluate(block, e, block_length=20, max_sweeps=most)
        assert not made.converged
        assert made.error_bound > 0.1


def test_the_loop_and_a_lone_block_have_no_error() -> None:
    block, e = make_block(2), stream(60).dense()
    made = contexts.evaluate(block, e, method="sequential")
    assert (made.residuals, made.sweeps, made.converged, made.error_bound) == ([], 1, True, 0)
    for total, sweeps in ((64, 1), (65, 2)):  # one block, and two
        made = contexts.evaluate(block, stream(total), max_sweeps=2)
        assert made.sweeps == sweeps
        assert made.converged == (made.error_bound == 0) == (sweeps == 1)


# --- Diagnosis -----------------------------------------------------------------------------------


def lyapunov(block: ContextBlock, e: Tensor, values: Tensor) -> float:
    """exp of the largest exponent: a tangent, carried by the Jacobians of the exact trajectory."""
    jacobians = torch.func.vmap(torch.func.jacrev(formula(block)))(values[:-1], e[1:])
    tangent = torch.randn(D, generator=torch.Generator().manual_seed(0)).double()
    logs = []
    for jacobian in jacobians:
        tangent = jacobian @ tangent
        logs.append(tangent.norm().log())
        tangent = tangent / tangent.norm()
    return float(torch.stack(logs[50:]).mean().exp())  # by then it points its own way


@pytest.mark.parametrize(
    ("block", "chaotic"),
    [
        (make_block(2), False),
        (make_block(6, 2, trained=True), False),
        (make_block(5, every=False), True),
        (make_block(6, every=False, scale=1.5), True),
    ],
)
def test_contraction_rate_is_the_largest_lyapunov_exponent(
    block: ContextBlock, chaotic: bool
) -> None:
    inputs = stream(2000, block.input_dim // E)
    values = contexts.evaluate(block, inputs, method="sequential").values
    wanted = lyapunov(block, inputs.dense(), values)
    found = diagnose(block, inputs, values)
    assert found.contraction_rate == pytest.approx(wanted, rel=0.02)
    assert (wanted > 1) == chaotic
    single = copy.deepcopy(block).float()
    inputs.table = inputs.table.float()
    found = diagnose(single, inputs, values.float())
    assert found.contraction_rate == pytest.approx(wanted, rel=0.02)


def test_larger_weights_contract_less() -> None:
    rates = []
    for scale in (0.5, 1.0, 1.5):
        block, inputs = make_block(6, every=False, scale=scale), stream(500)
        values = contexts.evaluate(block, inputs, method="sequential").values
        rates.append(diagnose(block, inputs, values).contraction_rate)
    assert rates[0] < rates[1] < rates[2]


@pytest.mark.parametrize("total", [5, 40, 300])
def test_memory_length_is_its_definition(total: int) -> None:
    """k tokens after a restart from zeros, for every position that has so many before it."""
    block, inputs = make_block(3, 3, every=False, trained=True), stream(total, 3)
    e, apply = inputs.dense(), formula(block)
    exact = loop(block, e)
    distances: list[float] = []
    restarted = {p: torch.zeros(D).double() for p in range(1, total)}
    for k in range(1, total):
        # restarted[p]: the context at p after the k tokens p-k+1 … p
        restarted = {p: apply(restarted[p - (k > 1)], e[p]) for p in range(k, total)}
        far = [float((c - exact[p]).norm() / exact[p].norm()) for p, c in restarted.items()]
        distances.append(sum(far) / len(far))
        if distances[-1] < 0.01 and k >= 30:
            break
    found = diagnose(block, inputs, exact)
    assert found.memory_length == next((k for k, d in enumerate(distances, 1) if d < 0.01), None)
    assert found.memory_length is not None or total == 5
    assert len(found.distances) >= (found.memory_length or total - 1)
    together = min(len(distances), len(found.distances))
    # Relative to the exact context here, to the restarted one there: equal where they are.
    assert found.distances[:together] == pytest.approx(distances[:together], rel=5e-3)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_the_shortest_streams_have_no_rate(total: int) -> None:
    block, inputs = make_block(2), stream(total)
    found = diagnose(block, inputs, loop(block, inputs.dense()))
    assert found.contraction_rate is None
    assert found.memory_length is None
    assert len(found.distances) == total - 1


# --- Precision -----------------------------------------------------------------------------------

# In a process of its own, as torch refuses the old setting once the new ones have been used. Each
# setting: to what, how to read it, and how to go back.
SETTINGS = """
import json, sys
import torch
from cvfp import contexts
from cvfp.inputs import TokenInputs
from cvfp.model import ContextBlock, initialise
from cvfp.recurrence import diagnose

generator = torch.Generator().manual_seed(0)
block = ContextBlock(2, 64, 64, True)
initialise(block, generator)
tokens = torch.randint(20, (50,), generator=generator)
torch.set_num_threads(1)
inputs = TokenInputs(tokens, torch.randn(20, 64, generator=generator), 1)
mkldnn, cuda = torch.backends.mkldnn, torch.backends.cuda
plain = [contexts.evaluate(block, inputs, method=m).values for m in sys.argv[1:]]
known = diagnose(block, inputs, plain[0])
used, forward = set(), ContextBlock.forward


def watched(self, *given):
    used.update([mkldnn.matmul.fp32_precision, cuda.matmul.fp32_precision])
    return forward(self, *given)


def same():
    made = [contexts.evaluate(block, inputs, method=m).values for m in sys.argv[1:]]
    equal = all(map(torch.equal, made, plain))
    return equal and diagnose(block, inputs, plain[0]) == known


ContextBlock.forward = watched
found = {}
for precision in ("medium", "high", "highest"):
    torch.set_float32_matmul_precision(precision)
    equal = same()
    found[precision] = equal, torch.get_float32_matmul_precision() == precision
for name, backend, value in (
    ("mkldnn", mkldnn.matmul, "bf16"),
    ("cuda", cuda.matmul, "tf32"),
    ("inherited", mkldnn, "bf16"),
):
    backend.fp32_precision = value
    equal = same()
    kept = backend.fp32_precision == value
    backend.fp32_precision = "none"
    found[name] = equal, kept and mkldnn.matmul.fp32_precision == "none"
    mkldnn.matmul.fp32_precision = cuda.matmul.fp32_precision = "none"
found["inside"] = sorted(used)
print(json.dumps(found))
"""


@functools.cache
def settings() -> dict[str, Any]:
    command = [sys.executable, "-c", SETTINGS, *METHODS]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


newer = pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul")
    or not hasattr(torch.backends.mkldnn.matmul, "fp32_precision"),
    reason="torch before 2.9 has one setting",
)


@newer
@pytest.mark.parametrize("name", ["medium", "high", "highest", "mkldnn", "cuda", "inherited"])
def test_reduced_precision_is_neither_used_nor_undone(name: str) -> None:
    equal, unchanged = settings()[name]
    assert equal
    assert unchanged
    # What can be told on hardware without bfloat16 products, too.
    assert settings()["inside"] == ["ieee"]


@pytest.mark.parametrize("method", METHODS)
def test_autocast_is_neither_used_nor_undone(method: Any) -> None:
    block, inputs = make_block(2).float(), stream(300, dtype=torch.float32)
    plain = contexts.evaluate(block, inputs, method=method).values
    known = diagnose(block, inputs, plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contexts.evaluate(block, inputs, method=method).values, plain)
        assert diagnose(block, inputs, plain) == known
        assert torch.is_autocast_enabled("cpu")
        assert block.linears[0](torch.ones(1, D + E)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("weights", "table"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float64, torch.float32),
    ],
)
def test_types_that_do_not_fit_are_named(weights: torch.dtype, table: torch.dtype) -> None:
    block, inputs = make_block(2).to(weights), stream(10, dtype=table)
    for given in (inputs, inputs.dense()):
        with pytest.raises(ValueError, match=rf"inputs: got {table} for weights of {weights}; acc"):
            contexts.evaluate(block, given)
        with pytest.raises(ValueError, match="inputs: got"):
            diagnose(block, given, torch.zeros(10, D))


# --- Gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_there_are_no_gradients(method: Any) -> None:
    block, inputs = make_block(2), stream(50)
    e = inputs.dense().requires_grad_()
    table = torch.randn(V, E, dtype=torch.float64, requires_grad=True)
    for given in (e, TokenInputs(torch.arange(V), table, 1)):
        with pytest.raises(ValueError, match="inputs: got a tensor that requires gradients; acc"):
            contexts.evaluate(block, given, method=method)
        with pytest.raises(ValueError, match="inputs: got a tensor that requires gradients; acc"):
            diagnose(block, given, torch.zeros(len(given), D).double())
    initial = torch.zeros(D, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="initial: got a tensor that requires gradients; acc"):
        contexts.evaluate(block, inputs, method=method, initial=initial)
    assert torch.is_grad_enabled()
    assert all(weight.requires_grad for weight in block.parameters())
    assert not contexts.evaluate(block, inputs, method=method).values.requires_grad


# --- Memory --------------------------------------------------------------------------------------


class Meter(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still there, and their peak."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:  # else a view, or made in place
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
        self.peak = max(self.peak, self.now)
        return made

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def test_the_meter_meters() -> None:
    known = torch.zeros(100)
    with Meter(known) as meter:
        first = known + 1  # 400 bytes
        first[3:].mul_(2)
        second = torch.cat([first, known])  # 800
        del first
        third = second[:50].clone()  # 200, now that 400 are gone
        del second
    assert (meter.peak, meter.now) == (1200, 200)
    del third
    assert meter.now == 0


class EnoughError(Exception):
    pass


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_memory_beyond_inputs_and_values_is_a_quarter_of_them(
    method: Any, every: bool, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    total, width, vocabulary = 20_000, 128, 4096  # of `mini`
    generator = torch.Generator().manual_seed(0)
    block = ContextBlock(3, width, width, every)
    initialise(block, generator)
    tokens = torch.randint(vocabulary, (total,), generator=generator)
    inputs = TokenInputs(tokens, torch.randn(vocabulary, width, generator=generator), 1)
    given = inputs.dense() if dense else inputs
    held = [given] if isinstance(given, Tensor) else [given.table, given.rows]
    values = total * width * 4
    if method == "sequential":  # its slices are alike: two tell as much as twenty
        forward, calls = ContextBlock.forward, itertools.count()

        def enough(*args: Any) -> list[Tensor]:
            if next(calls) > 2100:
                raise EnoughError
            return forward(*args)

        monkeypatch.setattr(ContextBlock, "forward", enough)
    with Meter(*held, *block.parameters()) as meter, contextlib.suppress(EnoughError):
        contexts.evaluate(block, given, method=method, max_sweeps=3)
    limit = 0.25 * (values + sum(tensor.untyped_storage().nbytes() for tensor in held))
    share = (meter.peak - values) / limit * 25
    assert 0 < share <= 25, f"{share:.1f} %"


# --- Arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
def test_inputs_of_another_width_are_named(n: int) -> None:
    block, inputs = make_block(1, 2), stream(2000, n, vocabulary=3)
    for given in (inputs, inputs.dense()):
        with pytest.raises(ValueError, match=f"inputs: got {12 * n} columns; accepted: 24"):
            contexts.evaluate(block, given)


def test_bad_arguments_are_named() -> None:
    block, inputs = make_block(1), stream(5)
    e = inputs.dense()
    bad: list[tuple[dict[str, Any], str]] = [
        (dict(method="newton"), "method: got 'newton'; accepted: 'sequential' or 'blocks'"),
        (dict(inputs=e[:0]), "inputs: got no tokens; accepted: at least one"),
        (dict(initial=torch.zeros(3)), r"initial: got shape (3,); accepted: (16,)"),
        (dict(initial=torch.zeros(1, D)), r"initial: got shape (1, 16); accepted: (16,)"),
        (dict(tol=-1e-9), "tol: got -1e-09; accepted: 0 or more"),
        (dict(tol=math.nan), "tol: got nan; accepted: 0 or more"),
        (dict(tol=math.inf), "tol: got inf; accepted: 0 or more"),
        (dict(max_sweeps=0), "max_sweeps: got 0; accepted: None, or at least 1"),
        (dict(block_length=0), "block_length: got 0; accepted: None, or at least 1"),
        (dict(block_length=-3), "block_length: got -3; accepted: None, or at least 1"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=re.escape(message)):
            contexts.evaluate(block, **{"inputs": inputs, **arguments})
    for count in (4, 6):
        with pytest.raises(ValueError, match=f"values: got {count} contexts; accepted: 5"):
            diagnose(block, inputs, torch.zeros(count, D).double())
    with pytest.raises(ValueError, match="inputs: got no tokens"):
        diagnose(block, e[:0], torch.zeros(0, D).double())
