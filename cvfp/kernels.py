"""Loops for a CPU, compiled by numba on first use and kept beside this file.

What stands between two products here is a dozen operations on small rows. torch takes a pass over
memory for each, and these passes, not the products, are what a step costs on a CPU. A loop takes
one for all, four times as fast. Loops read and write torch's memory, bfloat16 as its bits; sums
along a row are float32.

Every loop has a plain version in torch, for other devices and types, which the tests hold it to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils, codegen
from numba.extending import intrinsic
from torch import Tensor

# Threads of torch and of numba that wait for work in turn would take the cores from each other.
# torch loads its OpenMP for all, and so numba's loops run on it, if they are OpenMP's.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
# LLVM keeps to half of what AVX-512 is wide unless told; loops that compute much gain a third.
_HOST = codegen.get_host_cpu_features()  # as the user's settings leave them
if numba.config.CPU_FEATURES is None and "+avx512f" in _HOST.split(","):
    numba.config.CPU_FEATURES = _HOST + ",-prefer-256-bit"

_F32 = np.float32
# Not "reassoc": the order of a sum would depend on whether a loop was compiled or read from the
# disk, and a seed would give two results. `_total` is how sums are taken in lanes.
_FAST: Any = {"contract", "nsz"}
# Logits of a table made at once: with fewer the calls cost more than the cache gains.
TABLE_LOGITS = 2**22
# 1.5·2^23: a float32 to which it is added is rounded to a whole number.
_WHOLE = _F32(12582912)
# Rows from which a second thread pays.
_WORTH_SHARING = 64
# What numba was last told in this thread.
_running: ContextVar[int] = ContextVar("threads", default=0)
_I16, _I32, _FLOAT = ir.IntType(16), ir.IntType(32), ir.FloatType()
_function: Any = numba.njit(fastmath={"contract"}, error_model="numpy", nogil=True, cache=True)
_loop: Any = numba.njit(fastmath=_FAST, error_model="numpy", nogil=True, cache=True)
_shared: Any = numba.njit(parallel=True, nogil=True, cache=True)


def _typed(like: Any, bits: Any) -> tuple[Any, Any]:
    """Of an intrinsic of x and `like`: x itself if it is to stay a float32, or else `bits`."""
    if like == types.uint16:
        return types.uint16(types.float32, types.uint16), bits
    return (
        types.float32(types.float32, types.float32),
        lambda context, builder, signature, args: args[0],
    )


@intrinsic
def _wide(context: Any, x: Any) -> Any:
    """A float32 from a float32, or from the bits of a bfloat16."""

    def bits(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), _I32(16)), _FLOAT)

    if x == types.uint16:
        return types.float32(types.uint16), bits
    return types.float32(types.float32), lambda context, builder, signature, args: args[0]


@intrinsic
def _rounded(context: Any, x: Any, like: Any) -> Any:
    """x as `like`: a float32, or the bits of the nearest bfloat16 (ties to even)."""

    def bits(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        whole = builder.bitcast(args[0], _I32)
        odd = builder.and_(builder.lshr(whole, _I32(16)), _I32(1))
        nearest = builder.add(builder.add(whole, _I32(0x7FFF)), odd)
        return builder.trunc(builder.lshr(nearest, _I32(16)), _I16)

    return _typed(like, bits)


@intrinsic
def _power(context: Any, x: Any) -> Any:
    """k of x = 2^k·m with m from √½ to √2, for a positive normal float32."""

    def bits(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        above = builder.sub(builder.bitcast(args[0], _I32), _I32(0x3F3504F3))
        return builder.sitofp(builder.ashr(above, _I32(23)), _FLOAT)

    return types.float32(types.float32), bits


@intrinsic
def _times_power(context: Any, x: Any, shifted: Any) -> Any:
    """x·2^k for a whole k and `shifted` = _WHOLE + k, whose last bits it is; where x and the result
    are normal float32."""

    def bits(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        power = builder.shl(builder.bitcast(args[1], _I32), _I32(23))
        return builder.bitcast(builder.add(builder.bitcast(args[0], _I32), power), _FLOAT)

    return types.float32(types.float32, types.float32), bits


@intrinsic
def _nearly(context: Any, x: Any, like: Any) -> Any:
    """As `_rounded`, but halves go up: three operations less, for what nobody compares."""

    def bits(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        nearest = builder.add(builder.bitcast(args[0], _I32), _I32(0x8000))
        return builder.trunc(builder.lshr(nearest, _I32(16)), _I16)

    return _typed(like, bits)


@intrinsic
def _order(context: Any, x: Any) -> Any:
    """A whole number that grows with the float32 (NaN above or under all): the largest of whole
    numbers is found in lanes."""

    def bits(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        whole = builder.bitcast(args[0], _I32)
        sign = builder.ashr(whole, _I32(31))
        return builder.xor(whole, builder.and_(sign, _I32(0x7FFFFFFF)))

    return types.int32(types.float32), bits


@intrinsic
def _larger(context: Any, x: Any, y: Any) -> Any:
    """Of two int32; Python's `max` would make them int64."""

    def bits(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.icmp_signed(">", *args), *args)

    return types.int32(types.int32, types.int32), bits


