"""The parts of a block as single operations. Each keeps for its backward pass what cannot be made again cheaply, and no more.

Frozen matrices with low-rank changes: y = x (W + B A)ᵀ. What is normed or gated on its way into one is made again in the
backward pass, by one pass over memory, so adapting a matrix keeps nothing that the frozen model would not.

Shapes: T tokens, d numbers in, N out, r rank.
"""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.engine.fused import kernels
from trimtab.engine.fused.kernels import Gate


class Norm(NamedTuple):
    """An RMSNorm with frozen weights: x / rms(x) · (offset + weight)."""

    weight: Tensor
    """d."""
    offset: float
    eps: float


class Site(NamedTuple):
    """A frozen matrix, and what is added to it."""

    weight: Tensor
    """N d."""
    bias: Tensor | None
    """N."""
    A: Tensor | None = None
    """r d."""
    B: Tensor | None = None
    """N r, scale included."""


def norm(x: Tensor, how: Norm) -> Tensor:
    """T d -> T d."""
    return _Norm.apply(x, how)


def linears(x: Tensor, how: Norm | None, sites: Sequence[Site], widths: Sequence[int]) -> tuple[Tensor, ...]:
    """What several matrices make of the same x, normed first: T d -> T N, side by side in memory, cut into columns of these widths."""
    return _Linears.apply(x, how, [(s.weight, s.bias) for s in sites], tuple(widths), *_factors(sites))


def linear_add(residual: Tensor | None, x: Tensor, site: Site, scale: float) -> Tensor:
    """residual + scale · (x through the matrix): T d -> T N."""
    return _LinearAdd.apply(residual, x, None, None, [(site.weight, site.bias)], scale, *_factors([site]))


def gated_linear_add(residual: Tensor | None, g: Tensor, u: Tensor, gate: Gate, site: Site, scale: float) -> Tensor:
    """residual + scale · ((act(g) · u) through the matrix): T d -> T N."""
    return _LinearAdd.apply(residual, g, u, gate, [(site.weight, site.bias)], scale, *_factors([site]))


def gated(g: Tensor, u: Tensor, gate: Gate) -> Tensor:
    """act(g) · u: T f, of g and u that are columns of one tensor."""
    return _Gated.apply(g, u, gate)


Frozen = Sequence[tuple[Tensor, Tensor | None]]
"""Weights and biases."""


