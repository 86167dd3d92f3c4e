"""The parts of a block as single operations. Each keeps for its backward pass what cannot be made again cheaply, and no more.

Frozen matrices with low-rank changes: y = x (W + B A)ᵀ. What is normed or gated on its way into one is made again in the
backward pass, by one pass over memory, so adapting a matrix keeps nothing that the frozen model would not.

Shapes: T tokens, d numbers in, N out, r rank.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.engine.arena import kept
from trimtab.engine.fused import kernels
from trimtab.engine.fused.kernels import Gate


class Norm(NamedTuple):
    """An RMSNorm: x / rms(x) · (offset + weight)."""

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
    """T d -> T d. Its weight may be trained; elsewhere it is taken as frozen."""
    return _Norm.apply(x, how.weight, how)


def linears(x: Tensor, how: Norm | None, sites: Sequence[Site], widths: Sequence[int]) -> tuple[Tensor, ...]:
    """What several matrices make of the same x, normed first: T d -> T N, side by side in memory, cut into columns of these widths.

    Before those, x again: who goes on with that one has its gradient added in the same pass as the norm's.
    """
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
    def forward(ctx: Any, x: Tensor, weight: Tensor, how: Norm) -> Tensor:
        y, rstd = kernels.rms_norm(x, *how)
        ctx.offset = how.offset
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = kernels.rms_norm_backward(gradients[0], x, weight, rstd, ctx.offset)
        if ctx.needs_input_grad[1]:
            dweight = (gradients[0] * x).mul_(rstd[:, None]).sum(0)
        return dx, dweight, None


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
        y, rstd = kernels.rms_norm(x, *how, transient=True) if how else (x, None)
        ctx.how, ctx.frozen = how, frozen
        made, inner = _product(y, frozen, factors, any(ctx.needs_input_grad))
        ctx.save_for_backward(x if how or inner is not None else None, rstd, inner, *factors)
        ctx.set_materialize_grads(False)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(x)
        return x, *made.split(widths, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, rstd, inner, *factors = ctx.saved_tensors
        how: Norm | None = ctx.how
        beside, dy = gradients[0], joined(gradients[1:])
        dx, back = _input_gradient(dy, ctx.frozen, factors) if ctx.needs_input_grad[0] else (None, None)
        learned: list[Tensor | None] = [None] * len(factors)
        if any(ctx.needs_input_grad[4:]):
            y = kernels.rms_norm(x, *how, transient=True)[0] if how else x
            learned = _factor_gradients(y, dy, ctx.frozen, factors, inner, back)
        if dx is not None and how:
            dx = kernels.rms_norm_backward(dx, x, how.weight, rstd, how.offset, beside)
        elif dx is not None and beside is not None:
            dx.add_(beside)
        return dx, None, None, None, *learned


class _LinearAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor | None, x: Tensor, u: Tensor | None, gate: Gate | None, frozen: Frozen, scale: float,
        *factors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        h = kernels.gated(x, u, gate, transient=True) if gate and u is not None else x
        ctx.gate, ctx.frozen, ctx.scale = gate, frozen, scale
        out, inner = _product(h, frozen, factors, any(ctx.needs_input_grad), residual, scale)
        ctx.save_for_backward(x if gate or inner is not None else None, u, inner, *factors)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, u, inner, *factors = ctx.saved_tensors
        dout = gradients[0]
        dy = dout if ctx.scale == 1.0 else dout * ctx.scale
        dx, du, h, back = None, None, x, None
        if any(ctx.needs_input_grad[1:3]):
            dx, back = _input_gradient(dy, ctx.frozen, factors)
            if ctx.gate:
                dx, du, h = kernels.gated_backward(dx, x, u, ctx.gate)
        elif ctx.gate:
            h = kernels.gated(x, u, ctx.gate, transient=True)
        learned: list[Tensor | None] = [None] * len(factors)
        if any(ctx.needs_input_grad[6:]):
            learned = _factor_gradients(h, dy, ctx.frozen, factors, inner, back)
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


def _product(
    x: Tensor,
    frozen: Frozen,
    factors: Sequence[Tensor | None],
    wanted: bool,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """residual + scale · (x through the matrices side by side), T N; and x Aᵀ of all factors side by side."""
    rows = [weight.shape[0] for weight, _ in frozen]
    out = kept(x, len(x), sum(rows), wanted)
    if residual is not None:
        assert len(frozen) == 1, "several matrices end nowhere"
        torch.addmm(residual, x, frozen[0][0].T, alpha=scale, out=out)
    else:
        for (weight, _), part in zip(frozen, _columns(out, rows), strict=True):
            torch.mm(x, weight.T, out=part)
        if scale != 1.0:
            out.mul_(scale)
    A = _side_by_side(factors[::2])
    inner, place = None if A is None else torch.mm(x, A.T, out=kept(x, len(x), len(A), wanted)), 0
    for part, (_, bias), B in zip(_columns(out, rows), frozen, factors[1::2], strict=True):
        if B is not None and inner is not None:
            part.addmm_(inner[:, place : (place := place + B.shape[1])], B.T, alpha=scale)
        if bias is not None:
            part.add_(bias, alpha=scale)
    return out, inner


def _input_gradient(dy: Tensor, frozen: Frozen, factors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """T N -> T d; and dy B of all factors side by side."""
    parts = _columns(dy, [weight.shape[0] for weight, _ in frozen])
    dx = parts[0] @ frozen[0][0]
    for part, (weight, _) in zip(parts[1:], frozen[1:], strict=True):
        dx.addmm_(part, weight)
    A = _side_by_side(factors[::2])
    if A is None:
        return dx, None
    back = _through_B(dy, frozen, factors)
    return dx.addmm_(back, A), back


def _columns(x: Tensor, widths: Sequence[int]) -> Sequence[Tensor]:
    return [x] if len(widths) == 1 else x.split(list(widths), dim=1)


def _side_by_side(factors: Sequence[Tensor | None]) -> Tensor | None:
    """All A, one above the other."""
    there = [factor for factor in factors if factor is not None]
    return torch.cat(there) if len(there) > 1 else there[0] if there else None


def _through_B(dy: Tensor, frozen: Frozen, factors: Sequence[Tensor | None]) -> Tensor:
    """dy B of all factors side by side: T N -> T r."""
    parts = _columns(dy, [weight.shape[0] for weight, _ in frozen])
    made = [part @ B for part, B in zip(parts, factors[1::2], strict=True) if B is not None]
    return made[0] if len(made) == 1 else torch.cat(made, dim=1)


def _factor_gradients(
    x: Tensor, dy: Tensor, frozen: Frozen, factors: Sequence[Tensor | None], inner: Tensor, back: Tensor | None
) -> list[Tensor | None]:
    """dA = (dy B)ᵀ x and dB = dyᵀ (x Aᵀ), from x Aᵀ (`inner`), and dy B (`back`) where it is known."""
    parts = _columns(dy, [weight.shape[0] for weight, _ in frozen])
    adapted = [(part, A) for part, A in zip(parts, factors[::2], strict=True) if A is not None]
    ranks = [len(A) for _, A in adapted]
    back = _through_B(dy, frozen, factors) if back is None else back
    dA = iter((back.T @ x).split(ranks))
    # (uᵀ dy)ᵀ takes a quarter of the time of dyᵀ u.
    dB = iter([(u.T @ part).T for (part, _), u in zip(adapted, _columns(inner, ranks), strict=True)])
    return [None if factor is None else next(dA if n % 2 == 0 else dB) for n, factor in enumerate(factors)]