@intrinsic
def _ordered(context: Any, x: Any) -> Any:
    """The float32 of an `_order`."""

    def bits(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sign = builder.ashr(args[0], _I32(31))
        whole = builder.xor(args[0], builder.and_(sign, _I32(0x7FFFFFFF)))
        return builder.bitcast(whole, _FLOAT)

    return types.float32(types.int32), bits


_tape: ContextVar[list[tuple[Callable[..., Any], tuple[Any, ...]]] | None] = ContextVar(
    "tape", default=None
)


def call(function: Callable[..., Any], *given: Any) -> Any:
    """function(*given), which a `Repeated` does again."""
    tape = _tape.get()
    if tape is not None:
        tape.append((function, given))
    return function(*given)


class Repeated:
    """A step as a list of calls, recorded when it is first given some memory, and gone through when
    it is given the same again: to find out what to call is a tenth of what a small step costs.

    Args:
        step: takes tensors. What it does to numbers, it does by `call`, in memory that it takes
            again every time, and what it returns is the same tensor every time.
    """

    MOST = 256  # lists kept

    def __init__(self, step: Callable[..., Tensor]) -> None:
        self.step = step
        self.made: dict[tuple[object, ...], tuple[list[Any], tuple[Tensor, ...], Tensor]] = {}

    @torch.no_grad()
    def __call__(self, *given: Tensor) -> Tensor:
        key = *(one.data_ptr() for one in given), *(one.shape for one in given)
        known = self.made.get(key)
        if known is not None:
            for function, arguments in known[0]:
                function(*arguments)
            return known[2]
        if len(self.made) == self.MOST:
            return self.step(*given)
        tape: list[Any] = []
        token = _tape.set(tape)
        try:
            output = self.step(*given)
        finally:
            _tape.reset(token)
        self.made[key] = tape, given, output  # what is held is not given to others
        return output


def matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a·b in `out`, by `call`."""
    call(partial(torch.mm, out=out), a, b)
    return out


def copied(source: Tensor, out: Tensor) -> Tensor:
    """`source` in `out`, by `call`."""
    call(out.copy_, source)
    return out


def _array(tensor: Tensor | None) -> Any:
    """The tensor's memory as numba takes it."""
    if tensor is None:
        return None
    made = vars(tensor).get("array")
    if made is not None:
        return made
    if tensor.requires_grad:
        tensor = tensor.detach()
    if not tensor.is_contiguous():
        tensor = copied(tensor, torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class Room:
    """Memory that is taken again under the same name and shape: what is fresh costs a CPU as much
    as what is done with it. Whoever takes is done with what it took before.

    What numba takes of a tensor is kept too: at the size of a batch, to ask for it anew takes
    longer than a loop does.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[object, ...], Tensor] = {}
        self.given: dict[str, tuple[Tensor, Any]] = {}
        self.parts: dict[tuple[object, ...], Room] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        key = name, *shape, dtype
        kept = self.kept.get(key)
        if kept is None:
            # Zeros: a product of bfloat16 reads beside rows of an odd length, and NaN·0 is NaN.
            kept = self.kept[key] = torch.zeros(tuple(shape), dtype=dtype, device="cpu")
            vars(kept)["array"] = _array(kept.detach())  # of its own it would never be freed
        return kept

    def array(self, name: str, tensor: Tensor) -> Any:
        """`_array` of one that is likely to be the same every time, and in the same place."""
        given = self.given.get(name)
        if given is not None and given[0] is tensor:
            return given[1]
        made = _array(tensor)
        if tensor.is_contiguous():  # or it is a copy
            self.given[name] = tensor, made
        return made

    def of(self, *owner: object) -> Room:
        """The part that has names of its own."""
        part = self.parts.get(owner)
        if part is None:
            part = self.parts[owner] = Room()
        return part


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _parts(rows: int) -> int:
    """Into how many parts the rows are shared out: as many as torch has threads, if it pays."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if _running.get() != threads:
        asked = torch.get_num_threads()
        numba.set_num_threads(threads)
        torch.set_num_threads(asked)  # numba's threads start at OpenMP's full number, for torch too
        _running.set(threads)
    return max(1, min(threads, rows // _WORTH_SHARING))


@_function
def _padded(width: int) -> Any:
    """Room for `width` numbers to add up, and zeros as far as `_total` takes them."""
    return np.zeros((width + 63) // 64 * 64, _F32)


@intrinsic
def _total(context: Any, x: Any) -> Any:
    """The sum of a `_padded`: in 64 lanes, then these in halves."""

    def total(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = ir.VectorType(_FLOAT, 16)
        array = context.make_array(x)(context, builder, args[0])
        count = builder.extract_value(array.shape, 0)
        first = builder.bitcast(array.data, lanes.as_pointer())
        zeros = ir.Constant(lanes, [0.0] * 16)
        sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(4)]
        blocks = builder.udiv(count, count.type(64))
        with cgutils.for_range(builder, blocks) as loop:
            for k, summed in enumerate(sums):
                at = builder.add(builder.mul(loop.index, count.type(4)), count.type(k))
                part = builder.load(builder.gep(first, [at]), align=4)
                builder.store(builder.fadd(builder.load(summed), part), summed)
        a, b, c, d = [builder.load(summed) for summed in sums]
        whole = builder.fadd(builder.fadd(a, b), builder.fadd(c, d))
        for half in (8, 4, 2, 1):
            low = ir.Constant(ir.VectorType(_I32, half), list(range(half)))
            high = ir.Constant(ir.VectorType(_I32, half), list(range(half, 2 * half)))
            whole = builder.fadd(
                builder.shuffle_vector(whole, whole, low),
                builder.shuffle_vector(whole, whole, high),
            )
        return builder.extract_element(whole, _I32(0))

    return types.float32(x), total


# Rows of a table


@_loop
def _gather_rows(first: int, last: int, out: Any, source: Any, rows: Any) -> None:
    width = source.shape[1]
    for r in range(first, last):
        for k in range(rows.shape[1]):
            i = rows[r, k]
            part = out[r, k * width : (k + 1) * width]
            if i < 0:
                part[:] = 0
            else:
                for j in range(width):
                    part[j] = source[i, j]


@_shared
def _gather(parts: int, *given: Any) -> None:
    rows = len(given[0])
    for k in numba.prange(parts):
        _gather_rows(rows * k // parts, rows * (k + 1) // parts, *given)


def gather(source: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """Fill `out` [B, n·E] with rows of `source` [V, E], of the same type.

    Args:
        rows: int64 [B, n]: which go side by side; under 0: zeros.

    Raises:
        IndexError: there is no such row.
    """
    if len(rows) and int(rows.max()) >= len(source):
        raise IndexError(f"rows: got {int(rows.max())}; accepted: less than {len(source)}")
    assert source.dtype == out.dtype
    assert out.shape == (len(rows), rows.shape[1] * source.shape[1])
    assert out.is_contiguous()  # or what is written to would be a copy
    _gather(_parts(len(rows)), _array(out), _array(source), _array(rows))
    return out


# LayerNorm(residual + ReLU(product + bias))


@_loop
def _norm_rows(
    first: int,
    last: int,
    product: Any,
    bias: Any,
    residual: Any,
    scale: Any,
    shift: Any,
    eps: Any,
    moments: Any,
    out: Any,
    rounded: Any,
    column: Any,
) -> None:
    width = product.shape[1]
    row, squares = _padded(width), _padded(width)
    share = _F32(1) / _F32(width)
    for r in range(first, last):
        for j in range(width):
            x = _wide(product[r, j]) + _wide(bias[j])
            x = (_F32(0) if x < _F32(0) else x) + _wide(residual[r, j])  # NaN passes
            row[j] = x
        mean = _total(row) * share
        for j in range(width):
            squares[j] = (row[j] - mean) * (row[j] - mean)
        spread = _F32(1) / np.sqrt(_total(squares) * share + eps)
        if moments is not None:
            moments[r, 0], moments[r, 1] = mean, spread
        for j in range(width):
            row[j] = (row[j] - mean) * spread * scale[j] + shift[j]
        for j in range(width):
            out[r, j] = row[j]
        if rounded is not None:
            part = rounded[r, column : column + width]
            for j in range(width):
                part[j] = _rounded(row[j], part[j])


@_shared
def _norm(parts: int, *given: Any) -> None:
    rows = len(given[0])
    for k in numba.prange(parts):
        _norm_rows(rows * k // parts, rows * (k + 1) // parts, *given)


def residual_norm(
    product: Tensor,
    bias: Tensor,
    residual: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    keep: bool,
    room: Room | None = None,
    place: tuple[Tensor, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """LayerNorm(residual + ReLU(product + bias)) of [B, W] each.

    Args:
        keep: what the gradient takes.
        room: for the results.
        place: where the second of them goes instead: the columns of a matrix from the given one on.

    Returns:
        The result in float32, the same in the product's type, and mean and inverse deviation of the
        rows under the LayerNorm [B, 2], if they are to be kept.
    """
    room = room or Room()
    shape, dtype = product.shape, product.dtype
    out = room("out", shape, torch.float32)
    if place is not None:
        rounded, column = place
        assert rounded.is_contiguous()
        view = rounded[:, column : column + shape[1]]
    elif dtype != torch.float32:
        view = rounded = room("rounded", shape, dtype)
        column = 0
    else:
        view, rounded, column = out, None, 0
    moments = room("moments", (shape[0], 2), torch.float32) if keep else None
    call(
        _norm,
        _parts(shape[0]),
        _array(product),
        room.array("bias", bias),
        room.array("residual", residual),
        room.array("scale", scale),
        room.array("shift", shift),
        _F32(eps),
        _array(moments),
        _array(out),
        _array(rounded),
        column,
    )
    return out, view, moments


@_loop
def _norm_backward_rows(
    first: int,
    last: int,
    sums: Any,
    gradient: Any,
    more: Any,
    product: Any,
    bias: Any,
    residual: Any,
    scale: Any,
    moments: Any,
    into: Any,
    back: Any,
) -> None:
    width = gradient.shape[1]
    share = _F32(1) / _F32(width)
    active = np.empty(width, _F32)
    normal = np.empty(width, _F32)
    row, turns = _padded(width), _padded(width)
    mine = np.zeros((3, width), _F32)
    for r in range(first, last):
        mean, spread = moments[r, 0], moments[r, 1]
        if more is not None:
            for j in range(width):
                row[j] = gradient[r, j] + _wide(more[r, j])
        else:
            for j in range(width):
                row[j] = gradient[r, j]
        for j in range(width):
            x = _wide(product[r, j]) + _wide(bias[j])
            x = _F32(0) if x < _F32(0) else x
            active[j] = x
            x = (x + _wide(residual[r, j]) - mean) * spread
            y = row[j]
            mine[0, j] += y * x
            mine[1, j] += y
            y *= scale[j]
            turns[j] = y * x
            normal[j] = x
            row[j] = y
        pull = _total(row) * share
        turn = _total(turns) * share
        for j in range(width):
            y = (row[j] - pull - normal[j] * turn) * spread
            back[r, j] = y
            y = _F32(0) if active[j] <= _F32(0) else y
            mine[2, j] += y
            into[r, j] = _rounded(y, into[r, j])
    sums[:] = mine


@_shared
def _norm_backward(parts: int, sums: Any, *given: Any) -> None:
    rows = len(given[0])
    for k in numba.prange(parts):
        _norm_backward_rows(rows * k // parts, rows * (k + 1) // parts, sums[k], *given)
    for k in range(1, parts):
        sums[0] += sums[k]


def residual_norm_backward(
    gradient: Tensor,
    more: Tensor | None,
    product: Tensor,
    bias: Tensor,
    residual: Tensor,
    scale: Tensor,
    moments: Tensor,
    room: Room | None = None,
    backward: Room | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `residual_norm`, whose result has the gradient `gradient` + `more` [B, W].

    Args:
        room: that `residual_norm` had, also for the sums; backward: for the other results, and not
            where `gradient` is.

    Returns:
        Those of the residual, of the product in its type [B, W], and of scale, shift and
        bias [3, W].
    """
    room, backward = room or Room(), backward or Room()
    into = backward("into", product.shape, product.dtype)
    back = backward("back", product.shape, torch.float32)
    parts = _parts(product.shape[0])
    sums = room("sums", (parts, 3, product.shape[1]), torch.float32)
    call(
        _norm_backward,
        parts,
        _array(sums),
        _array(gradient),
        _array(more),
        _array(product),
        room.array("bias", bias),
        room.array("residual", residual),
        room.array("scale", scale),
        _array(moments),
        _array(into),
        _array(back),
    )
    return back, into, sums[0]


# Gaussian draws


_STEP = np.uint64(0x9E3779B97F4A7C15)


@_function
def _log(x: Any) -> Any:
    """Natural logarithm of a positive normal float32."""
    power = _power(x)
    m = _times_power(x, _WHOLE - power)
    z = (m - _F32(1)) / (m + _F32(1))  # log m = 2 artanh z
    y = z * z
    series = ((_F32(2 / 9) * y + _F32(2 / 7)) * y + _F32(2 / 5)) * y + _F32(2 / 3)
    return power * _F32(0.6931471805599453) + (z * _F32(2) + z * y * series)


@_function
def _normal(x: Any) -> Any:
    """The normal deviate of a uniform one from -1 to 1, over √2: the inverse of the error function
    to float32 (M. Giles, Approximating the erfinv function, 2010)."""
    w = -_log((_F32(1) - x) * (_F32(1) + x))
    v = w - _F32(2.5)
    p = _F32(2.81022636e-08)
    p = _F32(3.43273939e-07) + p * v
    p = _F32(-3.5233877e-06) + p * v
    p = _F32(-4.39150654e-06) + p * v
    p = _F32(0.00021858087) + p * v
    p = _F32(-0.00125372503) + p * v
    p = _F32(-0.00417768164) + p * v
    p = _F32(0.246640727) + p * v
    p = _F32(1.50140941) + p * v
    v = np.sqrt(w) - _F32(3)
    q = _F32(-0.000200214257)
    q = _F32(0.000100950558) + q * v
    q = _F32(0.00134934322) + q * v
    q = _F32(-0.00367342844) + q * v
    q = _F32(0.00573950773) + q * v
    q = _F32(-0.0076224613) + q * v
    q = _F32(0.00943887047) + q * v
    q = _F32(1.00167406) + q * v
    q = _F32(2.83297682) + q * v
    return (p if w < _F32(5) else q) * x


@_function
def _uniform(word: Any) -> Any:
    """The middle of one of 2^24 intervals from -1 to 1, by the last bits of `word`."""
    return (_F32(np.int32(word & np.uint64(0xFFFFFF))) - _F32(8388607.5)) * _F32(2.0**-23)


@_loop
def _normals_rows(first: int, last: int, out: Any, around: Any, seed: Any, std: Any) -> None:
    width = out.shape[1]
    half = (width + 1) // 2
    row = np.empty(2 * half, _F32)
    for r in range(first, last):
        state = seed + np.uint64(r * half + 1) * _STEP
        for j in range(half):
            z = state + np.uint64(j) * _STEP
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
            row[j], row[half + j] = _uniform(z >> np.uint64(40)), _uniform(z >> np.uint64(8))
        for j in range(width):
            row[j] = _normal(row[j]) * std
        if around is not None:
            for j in range(width):
                out[r, j] = _wide(around[r, j]) + row[j]
        else:
            for j in range(width):
                out[r, j] = row[j]


@_shared
def _normals(parts: int, *given: Any) -> None:
    rows = len(given[0])
    for k in numba.prange(parts):
        _normals_rows(rows * k // parts, rows * (k + 1) // parts, *given)


def normals(out: Tensor, std: float, around: Tensor | None, seed: int) -> int:
    """Fill float32 `out` [B, W] with normal draws of that deviation around zero, or around
    `around`, as large; of 2^24 values each, up to 5.4 deviations.

    Args:
        seed: state of a SplitMix64 (Steele, Lea and Flood 2014), each word of which serves two.

    Returns:
        Its state after them: rows are drawn the same in any number of calls and of parts.
    """
    assert out.is_contiguous()
    given = _array(out), _array(around), np.uint64(seed), _F32(std * 2**0.5)
    _normals(_parts(len(out)), *given)
    words = len(out) * ((out.shape[1] + 1) // 2)
    return (seed + words * int(_STEP)) % 2**64


# Phase 1's loss


@_loop
def _change_rows(first: int, last: int, sums: Any, made: Any, previous: Any, change: Any) -> None:
    width = made.shape[1]
    mine = np.zeros(width, np.float64)
    few = np.zeros(width, _F32)
    squares = _padded(width)
    for r in range(first, last):
        for j in range(width):
            x = made[r, j]
            d = x - _wide(previous[r, j])
            squares[j] = d * d
            few[j] += x
        change[r] = _total(squares) / _F32(width)
        if (r - first) % 64 == 63 or r == last - 1:
            for j in range(width):
                mine[j] += few[j]
                few[j] = _F32(0)
    sums[:] = mine


@_shared
def _change(parts: int, sums: Any, *given: Any) -> None:
    rows = len(given[0])
    for k in numba.prange(parts):
        _change_rows(rows * k // parts, rows * (k + 1) // parts, sums[k], *given)


@_loop
def _spread_rows(first: int, last: int, squares: Any, made: Any, mean: Any) -> None:
    width = made.shape[1]
    whole: Any = 0.0
    summed = _padded(width)
    for r in range(first, last):
        for j in range(width):
            d = made[r, j] - mean[j]
            summed[j] = d * d
        whole += _total(summed)
    squares[0] = whole


@_shared
def _spread(parts: int, squares: Any, *given: Any) -> None:
    rows = len(given[0])
    for k in numba.prange(parts):
        _spread_rows(rows * k // parts, rows * (k + 1) // parts, squares[k], *given)


@_loop
def _pull_rows(
    first: int, last: int, gradient: Any, made: Any, previous: Any, mean: Any, near: Any, far: Any
) -> None:
    for r in range(first, last):
        for j in range(made.shape[1]):
            x = made[r, j]
            gradient[r, j] = near * (x - _wide(previous[r, j])) - far * (x - mean[j])


@_shared
def _pull(parts: int, *given: Any) -> None:
    rows = len(given[0])
    for k in numba.prange(parts):
        _pull_rows(rows * k // parts, rows * (k + 1) // parts, *given)


def group_loss(
    made: Tensor, previous: Tensor, dist_reg_weight: float, room: Room | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`phase1.group_loss` of float32 [K, G, D], and [K, G, D] in any type."""
    groups, size, width = made.shape
    losses, diversity, change = _empty(groups), _empty(groups), _empty(groups, size)
    gradient = (room or Room())("gradient", made.shape, torch.float32)
    parts = _parts(size)
    sums, squares = np.empty((parts, width)), np.empty((parts, 1))
    for k in range(groups):
        contexts, before = _array(made[k]), _array(previous[k])
        _change(parts, sums, contexts, before, _array(change[k]))
        mean = (sums.sum(0) / size).astype(_F32)
        _spread(parts, squares, contexts, mean)
        spread = float(squares.sum()) ** 0.5
        near = _F32(2 * (1 - dist_reg_weight) / (size * width))
        # Equal contexts have no direction in which to part.
        far = _F32(dist_reg_weight / size / max(spread, float(np.finfo(_F32).tiny)))
        _pull(parts, _array(gradient[k]), contexts, before, mean, near, far)
        diversity[k] = spread / size
        losses[k] = (1 - dist_reg_weight) * change[k].mean() - dist_reg_weight * diversity[k]
    return losses, diversity, change, gradient


# Phase 2's loss


_PER_NAT = _F32(1.44269504088896341)
# Doublings by which a bound on the logits may be above them all.
_REACH = _F32(150)


@_function
def _power_of_two(x: Any) -> Any:
    """2^x for a float32 up to 126, to 1e-7; under -126 the smallest normal number."""
    x = max(x, _F32(-126))
    shifted = _F32(x + _WHOLE)
    y = x - _F32(shifted - _WHOLE)
    # Least largest relative error from -½ to ½
    p = (_F32(0.0013276466634) * y + _F32(0.0096755409613)) * y + _F32(0.0555071346343)
    p = ((p * y + _F32(0.2402212023735)) * y + _F32(0.6931469440460)) * y + _F32(1.0000001192093)
    return _times_power(p, shifted)


@_loop
def _weighed_rows(
    first: int,
    last: int,
    logits: Any,
    query: Any,
    longest: Any,
    target: Any,
    share: Any,
    nats: Any,
    scale: Any,
    width: Any,
) -> None:
    squares = _padded(query.shape[1])
    weights = _padded(width)
    for r in range(first, last):
        for j in range(query.shape[1]):
            squares[j] = _wide(query[r, j]) * _wide(query[r, j])
        bound = np.sqrt(_total(squares)) * longest * _PER_NAT  # of the logits, on either side
        if _F32(2) * bound > _REACH:
            largest = _order(_wide(logits[r, 0]))
            for j in range(1, width):
                largest = _larger(largest, _order(_wide(logits[r, j])))
            bound = _ordered(largest) * _PER_NAT
        # The largest weight is 2^60 at most, and 2^-90 at least.
        top = bound - _F32(60)
        right = _wide(logits[r, target[r]]) * _PER_NAT - top
        for j in range(width):
            weight = _power_of_two(_wide(logits[r, j]) * _PER_NAT - top)
            weights[j] = weight
            logits[r, j] = _nearly(weight, logits[r, j])
        whole = _total(weights)
        nats[r] = np.log(np.float64(whole)) - np.float64(right) / np.float64(_PER_NAT)
        scale[r] = share / whole


@_shared
def _weighed(parts: int, *given: Any) -> None:
    rows = len(given[0])
    for k in numba.prange(parts):
        _weighed_rows(rows * k // parts, rows * (k + 1) // parts, *given)


@_loop
def _pulled_rows(
    first: int,
    last: int,
    expected: Any,
    scale: Any,
    table: Any,
    target: Any,
    share: Any,
    gradient: Any,
) -> None:
    for r in range(first, last):
        k = target[r]
        for j in range(expected.shape[1]):
            gradient[r, j] = _wide(expected[r, j]) * scale[r] - _wide(table[k, j]) * share


@_shared
def _pulled(parts: int, *given: Any) -> None:
    rows = len(given[0])
    for k in numba.prange(parts):
        _pulled_rows(rows * k // parts, rows * (k + 1) // parts, *given)


def _apart(width: int, dtype: torch.dtype) -> int:
    """Width of the memory of rows of `width` numbers: an odd number of cache lines. Rows a power of
    two apart take each other's place in the cache: their product takes half as long again."""
    return (math.ceil(width * dtype.itemsize / 64) | 1) * 64 // dtype.itemsize


def table_loss(
    query: Tensor, table: Tensor, longest: float, target: Tensor, room: Room | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `target` [B] under softmax(query·tableᵀ), and the gradient of its mean.

    The logits become the softmax's weights in their place, and are in the cache when the second
    product reads them.

    Args:
        query: [B, E]; table: [V, E], in the same type.
        longest: the largest norm of the table's rows.
        room: for the logits and the results.

    Returns:
        float32 [B], and that of the query [B, E].
    """
    room = room or Room()
    rows, share = len(query), _F32(1 / len(query))
    gradient = room("gradient", query.shape, torch.float32)
    nats, scale = room("nats", (rows,), torch.float32), room("scale", (rows,), torch.float32)
    expected = room("expected", query.shape, query.dtype)
    at_once = max(1, TABLE_LOGITS // len(table))
    for first in range(0, rows, at_once):
        some = slice(first, min(first + at_once, rows))
        size = some.stop - first
        whole = room("logits", (size, _apart(len(table), query.dtype)), query.dtype)
        logits = matmul(query[some], table.T, whole[:, : len(table)])
        call(
            _weighed,
            _parts(size),
            _array(whole),
            _array(query[some]),
            _F32(longest),
            _array(target[some]),
            share,
            _array(nats[some]),
            _array(scale[some]),
            len(table),
        )
        matmul(logits, table, expected[some])
    given = [_array(t) for t in (expected, scale, table, target)]
    call(_pulled, _parts(rows), *given, share, _array(gradient))
    return nats, gradient


@_loop
def _judged_rows(first: int, last: int, logits: Any, target: Any, nats: Any, correct: Any) -> None:
    width = logits.shape[1]
    weights = _padded(width)
    for r in range(first, last):
        right = logits[r, target[r]]
        logits[r, target[r]] = -_F32(np.inf)
        largest = _order(logits[r, 0])
        for j in range(1, width):
            largest = _larger(largest, _order(logits[r, j]))
        others = _ordered(largest)
        top = _ordered(_larger(largest, _order(right)))
        for j in range(width):
            weights[j] = _power_of_two((logits[r, j] - top) * _PER_NAT)
        whole = np.float64(_total(weights)) + np.exp(np.float64(right) - np.float64(top))
        nats[r] = np.log(whole) + (np.float64(top) - np.float64(right))
        correct[r] = right > others


@_shared
def _judged(parts: int, *given: Any) -> None:
    rows = len(given[0])
    for k in numba.prange(parts):
        _judged_rows(rows * k // parts, rows * (k + 1) // parts, *given)


def judged(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `target` [B] under float32 logits [B, V], which are lost, in float64, and
    whether its logit is above all others."""
    nats = torch.empty(len(logits), dtype=torch.float64)
    correct = torch.empty(len(logits), dtype=torch.bool)
    given = (logits, target, nats, correct)
    _judged(_parts(len(logits)), *[_array(t) for t in given])
    return nats, correct