def _factors(sites: Sequence[Site]) -> list[Tensor | None]:
    return [factor for site in sites for factor in (site.A, site.B)]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Norm) -> Tensor:
        y, rstd = kernels.rms_norm(x, *how)
        ctx.how = how
        ctx.save_for_backward(x, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        x, rstd = ctx.saved_tensors
        return kernels.rms_norm_backward(gradients[0], x, ctx.how.weight, rstd, ctx.how.offset), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, gate: Gate) -> Tensor:
        ctx.gate = gate
        ctx.save_for_backward(g, u)
        return kernels.gated(g, u, gate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        g, u = ctx.saved_tensors
        dg, du, _ = kernels.gated_backward(gradients[0].clone(), g, u, ctx.gate)
        return dg, du, None


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Norm | None, frozen: Frozen, widths: tuple[int, ...], *factors: Tensor | None) -> Any:
        y, rstd = kernels.rms_norm(x, *how) if how else (x, None)
        ctx.how, ctx.frozen = how, frozen
        made, inner = _product(y, frozen, factors)
        ctx.save_for_backward(x if how or inner is not None else None, rstd, inner, *factors)
        return made.split(widths, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, rstd, inner, *factors = ctx.saved_tensors
        dy = joined(gradients)
        dx, back = _input_gradient(dy, ctx.frozen, factors) if ctx.needs_input_grad[0] else (None, None)
        learned: list[Tensor | None] = [None] * len(factors)
        if any(ctx.needs_input_grad[4:]):
            y = kernels.rms_norm(x, *ctx.how)[0] if ctx.how else x
            learned = _factor_gradients(y, dy, ctx.frozen, factors, inner, back)
        if dx is not None and ctx.how:
            dx = kernels.rms_norm_backward(dx, x, ctx.how.weight, rstd, ctx.how.offset)
        return dx, None, None, None, *learned


class _LinearAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor | None, x: Tensor, u: Tensor | None, gate: Gate | None, frozen: Frozen, scale: float,
        *factors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        h = kernels.gated(x, u, gate) if gate and u is not None else x
        ctx.gate, ctx.frozen, ctx.scale = gate, frozen, scale
        ctx.save_for_backward(x if gate or any(f is not None for f in factors) else None, u, *factors)
        return _product(h, frozen, factors, residual, scale)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, u, *factors = ctx.saved_tensors
        dout = gradients[0]
        dy = dout if ctx.scale == 1.0 else dout * ctx.scale
        dx, du, h, back = None, None, x, None
        if any(ctx.needs_input_grad[1:3]):
            dx, back = _input_gradient(dy, ctx.frozen, factors)
            if ctx.gate:
                dx, du, h = kernels.gated_backward(dx, x, u, ctx.gate)
        elif ctx.gate:
            h = kernels.gated(x, u, ctx.gate)
        learned: list[Tensor | None] = [None] * len(factors)
        if any(ctx.needs_input_grad[6:]):
            learned = _factor_gradients(h, dy, ctx.frozen, factors, None, back)
        return dout if ctx.needs_input_grad[0] else None, dx, du, None, None, None, *learned


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Columns side by side; without a copy where that is how they lie in memory."""
    first, at = parts[0], parts[0].storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or part.storage_offset() != at:
            return torch.cat(list(parts), dim=1)
        if part.stride() != first.stride():
            return torch.cat(list(parts), dim=1)
        at += part.shape[1]
    width = at - first.storage_offset()
    if first.stride(1) != 1 or first.stride(0) < width:
        return torch.cat(list(parts), dim=1)
    return first.as_strided((len(first), width), first.stride())


class _Scratch(threading.local):
    """Memory for one changed matrix at a time, in each thread."""

    def __init__(self) -> None:
        self.held: dict[Any, Tensor] = {}

    def matrix(self, rows: int, columns: int, like: Tensor) -> Tensor:
        key, size = (like.dtype, like.device), rows * columns
        if key not in self.held or self.held[key].numel() < size:
            self.held[key] = like.new_empty(size)
        return self.held[key][:size].view(rows, columns)


_scratch = _Scratch()


def _changed(frozen: Frozen, factors: Sequence[Tensor | None], tokens: int) -> Tensor | None:
    """All matrices with what is added to them, one above the other, and their factors: [[W + B A, B], [A, 0]], (N + r) (d + r).

    So one product gives x (W + B A)ᵀ and x Aᵀ, another dy (W + B A) and dy B. None where that is not worth its while:
    writing it costs N · d numbers, and taking x through B A beside W costs T · N, with less work for each of them.
    """
    if all(factor is None for factor in factors) or tokens < frozen[0][0].shape[1]:
        return None
    numbers, inputs = sum(len(weight) for weight, _ in frozen), frozen[0][0].shape[1]
    rank = sum(len(A) for A in factors[::2] if A is not None)
    sums = _scratch.matrix(numbers + rank, inputs + rank, frozen[0][0])
    sums[:, inputs:].zero_()
    at, place = 0, 0
    for (weight, _), A, B in zip(frozen, factors[::2], factors[1::2], strict=True):
        here = slice(at, at := at + len(weight))
        if A is None or B is None:
            sums[here, :inputs].copy_(weight)
            continue
        torch.addmm(weight, B, A, out=sums[here, :inputs])
        sums[here, inputs + place : inputs + place + len(A)].copy_(B)
        sums[numbers + place : numbers + place + len(A), :inputs].copy_(A)
        place += len(A)
    return sums


def _product(
    x: Tensor, frozen: Frozen, factors: Sequence[Tensor | None], residual: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """residual + scale · (x through the matrices side by side), T N; and, without a residual, x Aᵀ of all factors side by side."""
    rows, inputs = [len(weight) for weight, _ in frozen], x.shape[1]
    changed, inner = _changed(frozen, factors, len(x)), None
    weight = frozen[0][0] if changed is None else changed[: sum(rows), :inputs]
    if residual is not None:
        assert len(frozen) == 1, "several matrices end nowhere"
        out = torch.addmm(residual, x, weight.T, alpha=scale)
    elif changed is not None:
        out, inner = torch.mm(x, changed[:, :inputs].T).tensor_split([sum(rows)], dim=1)
    else:
        out = x.new_empty(len(x), sum(rows))
        for (one, _), part in zip(frozen, out.split(rows, dim=1), strict=True):
            torch.mm(x, one.T, out=part)
    if residual is None and scale != 1.0:
        out = out.mul_(scale)
    if changed is None and any(factor is not None for factor in factors):
        inner = x @ torch.cat([A for A in factors[::2] if A is not None]).T
    place = 0
    for part, (_, bias), A, B in zip(out.split(rows, dim=1), frozen, factors[::2], factors[1::2], strict=True):
        if changed is None and A is not None and B is not None and inner is not None:
            part.addmm_(inner[:, place : place + len(A)], B.T, alpha=scale)
            place += len(A)
        if bias is not None:
            part.add_(bias, alpha=scale)
    return out, inner


def _input_gradient(dy: Tensor, frozen: Frozen, factors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """T N -> T d; and dy B of all factors side by side."""
    changed, inputs = _changed(frozen, factors, len(dy)), frozen[0][0].shape[1]
    if changed is not None:
        dx, back = (dy @ changed[: dy.shape[1]]).tensor_split([inputs], dim=1)
        return dx, back
    dx = dy.new_zeros(len(dy), inputs)
    for part, (weight, _) in zip(dy.split([len(weight) for weight, _ in frozen], dim=1), frozen, strict=True):
        dx.addmm_(part, weight)
    if all(factor is None for factor in factors):
        return dx, None
    back = _through_B(dy, frozen, factors)
    return dx.addmm_(back, torch.cat([A for A in factors[::2] if A is not None])), back


def _through_B(dy: Tensor, frozen: Frozen, factors: Sequence[Tensor | None]) -> Tensor:
    """dy B of all factors side by side: T N -> T r."""
    parts = dy.split([len(weight) for weight, _ in frozen], dim=1)
    return torch.cat([part @ B for part, B in zip(parts, factors[1::2], strict=True) if B is not None], dim=1)


def _factor_gradients(
    x: Tensor, dy: Tensor, frozen: Frozen, factors: Sequence[Tensor | None], inner: Tensor | None, back: Tensor | None
) -> list[Tensor | None]:
    """dA = (dy B)ᵀ x and dB = dyᵀ (x Aᵀ), from x Aᵀ (`inner`) and dy B (`back`) where they are known."""
    parts = dy.split([len(weight) for weight, _ in frozen], dim=1)
    adapted = [(part, A) for part, A in zip(parts, factors[::2], strict=True) if A is not None]
    ranks = [len(A) for _, A in adapted]
    inner = x @ torch.cat([A for _, A in adapted]).T if inner is None else inner
    back = _through_B(dy, frozen, factors) if back is None else back
    dA = iter((back.T @ x).split(ranks))
    # (uᵀ dy)ᵀ takes a quarter of the time of dyᵀ u.
    dB = iter([(u.T @ part).T for (part, _), u in zip(adapted, inner.split(ranks, dim=1), strict=True)])
    return [None if factor is None else next(dA if n % 2 == 0 else dB) for n, factor in enumerate(factors)]
