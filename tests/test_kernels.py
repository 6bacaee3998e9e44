"""The compiled loops against the same in torch, in float64."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cvfp import kernels, phase1

BOTH = (torch.float32, torch.bfloat16)
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # relative: the type's rounding


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def draws(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def close(made: Tensor, wanted: Tensor, rounding: float = 2e-6) -> None:
    wanted = wanted.detach()
    largest = float(wanted.abs().max())
    torch.testing.assert_close(
        made.double(), wanted.double(), rtol=rounding, atol=rounding * max(1.0, largest)
    )


@pytest.mark.parametrize("rows", [1, 63, 300])
@pytest.mark.parametrize(("dtype", "kept_as"), list(itertools.product(BOTH, BOTH)))
def test_residual_norm(rows: int, dtype: torch.dtype, kept_as: torch.dtype, threads: int) -> None:
    width = 37
    product, residual = draws(rows, width, dtype=dtype), draws(rows, width, dtype=kept_as, seed=1)
    bias, scale, shift = draws(width, dtype=dtype), draws(width, seed=2), draws(width, seed=3)
    gradient, more = draws(rows, width, seed=4), draws(rows, width, dtype=dtype, seed=5)

    out, rounded, moments = kernels.residual_norm(product, bias, residual, scale, shift, 1e-5, True)
    leaves = [t.double().requires_grad_() for t in (residual, product, scale, shift, bias)]
    total = leaves[0] + F.relu(leaves[1] + leaves[4])
    wanted = F.layer_norm(total, (width,), leaves[2], leaves[3], 1e-5)
    close(out, wanted)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, out.to(dtype))
    bare = kernels.residual_norm(product, bias, residual, scale, shift, 1e-5, False)
    close(bare[0], out)
    assert bare[2] is None
    assert moments is not None

    for added in (more, None):
        upstream = gradient.double() + (0 if added is None else added.double())
        exact = torch.autograd.grad(wanted, leaves, upstream, retain_graph=True)
        back, into, sums = kernels.residual_norm_backward(
            gradient, added, product, bias, residual, scale, moments
        )
        close(back, exact[0], 1e-5)
        assert into.dtype == dtype
        close(into, exact[1], max(1e-5, CLOSE[dtype]))
        for mine, theirs in zip(sums, exact[2:], strict=True):
            close(mine, theirs, 1e-5)


def test_what_is_not_a_number_stays_so() -> None:
    product, residual = draws(4, 8), draws(4, 8, seed=1)
    product[1, 2] = math.nan
    residual[2, 3] = math.inf
    scale, shift = torch.ones(8), torch.zeros(8)
    out, *_ = kernels.residual_norm(product, shift, residual, scale, shift, 1e-5, False)
    assert torch.isfinite(out).all(dim=1).tolist() == [True, False, False, True]


def test_rows_do_not_depend_on_the_threads() -> None:
    product, residual, one = draws(500, 24), draws(500, 24, seed=1), torch.ones(24)
    before, made = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        made.append(kernels.residual_norm(product, one, residual, one, one, 1e-5, False)[0])
    torch.set_num_threads(before)
    assert torch.equal(*made)


def split_mix(seed: int, count: int) -> list[int]:
    """The published generator, in whole numbers."""
    found = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) % 2**64
        z = seed
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        found.append(z ^ (z >> 31))
    return found


def test_normals_are_split_mix_through_the_inverse(threads: int) -> None:
    seed = 2**63 + 12345
    out = torch.empty(200, 7)
    after = kernels.normals(out, 0.5, None, seed)
    assert after == (seed + 200 * 4 * 0x9E3779B97F4A7C15) % 2**64
    words = torch.tensor([w >> 8 for w in split_mix(seed, 800)]).view(200, 4)  # 56 bits
    drawn = torch.cat([words >> 32, words & 0xFFFFFF], dim=1)[:, :7]
    wanted = torch.special.ndtri((drawn.double() + 0.5) / 2**24) * 0.5
    torch.testing.assert_close(out.double(), wanted, rtol=2e-6, atol=1e-7)


def test_normals_at_the_ends_of_the_distribution() -> None:
    """Draws as far out as there are; the interval next to the end is 5.42 deviations away."""
    out = torch.empty(4000, 1000)
    kernels.normals(out, 1.0, None, 1)
    assert torch.isfinite(out).all()
    assert 4.8 < float(out.abs().max()) <= 5.42


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("tokens", [1, 3])
def test_gather_is_an_embedding(dtype: torch.dtype, tokens: int, threads: int) -> None:
    source, out = draws(31, 9, dtype=dtype), torch.empty(200, 9 * tokens, dtype=dtype)
    rows = torch.randint(-1, 31, (200, tokens), generator=torch.Generator().manual_seed(1))
    padded = torch.cat([source, torch.zeros(1, 9, dtype=dtype)])
    assert kernels.gather(source, rows, out) is out
    assert torch.equal(out, padded[rows].flatten(1))
    assert bool((rows < 0).any())


def test_gather_names_a_row_that_is_not_there() -> None:
    with pytest.raises(IndexError, match="got 4; accepted: less than 4"):
        kernels.gather(draws(4, 2), torch.tensor([[0], [4]]), torch.empty(2, 2))


def test_repeated_does_the_same_to_other_numbers() -> None:
    """Also to what a loop takes a copy of, since its rows are not side by side."""
    room, weight, bias = kernels.Room(), draws(6, 5), draws(5)
    steps: list[int] = []

    def step(given: torch.Tensor) -> torch.Tensor:
        steps.append(len(given))
        product = kernels.matmul(given[:, :6], weight, room("made", (len(given), 5), given.dtype))
        return kernels.residual_norm(product, bias, given[:, 1:6], bias, bias, 1e-5, False, room)[0]

    repeated, memory = kernels.Repeated(step), torch.empty(3, 150, 7)
    for seed in range(3):
        for k, given in enumerate([memory[0], memory[1], memory[2][:80]]):
            given.copy_(draws(*given.shape, seed=10 * seed + k))
            made = repeated(given).clone()
            fresh = given[:, :6] @ weight
            wanted = F.layer_norm((fresh + bias).relu() + given[:, 1:6], (5,), bias, bias)
            torch.testing.assert_close(made, wanted)
    assert steps == [150, 150, 80]


@pytest.mark.parametrize("dtype", BOTH)
def test_normals_around_something(dtype: torch.dtype) -> None:
    centre, alone, around = draws(90, 11, dtype=dtype), torch.empty(90, 11), torch.empty(90, 11)
    kernels.normals(alone, 0.1, None, 3)
    kernels.normals(around, 0.1, centre, 3)
    assert torch.equal(around, alone + centre.float())


@pytest.mark.parametrize("dtype", BOTH)
def test_group_loss_is_that_of_float64(dtype: torch.dtype, threads: int) -> None:
    made, previous = 1 + draws(3, 210, 13), draws(3, 210, 13, dtype=dtype, seed=1)
    found = kernels.group_loss(made, previous, 0.8)
    for mine, theirs in zip(
        found, phase1.group_loss(made.double(), previous.double(), 0.8), strict=True
    ):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-6, atol=1e-9)


def test_group_loss_of_equal_contexts() -> None:
    same = torch.full((1, 70, 4), 3.0)
    losses, diversity, change, gradient = kernels.group_loss(same, torch.zeros(1, 70, 4), 0.8)
    assert float(diversity) == 0
    assert float(losses) == pytest.approx(0.2 * 9)
    assert (change == 9).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("stretch", [0.1, 2.0, 40.0])
def test_table_loss_is_cross_entropy(
    dtype: torch.dtype, stretch: float, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts of 60 rows, the logits between a bound and, for the widest, their largest."""
    monkeypatch.setattr(kernels, "TABLE_LOGITS", 60 * 31)
    query = draws(140, 9, dtype=dtype) * stretch
    table, target = draws(31, 9, dtype=dtype, seed=1), torch.arange(140) % 31
    longest = float(table.float().norm(dim=1).max())
    bounds = 2 * query.double().norm(dim=1) * longest / math.log(2)
    assert bool((bounds > float(kernels._REACH)).any()) == (stretch == 40)
    leaf = query.double().requires_grad_()
    # The product's type is the logits'.
    logits = leaf @ table.double().T
    logits = logits + (query @ table.T).double() - logits.detach()
    wanted = F.cross_entropy(logits, target, reduction="none")
    wanted.mean().backward()
    nats, gradient = kernels.table_loss(query, table, longest, target)
    torch.testing.assert_close(nats.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    assert leaf.grad is not None
    torch.testing.assert_close(
        gradient.double(), leaf.grad, rtol=0, atol=CLOSE[dtype] * 5 / len(query)
    )


def test_table_loss_of_what_is_not_a_number() -> None:
    query, table = torch.tensor([[1.0], [math.nan]]), torch.tensor([[1.0], [2.0]])
    nats, gradient = kernels.table_loss(query, table, 2.0, torch.tensor([0, 0]))
    assert nats.isnan().tolist() == gradient[:, 0].isnan().tolist() == [False, True]


@pytest.mark.parametrize("vocabulary", [3, 512, 1300])
@pytest.mark.parametrize("scale", [0.1, 5.0, 3000.0])
def test_judged_is_cross_entropy(vocabulary: int, scale: float, threads: int) -> None:
    logits = draws(150, vocabulary) * scale
    target = torch.arange(150) % vocabulary
    nats, correct = kernels.judged(logits.clone(), target)
    wanted = F.cross_entropy(logits.double(), target, reduction="none")
    torch.testing.assert_close(nats, wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(correct, logits.argmax(1) == target)


def test_judged_ties_are_wrong_and_nan_is_nan() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [2.0, math.nan, 0.0], [2.0, 1.0, 0.0]])
    nats, correct = kernels.judged(logits, torch.tensor([0, 0, 0]))
    assert correct.tolist()[::2] == [False, True]
    assert nats.isnan().tolist() == [False, True, False]


