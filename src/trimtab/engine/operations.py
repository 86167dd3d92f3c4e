"""The parts of a decoder layer as single differentiable operations, which save only what is expensive to recompute.

Frozen matrices with low-rank updates (see `low_rank`). The norm or gate before a matrix is recomputed in the backward pass,
by one pass over memory, so a matrix with an adapter saves no more than the frozen model would.

Shapes: T tokens, d numbers in, N out, r rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.core.attention import at_least_float32
from trimtab.engine.backends import Activation, Norm, backend_for
from trimtab.engine.low_rank import (
    Linear,
    draw_masks,
    factor_gradients,
    input_gradient,
    join_columns,
    product,
    working_copies,
)


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """T d -> T d. This operation alone computes the gradient of the norm's weight, too."""
    return _RMSNorm.apply(x, norm.weight, norm)


def linears(x: Tensor, norm: Norm | None, layers: Sequence[Linear], widths: Sequence[int]) -> tuple[Tensor, ...]:
    """x, and what several linear layers make of norm(x): T d -> T N, side by side in memory, split into columns of these widths.

    A residual connection around them takes the x that is returned: its gradient is added in the same pass as the norm's.
    """
    factors = [factor for layer in layers for factor in (layer.A, layer.B)]
    return _Linears.apply(x, norm, [layer._replace(A=None, B=None) for layer in layers], tuple(widths), *factors)


Gate = tuple[Tensor, Activation]
"""u and the activation function of act(g) · u."""


def linear_add(residual: Tensor | None, x: Tensor, layer: Linear, scale: float, gate: Gate | None = None) -> Tensor:
    """residual + scale · layer(x): T d -> T N; or with a gate, residual + scale · layer(act(x) · u)."""
    frozen = [layer._replace(A=None, B=None)]
    return _LinearAdd.apply(residual, x, *(gate or (None, None)), frozen, scale, layer.A, layer.B)


def gate(g: Tensor, u: Tensor, activation: Activation) -> Tensor:
    """act(g) · u: T f."""
    return _Gate.apply(g, u, activation)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, norm: Norm) -> Tensor:
        rounded = weight.to(x.dtype)
        y, rstd = backend_for(x, rounded).rms_norm(x, norm._replace(weight=rounded))
        ctx.norm, ctx.dtype = (norm.offset, norm.eps), weight.dtype
        ctx.save_for_backward(x, rounded, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        norm = Norm(weight, *ctx.norm)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = backend_for(gradients[0], x, weight).rms_norm_backward(gradients[0], x, norm, rstd)
        if ctx.needs_input_grad[1]:
            dweight = (at_least_float32(gradients[0]) * x).mul_(rstd[..., None]).flatten(0, -2).sum(0).to(ctx.dtype)
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
        ctx: Any, x: Tensor, norm: Norm | None, frozen: Sequence[Linear], widths: tuple[int, ...], *factors: Tensor | None
    ) -> Any:
        y, rstd = backend_for(x, norm.weight).rms_norm(x, norm, scratch=True) if norm else (x, None)
        ctx.norm, ctx.frozen = norm, frozen
        working, masks = working_copies(frozen, factors), draw_masks(y, frozen, factors)
        out, inner = product(y, frozen, working, masks, any(ctx.needs_input_grad))
        ctx.save_for_backward(x if norm or inner is not None else None, rstd, inner, *working, *masks)
        ctx.set_materialize_grads(False)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(x)
        return x, *out.split(widths, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, rstd, inner, *saved = ctx.saved_tensors
        factors, masks = saved[: 2 * len(ctx.frozen)], saved[2 * len(ctx.frozen) :]
        norm: Norm | None = ctx.norm
        residual, dy = gradients[0], join_columns(gradients[1:])
        dx, back = input_gradient(dy, ctx.frozen, factors, masks) if ctx.needs_input_grad[0] else (None, None)
        dfactors: list[Tensor | None] = [None] * len(factors)
        if any(ctx.needs_input_grad[4:]):
            y = backend_for(x, norm.weight).rms_norm(x, norm, scratch=True)[0] if norm else x
            dfactors = factor_gradients(y, dy, ctx.frozen, factors, masks, inner, back)
        if dx is not None and norm:
            dx = backend_for(dx, x, norm.weight, residual).rms_norm_backward(dx, x, norm, rstd, residual)
        elif dx is not None and residual is not None:
            dx.add_(residual)
        return dx, None, None, None, *dfactors


class _LinearAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor | None, x: Tensor, u: Tensor | None, activation: Activation | None, frozen: Sequence[Linear],
        scale: float, *factors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        h = backend_for(x, u).gate(x, u, activation, scratch=True) if activation and u is not None else x
        ctx.activation, ctx.frozen, ctx.scale = activation, frozen, scale
        working, masks = working_copies(frozen, factors), draw_masks(h, frozen, factors)
        out, inner = product(h, frozen, working, masks, any(ctx.needs_input_grad), residual, scale)
        ctx.save_for_backward(x if activation or inner is not None else None, u, inner, *working, *masks)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, u, inner, *factors, mask = ctx.saved_tensors
        dout = gradients[0]
        dy = dout if ctx.scale == 1.0 else dout * ctx.scale
        dx, du, h, back = None, None, x, None
        if any(ctx.needs_input_grad[1:3]):
            dx, back = input_gradient(dy, ctx.frozen, factors, [mask])
            if ctx.activation:
                dx, du, h = backend_for(dx, x, u).gate_backward_(dx, x, u, ctx.activation)
        elif ctx.activation:
            h = backend_for(x, u).gate(x, u, ctx.activation, scratch=True)
        dfactors: list[Tensor | None] = [None] * len(factors)
        if any(ctx.needs_input_grad[6:]):
            dfactors = factor_gradients(h, dy, ctx.frozen, factors, [mask], inner, back)
        return dout if ctx.needs_input_grad[0] else None, dx, du, None, None, None, *dfactors
