"""Passes over memory as Triton kernels: a program computes rows in float32, and rounds each number that it writes once.

Imported only where it is taken: Triton comes with PyTorch's CUDA wheels alone. Rows may be strided, their numbers lie side by side;
float32, bfloat16 and float16, weights and angles in any of them. The number of tokens is no compile-time constant: packs of other
sizes do not compile anew. No atomics: results do not depend on the order in which programs run. Sizes as in `Backend`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimtab.engine.backends import Activation, Norm

_TILE = 2048
"""Numbers of a program that need not hold a whole row."""


@triton.jit(do_not_specialize=["rows"])
def _norm(x, weight, y, rstd, rows, heads, n, x_row, y_row, offset, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
    at, inside = (row // heads).to(tl.int64)[:, None], (row[:, None] < rows) & (column < n)
    of_head = (row % heads)[:, None] * n + column
    a = tl.load(x + at * x_row + of_head, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt_rn(tl.sum(a * a, axis=1) / n + eps)
    scale = tl.load(weight + column, mask=column < n, other=0.0).to(tl.float32) + offset
    tl.store(y + at * y_row + of_head, (a * r[:, None] * scale).to(y.dtype.element_ty), mask=inside)
    tl.store(rstd + row, r, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def _norm_backward(
    dy, x, weight, rstd, residual, dx, rows, heads, n, dy_row, x_row, residual_row, dx_row, offset,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
    at, inside = (row // heads).to(tl.int64)[:, None], (row[:, None] < rows) & (column < n)
    of_head = (row % heads)[:, None] * n + column
    r = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
    xhat = tl.load(x + at * x_row + of_head, mask=inside, other=0.0).to(tl.float32) * r
    scale = tl.load(weight + column, mask=column < n, other=0.0).to(tl.float32) + offset
    g = tl.load(dy + at * dy_row + of_head, mask=inside, other=0.0).to(tl.float32) * scale
    d = r * (g - xhat * (tl.sum(g * xhat, axis=1) / n)[:, None])
    if RESIDUAL:
        d += tl.load(residual + at * residual_row + of_head, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + at * dx_row + of_head, d.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _activated(a, GELU: tl.constexpr):
    """act(a) and its derivative: a · sigmoid(t), where t = a, or for GELU (tanh) twice the tanh's argument."""
    t, slope = a, 1.0
    if GELU:
        t = 1.5957691216057308 * (a + 0.044715 * a * a * a)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * a * a)
    e = tl.exp(-tl.abs(t))  # so that neither sigmoid(t) nor 1 - sigmoid(t) loses digits
    s = tl.where(t >= 0.0, 1.0, e) / (1.0 + e)
    return a * s, s + a * e / ((1.0 + e) * (1.0 + e)) * slope


