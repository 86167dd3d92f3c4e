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
        ctx.how, ctx.frozen, ctx.widths = how, frozen, widths
        ctx.save_for_backward(x if how or any(f is not None for f in factors) else None, rstd, *factors)
        return _product(y, frozen, factors).split(widths, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, rstd, *factors = ctx.saved_tensors
        dy = joined(gradients)
        dx = _input_gradient(dy, ctx.frozen, factors) if ctx.needs_input_grad[0] else None
        learned: list[Tensor | None] = [None] * len(factors)
        if any(ctx.needs_input_grad[4:]):
            y = kernels.rms_norm(x, *ctx.how)[0] if ctx.how else x
            learned = _factor_gradients(y, dy, ctx.frozen, factors)
        if dx is not None and ctx.how:
            dx = kernels.rms_norm_backward(dx, x, ctx.how.weight, rstd, ctx.how.offset)
        return dx, None, None, None, *learned


class _LinearAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor | None,
        x: Tensor,
        u: Tensor | None,
        gate: Gate | None,
        frozen: Frozen,
        scale: float,
        *factors: Tensor | None,
    ) -> Tensor:
        h = kernels.gated(x, u, gate) if gate and u is not None else x
        ctx.gate, ctx.frozen, ctx.scale = gate, frozen, scale
        ctx.save_for_backward(x if gate or any(f is not None for f in factors) else None, u, *factors)
        return _product(h, frozen, factors, residual, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, u, *factors = ctx.saved_tensors
        dout = gradients[0]
        dy = dout if ctx.scale == 1.0 else dout * ctx.scale
        dx, du, h = None, None, x
        if any(ctx.needs_input_grad[1:3]):
            dx = _input_gradient(dy, ctx.frozen, factors)
            if ctx.gate:
                dx, du, h = kernels.gated_backward(dx, x, u, ctx.gate)
        elif ctx.gate:
            h = kernels.gated(x, u, ctx.gate)
        learned = _factor_gradients(h, dy, ctx.frozen, factors) if any(ctx.needs_input_grad[6:]) else [None] * len(factors)
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

    def matrix(self, rows: int, like: Tensor) -> Tensor:
        key, size = (like.dtype, like.device), rows * like.shape[1]
        if key not in self.held or self.held[key].numel() < size:
            self.held[key] = like.new_empty(size)
        return self.held[key][:size].view(rows, like.shape[1])


_scratch = _Scratch()


def _changed(frozen: Frozen, factors: Sequence[Tensor | None], tokens: int) -> Tensor | None:
    """All matrices with what is added to them, one above the other; None where the sum is not worth its while.

    Writing the sum costs N · d numbers, and taking x through B A beside W costs T · N, with less work for each of them.
    """
    if all(factor is None for factor in factors) or tokens < frozen[0][0].shape[1]:
        return None
    sums = _scratch.matrix(sum(len(weight) for weight, _ in frozen), frozen[0][0])
    at = 0
    for (weight, _), A, B in zip(frozen, factors[::2], factors[1::2], strict=True):
        here = sums[at : at + len(weight)]
        at += len(weight)
        here.copy_(weight) if A is None or B is None else torch.addmm(weight, B, A, out=here)
    return sums


def _product(
    x: Tensor, frozen: Frozen, factors: Sequence[Tensor | None], residual: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """residual + scale · (x through the matrices side by side): T N."""
    rows = [len(weight) for weight, _ in frozen]
    changed = _changed(frozen, factors, len(x))
    if changed is not None or len(frozen) == 1:
        weight = changed if changed is not None else frozen[0][0]
        if residual is None:
            out = torch.mm(x, weight.T)
            out = out if scale == 1.0 else out.mul_(scale)
        else:
            out = torch.addmm(residual, x, weight.T, alpha=scale)
    else:
        assert residual is None, "several matrices end nowhere"
        out = x.new_empty(len(x), sum(rows))
        for (weight, _), part in zip(frozen, out.split(rows, dim=1), strict=True):
            torch.mm(x, weight.T, out=part)
    for part, (_, bias), A, B in zip(out.split(rows, dim=1), frozen, factors[::2], factors[1::2], strict=True):
        if changed is None and A is not None and B is not None:
            part.addmm_(x @ A.T, B.T, alpha=scale)
        if bias is not None:
            part.add_(bias, alpha=scale)
    return out


def _input_gradient(dy: Tensor, frozen: Frozen, factors: Sequence[Tensor | None]) -> Tensor:
    """T N -> T d."""
    changed = _changed(frozen, factors, len(dy))
    if changed is not None:
        return dy @ changed
    parts = dy.split([len(weight) for weight, _ in frozen], dim=1)
    dx: Tensor | None = None
    for part, (weight, _), A, B in zip(parts, frozen, factors[::2], factors[1::2], strict=True):
        dx = part @ weight if dx is None else dx.addmm_(part, weight)
        if A is not None and B is not None:
            dx.addmm_(part @ B, A)
    assert dx is not None
    return dx


def _factor_gradients(x: Tensor, dy: Tensor, frozen: Frozen, factors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """dA = (dy B)ᵀ x and dB = dyᵀ (x Aᵀ), those of all matrices with x at once."""
    parts = dy.split([len(weight) for weight, _ in frozen], dim=1)
    adapted = [(part, A, B) for part, A, B in zip(parts, factors[::2], factors[1::2], strict=True) if A is not None]
    ranks = [len(A) for _, A, _ in adapted]
    inner = (x @ torch.cat([A for _, A, _ in adapted]).T).split(ranks, dim=1)
    back = torch.cat([part @ B for part, _, B in adapted], dim=1)
    dA = iter((back.T @ x).split(ranks))
    dB = iter([(u.T @ part).T for (part, _, _), u in zip(adapted, inner, strict=True)])  # four times as fast as part.T @ u
    return [None if factor is None else next(dA if n % 2 == 0 else dB) for n, factor in enumerate(factors)]
