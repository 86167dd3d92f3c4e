"""The parts of a decoder layer as single differentiable operations, which save only what is expensive to recompute.

Frozen matrices with low-rank updates: y = x (W + B A)ᵀ. The norm or gate before a matrix is recomputed in the backward pass,
by one pass over memory, so a matrix with an adapter saves no more than the frozen model would.

Shapes: T tokens, d numbers in, N out, r rank.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.engine.arena import activation_like
from trimtab.engine.backends import Activation, Norm, backend_for


class Linear(NamedTuple):
    """A frozen linear layer with its low-rank update."""

    weight: Tensor
    """N d."""
    bias: Tensor | None
    """N."""
    A: Tensor | None = None
    """r d."""
    B: Tensor | None = None
    """N r, scale included."""


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """T d -> T d. This operation alone computes the gradient of the norm's weight, too."""
    return _RMSNorm.apply(x, norm.weight, norm)


def linears(x: Tensor, norm: Norm | None, layers: Sequence[Linear], widths: Sequence[int]) -> tuple[Tensor, ...]:
    """x, and what several linear layers make of norm(x): T d -> T N, side by side in memory, split into columns of these widths.

    A residual connection around them takes the x that is returned: its gradient is added in the same pass as the norm's.
    """
    factors = [factor for layer in layers for factor in (layer.A, layer.B)]
    return _Linears.apply(x, norm, [(layer.weight, layer.bias) for layer in layers], tuple(widths), *factors)


Gate = tuple[Tensor, Activation]
"""u and the activation function of act(g) · u."""


def linear_add(residual: Tensor | None, x: Tensor, layer: Linear, scale: float, gate: Gate | None = None) -> Tensor:
    """residual + scale · layer(x): T d -> T N; or with a gate, residual + scale · layer(act(x) · u)."""
    return _LinearAdd.apply(residual, x, *(gate or (None, None)), [(layer.weight, layer.bias)], scale, layer.A, layer.B)


def gate(g: Tensor, u: Tensor, activation: Activation) -> Tensor:
    """act(g) · u: T f."""
    return _Gate.apply(g, u, activation)


Frozen = Sequence[tuple[Tensor, Tensor | None]]
"""Weights and biases."""


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, norm: Norm) -> Tensor:
        y, rstd = backend_for(x, weight).rms_norm(x, norm)
        ctx.norm = norm.offset, norm.eps
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        norm = Norm(weight, *ctx.norm)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = backend_for(gradients[0], x, weight, rstd).rms_norm_backward(gradients[0], x, norm, rstd)
        if ctx.needs_input_grad[1]:
            dweight = (gradients[0] * x).mul_(rstd[:, None]).sum(0)
        return dx, dweight, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, activation: Activation) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(g, u)
        return backend_for(g, u).gate(g, u, activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (g, u), dh = ctx.saved_tensors, gradients[0].clone()
        dg, du, _ = backend_for(dh, g, u).gate_backward_(dh, g, u, ctx.activation)
        return dg, du, None


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Norm | None, frozen: Frozen, widths: tuple[int, ...], *factors: Tensor | None
    ) -> Any:
        y, rstd = backend_for(x, norm.weight).rms_norm(x, norm, scratch=True) if norm else (x, None)
        ctx.norm, ctx.frozen = norm, frozen
        out, inner = _product(y, frozen, factors, any(ctx.needs_input_grad))
        ctx.save_for_backward(x if norm or inner is not None else None, rstd, inner, *factors)
        ctx.set_materialize_grads(False)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(x)
        return x, *out.split(widths, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, rstd, inner, *factors = ctx.saved_tensors
        norm: Norm | None = ctx.norm
        residual, dy = gradients[0], join_columns(gradients[1:])
        dx, back = _input_gradient(dy, ctx.frozen, factors) if ctx.needs_input_grad[0] else (None, None)
        dfactors: list[Tensor | None] = [None] * len(factors)
        if any(ctx.needs_input_grad[4:]):
            y = backend_for(x, norm.weight).rms_norm(x, norm, scratch=True)[0] if norm else x
            dfactors = _factor_gradients(y, dy, ctx.frozen, factors, inner, back)
        if dx is not None and norm:
            dx = backend_for(dx, x, norm.weight, rstd, residual).rms_norm_backward(dx, x, norm, rstd, residual)
        elif dx is not None and residual is not None:
            dx.add_(residual)
        return dx, None, None, None, *dfactors


class _LinearAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor | None, x: Tensor, u: Tensor | None, activation: Activation | None, frozen: Frozen,
        scale: float, *factors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        h = backend_for(x, u).gate(x, u, activation, scratch=True) if activation and u is not None else x
        ctx.activation, ctx.frozen, ctx.scale = activation, frozen, scale
        out, inner = _product(h, frozen, factors, any(ctx.needs_input_grad), residual, scale)
        ctx.save_for_backward(x if activation or inner is not None else None, u, inner, *factors)
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
            if ctx.activation:
                dx, du, h = backend_for(dx, x, u).gate_backward_(dx, x, u, ctx.activation)
        elif ctx.activation:
            h = backend_for(x, u).gate(x, u, ctx.activation, scratch=True)
        dfactors: list[Tensor | None] = [None] * len(factors)
        if any(ctx.needs_input_grad[6:]):
            dfactors = _factor_gradients(h, dy, ctx.frozen, factors, inner, back)
        return dout if ctx.needs_input_grad[0] else None, dx, du, None, None, None, *dfactors


def join_columns(parts: Sequence[Tensor]) -> Tensor:
    """torch.cat(parts, dim=1), without a copy where the parts already lie side by side in memory."""
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
    backward: bool,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """residual + scale · (x through the matrices, side by side), T N; and x Aᵀ of all factors side by side."""
    rows = [weight.shape[0] for weight, _ in frozen]
    out = activation_like(x, len(x), sum(rows), backward)
    if residual is not None:
        assert len(frozen) == 1, "the layers at a residual connection's end have one matrix"
        torch.addmm(residual, x, frozen[0][0].T, alpha=scale, out=out)
    else:
        for (weight, _), part in zip(frozen, _columns(out, rows), strict=True):
            torch.mm(x, weight.T, out=part)
        if scale != 1.0:
            out.mul_(scale)
    A = _stacked_A(factors)
    inner, place = None if A is None else torch.mm(x, A.T, out=activation_like(x, len(x), len(A), backward)), 0
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
    A = _stacked_A(factors)
    if A is None:
        return dx, None
    back = _through_B(dy, frozen, factors)
    return dx.addmm_(back, A), back


def _columns(x: Tensor, widths: Sequence[int]) -> Sequence[Tensor]:
    return [x] if len(widths) == 1 else x.split(list(widths), dim=1)


def _stacked_A(factors: Sequence[Tensor | None]) -> Tensor | None:
    """All A, one above the other."""
    matrices = [A for A in factors[::2] if A is not None]
    return torch.cat(matrices) if len(matrices) > 1 else matrices[0] if matrices else None


def _through_B(dy: Tensor, frozen: Frozen, factors: Sequence[Tensor | None]) -> Tensor:
    """dy B of all factors side by side: T N -> T r."""
    parts = _columns(dy, [weight.shape[0] for weight, _ in frozen])
    products = [part @ B for part, B in zip(parts, factors[1::2], strict=True) if B is not None]
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)


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