@triton.jit
def _gate(g, u, h, n, g_row, u_row, h_row, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    a = tl.load(g + row * g_row + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(u + row * u_row + column, mask=inside, other=0.0).to(tl.float32)
    act, _ = _activated(a, GELU)
    tl.store(h + row * h_row + column, (act * b).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward(dh, g, u, both, n, dh_row, g_row, u_row, both_row, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, to = column < n, both + row * both_row + column
    d = tl.load(dh + row * dh_row + column, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(g + row * g_row + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(u + row * u_row + column, mask=inside, other=0.0).to(tl.float32)
    act, slope = _activated(a, GELU)
    tl.store(to, (d * b * slope).to(both.dtype.element_ty), mask=inside)
    tl.store(to + n, (d * act).to(both.dtype.element_ty), mask=inside)
    tl.store(dh + row * dh_row + column, (act * b).to(dh.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_tile(logits, top, total, rescale, n, row_size, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at, before = logits + row * row_size, tl.load(top + row)
    highest, sums = tl.zeros([BLOCK], tl.float32) + before, tl.zeros([BLOCK], tl.float32)
    for block in range(BLOCKS):  # a running softmax in every lane, so that lanes are compared once
        column = block * BLOCK + columns
        a = tl.load(at + column, mask=column < n, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, a)
        sums = sums * tl.exp(highest - higher) + tl.exp(a - higher)
        highest = higher
    now = tl.max(highest, axis=0)
    factor = tl.exp(before - now)
    tl.store(total + row, tl.load(total + row) * factor + tl.sum(sums * tl.exp(highest - now), axis=0))
    tl.store(rescale + row, factor)
    tl.store(top + row, now)
    for block in range(BLOCKS):
        column = block * BLOCK + columns
        a = tl.load(at + column, mask=column < n, other=-float("inf")).to(tl.float32)
        tl.store(at + column, tl.exp(a - now).to(logits.dtype.element_ty), mask=column < n)


@triton.jit
def _rotate(
    x, cos, sin, out, heads, size, pairs, x_row, cos_row, sin_row, out_row, sign,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    row, pair = tl.program_id(0).to(tl.int64), tl.arange(0, PAIRS)[None, :]
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    first, second = pair, pair + pairs
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    exists, inside = pair < pairs, (pair < pairs) & (head < heads)
    c1 = tl.load(cos + row * cos_row + first, mask=exists, other=0.0).to(tl.float32)
    c2 = tl.load(cos + row * cos_row + second, mask=exists, other=0.0).to(tl.float32)
    s1 = tl.load(sin + row * sin_row + first, mask=exists, other=0.0).to(tl.float32) * sign
    s2 = tl.load(sin + row * sin_row + second, mask=exists, other=0.0).to(tl.float32) * sign
    at, to = x + row * x_row + head * size, out + row * out_row + head * size
    a = tl.load(at + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + second, mask=inside, other=0.0).to(tl.float32)
    tl.store(to + first, (a * c1 - b * s1).to(out.dtype.element_ty), mask=inside)
    tl.store(to + second, (b * c2 + a * s2).to(out.dtype.element_ty), mask=inside)
    if REST:
        rest = 2 * pairs + tl.arange(0, REST)[None, :]
        inside = (rest < size) & (head < heads)
        tl.store(to + rest, tl.load(at + rest, mask=inside, other=0.0).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_users(source, starts, users, to, n, source_row, BLOCK: tl.constexpr):
    key, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place, end = tl.load(starts + key), tl.load(starts + key + 1)
    total = tl.zeros([BLOCK], tl.float32)
    while place < end:
        row = tl.load(users + place).to(tl.int64)
        total += tl.load(source + row * source_row + column, mask=column < n, other=0.0).to(tl.float32)
        place += 1
    tl.store(to + key * n + column, total.to(to.dtype.element_ty), mask=column < n)


def rms_norm(x: Tensor, norm: Norm, scratch: bool = False, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As in `Backend`; perhaps into `out`, whose rows may be strided."""
    y = x.new_empty(x.shape) if out is None else out
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    grid, sizes, options = _whole_rows(x)
    arguments = x, norm.weight, y, rstd, *sizes, x.stride(0), y.stride(0), float(norm.offset), float(norm.eps)
    _launch(_norm, x, grid, *arguments, **options)
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, norm: Norm, rstd: Tensor, residual: Tensor | None = None) -> Tensor:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    beside = dy if residual is None else residual
    strides = dy.stride(0), x.stride(0), beside.stride(0), dx.stride(0)
    grid, sizes, options = _whole_rows(x)
    arguments = dy, x, norm.weight, rstd, beside, dx, *sizes, *strides, float(norm.offset)
    _launch(_norm_backward, x, grid, *arguments, RESIDUAL=residual is not None, **options)
    return dx


def gate(g: Tensor, u: Tensor, activation: Activation, scratch: bool = False) -> Tensor:
    h = g.new_empty(g.shape)
    block = min(_TILE, triton.next_power_of_2(g.shape[1]))
    strides = g.stride(0), u.stride(0), h.stride(0)
    _launch(_gate, g, _grid(g, block), g, u, h, g.shape[1], *strides, GELU=activation == "gelu_tanh", BLOCK=block)
    return h


def gate_backward_(dh: Tensor, g: Tensor, u: Tensor, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    both = g.new_empty(len(g), 2 * g.shape[1])
    block = min(_TILE // 2, triton.next_power_of_2(g.shape[1]))
    strides = dh.stride(0), g.stride(0), u.stride(0), both.stride(0)
    arguments = dh, g, u, both, g.shape[1], *strides
    _launch(_gate_backward, g, _grid(g, block), *arguments, GELU=activation == "gelu_tanh", BLOCK=block)
    dg, du = both.chunk(2, dim=1)
    return dg, du, dh


def softmax_tile_(logits: Tensor, top: Tensor, total: Tensor) -> Tensor:
    rescale = torch.empty_like(top)
    block = min(2 * _TILE, triton.next_power_of_2(logits.shape[1]))
    arguments = logits, top, total, rescale, logits.shape[1], logits.stride(0)
    _launch(_softmax_tile, logits, (len(logits),), *arguments, BLOCKS=-(-logits.shape[1] // block), BLOCK=block, num_warps=8)
    return rescale


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, size: int, interleaved: bool, sign: float = 1.0, out: Tensor | None = None
) -> Tensor:
    to = x.new_empty(x.shape) if out is None else out
    heads, pairs = x.shape[1] // size, cos.shape[1] // 2
    rest = 0 if to is x or size == 2 * pairs else triton.next_power_of_2(size - 2 * pairs)
    columns = triton.next_power_of_2(max(1, pairs))
    rows = max(1, min(_TILE // max(columns, rest), triton.next_power_of_2(max(1, heads))))
    arguments = x, cos, sin, to, heads, size, pairs, x.stride(0), cos.stride(0), sin.stride(0), to.stride(0), float(sign)
    _launch(_rotate, x, (len(x), -(-heads // rows)), *arguments, HEADS=rows, PAIRS=columns, REST=rest, INTERLEAVED=interleaved)
    return to


def summed_by_users(source: Tensor, starts: Tensor, users: Tensor) -> Tensor:
    """For each of T keys, the sum of the rows of source (T' n) that `users[starts[key]:starts[key + 1]]` names: T n."""
    to = source.new_empty(len(starts) - 1, source.shape[1])
    block = min(_TILE // 2, triton.next_power_of_2(source.shape[1]))
    _launch(_sum_users, source, _grid(to, block), source, starts, users, to, source.shape[1], source.stride(0), BLOCK=block)
    return to


def _whole_rows(x: Tensor) -> tuple[tuple[int], tuple[int, int, int], dict[str, int]]:
    """Of programs that hold whole rows of T n or T heads n: the grid; rows, heads and n; and constants."""
    n = x.shape[-1]
    rows, heads, block = x.numel() // max(1, n), x.shape[1] if x.ndim == 3 else 1, triton.next_power_of_2(max(1, n))
    together = max(1, 1024 // block)
    options = {"ROWS": together, "BLOCK": block, "num_warps": _warps(together * block)}
    return (-(-rows // together),), (rows, heads, n), options


def _warps(numbers: int) -> int:
    """Warps, of which every thread has eight numbers: as many as are read at a time, in 16 bits."""
    return max(1, min(16, numbers // 256))


def _grid(x: Tensor, block: int) -> tuple[int, int]:
    return len(x), -(-x.shape[1] // block)


def _launch(kernel: Any, on: Tensor, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel's programs on the tensor's device, if there are any."""
    if 0 not in grid and on.numel():
        with torch.cuda.device_of(on):
            kernel[grid](*arguments, **constants)