def test_loops_are_the_same_compiled_and_from_the_disk(tmp_path: Path) -> None:
    """numba optimises what it keeps once more: a sum that LLVM may take in any order would give a
    seed two results."""
    code = """
import torch
from cvfp import kernels
g = torch.Generator().manual_seed(0)
x, y, z = (torch.randn(300, 100, generator=g) for _ in range(3))
out, _, moments = kernels.residual_norm(x, y[0], z, y[1], y[2], 1e-5, True)
back = kernels.residual_norm_backward(y, None, x, y[0], z, y[1], moments)
table = torch.randn(1300, 100, generator=g)
loss = kernels.table_loss(x, table, 20.0, torch.arange(300))
judged = kernels.judged(x @ table.T, torch.arange(300))
made = [out, moments, *back, *loss, *judged, *kernels.group_loss(x[None], y[None], 0.8)]
print([hash(one.numpy().tobytes()) for one in made])
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONHASHSEED": "0"}
    made = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert list(tmp_path.rglob("*.nbc"))
    assert made[0] == made[1]


def test_loops_take_as_many_threads_as_torch_and_leave_it_as_many() -> None:
    code = """
import torch
torch.set_num_threads(1)
from cvfp import kernels
x, one = torch.randn(3000, 64), torch.ones(64)
for threads in (1, 2, 1):
    torch.set_num_threads(threads)
    kernels.residual_norm(x, one, x, one, one, 1e-5, False)
    print(torch.get_num_threads(), kernels.numba.get_num_threads())
"""
    env = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    )
    assert ran.stdout.split() == ["1", "1", "2", "2", "1", "1"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks the linker")
def test_loops_share_torchs_threads(tmp_path: Path) -> None:
    """Two sets of threads, each waiting for work on all cores, would halve the speed of both."""
    code = """
import torch
torch.set_num_threads(2)
from cvfp import kernels
x, one = torch.randn(3000, 64), torch.ones(64)
kernels.residual_norm(x, one, x, one, one, 1e-5, False)
"""
    env = {**os.environ, "LD_DEBUG": "bindings", "LD_DEBUG_OUTPUT": str(tmp_path / "bound")}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    bound = [line for file in tmp_path.glob("bound*") for line in file.read_text().splitlines()]
    runs = [line for line in bound if "omppool" in line and "`GOMP_parallel'" in line]
    assert len(runs) == 1
    assert "/torch/lib/" in runs[0].split(" to ")[1]
