"""Products of tokens with frozen matrices and their low-rank updates: y = x Wᵀ + b + drop(x) Aᵀ Bᵀ, and its gradients.

Where the frozen matrices have 16 bits, trained factors are float32. Products take rounded copies of them, sum in float32 and round
once; gradients are taken as those of the factors themselves (a straight-through estimate, as under autocast), and are never rounded
to 16 bits. W + B A is never formed: to 16 bits, it would lose most of the change.

Shapes: T tokens, d numbers in, N out, r rank.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.base.quantized import StoredMatrix, stored_matrix
from trimtab.engine.arena import activation_like
from trimtab.engine.dropout import draw, kept
from trimtab.engine.products import HALF, sums_of_products
from trimtab.methods import AdapterLayer, LowRankUpdate, Routing


class Linear(NamedTuple):
    """A frozen linear layer with its low-rank update."""

    weight: Tensor | StoredMatrix
    """N d."""
    bias: Tensor | None
    """N."""
    A: Tensor | None = None
    """r d."""
    B: Tensor | None = None
    """N r, scale included."""
    dropout: float = 0.0
    """Probability with which an input of A is dropped. The others are not scaled: B holds the 1 / (1 − p), too."""


def linear_of(module: nn.Module, dtype: torch.dtype) -> Linear | None:
    """A frozen linear layer with the low-rank updates that act on it; None for anything else.

    Args:
        dtype: Of what it is given.
    """
    updates: list[LowRankUpdate] = []
    while isinstance(module, AdapterLayer):
        if state := module.switch.state:
            if (merged := None if isinstance(state, Routing) else module.twin()) is not None:
                module = merged
                break
            update = None if isinstance(state, Routing) else module.low_rank_factors()
            if update is None:
                return None
            updates.append(LowRankUpdate(*update))
        module = module.base
    weight: Any = module.weight if type(module) is nn.Linear else stored_matrix(module, dtype)
    if weight is None or any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        return None
    if len(updates) > 1:
        if any(update.dropout for update in updates):
            return None
        updates = [LowRankUpdate(torch.cat([A for A, _, _ in updates]), torch.cat([B for _, B, _ in updates], dim=1))]
    if updates and (p := updates[0].dropout):
        updates = [updates[0]._replace(B=updates[0].B / (1 - p))]
    bias: Any = module.bias
    return Linear(weight, bias, *(updates[0] if updates else ()))


def dense(layer: Linear) -> Tensor:
    """Its matrix, N d; if that is quantized, for a product that keeps it no longer: allocators then give its memory to the next."""
    return layer.weight if isinstance(layer.weight, Tensor) else layer.weight.dense()


Factors = Sequence[Tensor | None]
"""A and B of each layer in turn, or None twice."""
Masks = Sequence[Tensor | None]
"""What `dropout.draw` gave for each layer; None where nothing is dropped."""


def working_copies(layers: Sequence[Linear], factors: Factors) -> list[Tensor | None]:
    """The factors in their matrices' dtype: with float32 or float64 matrices, the factors themselves."""
    return [None if f is None else f.to(layers[n // 2].weight.dtype) for n, f in enumerate(factors)]


def draw_masks(x: Tensor, layers: Sequence[Linear], factors: Factors) -> list[Tensor | None]:
    """The masks of A's inputs, which are shaped as x, in the layers' order."""
    pairs = zip(layers, factors[::2], strict=True)
    return [draw(x, layer.dropout) if layer.dropout and A is not None else None for layer, A in pairs]


def product(
    x: Tensor,
    layers: Sequence[Linear],
    factors: Factors,
    masks: Masks,
    backward: bool,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """residual + scale · (x through the layers, side by side), T N; and drop(x) Aᵀ of all factors side by side."""
    rows = [len(layer.weight) for layer in layers]
    out = activation_like(x, len(x), sum(rows), backward)
    inner = _through_A(x, layers, factors, masks, backward)
    if x.dtype in HALF:
        _product_in_half_(out, x, layers, factors, inner, residual, scale)
        return out, inner
    if residual is not None:
        assert len(layers) == 1, "the layers at a residual connection's end have one matrix"
        torch.addmm(residual, x, dense(layers[0]).T, alpha=scale, out=out)
    else:
        for layer, part in zip(layers, _columns(out, rows), strict=True):
            torch.mm(x, dense(layer).T, out=part)
        if scale != 1.0:
            out.mul_(scale)
    place = 0
    for part, layer, B in zip(_columns(out, rows), layers, factors[1::2], strict=True):
        if B is not None and inner is not None:
            part.addmm_(inner[:, place : (place := place + B.shape[1])], B.T, alpha=scale)
        if layer.bias is not None:
            part.add_(layer.bias, alpha=scale)
    return out, inner


def _product_in_half_(
    out: Tensor,
    x: Tensor,
    layers: Sequence[Linear],
    factors: Factors,
    inner: Tensor | None,
    residual: Tensor | None,
    scale: float,
) -> None:
    """The same, written to `out`. The change comes first, so that the sum of both products is rounded once.

    The residual stream may be far larger than what is added to it, and is rounded once, too.
    """
    place, changed = 0, False
    for part, layer, B in zip(_columns(out, [len(layer.weight) for layer in layers]), layers, factors[1::2], strict=True):
        start = layer.bias
        if B is not None and inner is not None:
            u, changed = inner[:, place : (place := place + B.shape[1])], True
            start = torch.mm(u, B.T, out=part) if start is None else torch.addmm(start, u, B.T, out=part)
        if start is not None:
            torch.addmm(start, x, dense(layer).T, out=part)
        elif residual is None:
            torch.mm(x, dense(layer).T, out=part)
    if residual is not None and not changed and layers[0].bias is None:
        torch.addmm(residual, x, dense(layers[0]).T, alpha=scale, out=out)
    elif residual is not None:
        torch.add(residual, out, alpha=scale, out=out)
    elif scale != 1.0:
        out.mul_(scale)


def input_gradient(dy: Tensor, layers: Sequence[Linear], factors: Factors, masks: Masks) -> tuple[Tensor, Tensor | None]:
    """T N -> T d; and dy B of all factors side by side."""
    parts = _columns(dy, [len(layer.weight) for layer in layers])
    dx = parts[0] @ dense(layers[0])
    for part, layer in zip(parts[1:], layers[1:], strict=True):
        dx.addmm_(part, dense(layer))
    A = _stacked_A(factors)
    if A is None:
        return dx, None
    back = _through_B(dy, layers, factors)
    if all(mask is None for mask in masks):
        return dx.addmm_(back, A), back
    for v, (A, dropped) in zip(_columns(back, _ranks(factors)), _adapted(layers, factors, masks), strict=True):
        dx = dx.addmm_(v, A) if dropped is None else dx.add_(dropped(v @ A))
    return dx, back


def factor_gradients(
    x: Tensor, dy: Tensor, layers: Sequence[Linear], factors: Factors, masks: Masks, inner: Tensor, back: Tensor | None
) -> list[Tensor | None]:
    """dA = (dy B)ᵀ drop(x) and dB = dyᵀ (drop(x) Aᵀ), in at least float32, from drop(x) Aᵀ (`inner`), and dy B (`back`) where it is known."""
    parts = _columns(dy, [len(layer.weight) for layer in layers])
    adapted, ranks = [part for part, A in zip(parts, factors[::2], strict=True) if A is not None], _ranks(factors)
    back = _through_B(dy, layers, factors) if back is None else back
    if all(mask is None for mask in masks):
        dA = iter(sums_of_products(back.T, x).split(ranks))
    else:
        pairs = zip(_columns(back, ranks), _adapted(layers, factors, masks), strict=True)
        dA = iter([sums_of_products(v.T, x if dropped is None else dropped(x)) for v, (_, dropped) in pairs])
    # (uᵀ dy)ᵀ takes a quarter of the time of dyᵀ u.
    dB = iter([sums_of_products(u.T, part).T for part, u in zip(adapted, _columns(inner, ranks), strict=True)])
    return [None if factor is None else next(dA if n % 2 == 0 else dB) for n, factor in enumerate(factors)]


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


def _columns(x: Tensor, widths: Sequence[int]) -> Sequence[Tensor]:
    return [x] if len(widths) == 1 else x.split(list(widths), dim=1)


def _ranks(factors: Factors) -> list[int]:
    return [len(A) for A in factors[::2] if A is not None]


def _adapted(
    layers: Sequence[Linear], factors: Factors, masks: Masks
) -> list[tuple[Tensor, Callable[[Tensor], Tensor] | None]]:
    """Of each layer that has an update, A, and what drops the numbers of T d that the mask says, if there is one."""
    found: list[tuple[Tensor, Callable[[Tensor], Tensor] | None]] = []
    for layer, A, mask in zip(layers, factors[::2], masks, strict=True):
        if A is not None:
            found.append((A, None if mask is None else partial(_dropped, mask, layer.dropout)))
    return found


def _dropped(mask: Tensor, p: float, x: Tensor) -> Tensor:
    return x * kept(mask, x, p)


def _stacked_A(factors: Factors) -> Tensor | None:
    """All A, one above the other."""
    matrices = [A for A in factors[::2] if A is not None]
    return torch.cat(matrices) if len(matrices) > 1 else matrices[0] if matrices else None


def _through_A(x: Tensor, layers: Sequence[Linear], factors: Factors, masks: Masks, backward: bool) -> Tensor | None:
    """drop(x) Aᵀ of all factors side by side: T d -> T r."""
    A = _stacked_A(factors)
    if A is None:
        return None
    inner = activation_like(x, len(x), len(A), backward)
    if all(mask is None for mask in masks):
        return torch.mm(x, A.T, out=inner)
    for part, (A, dropped) in zip(_columns(inner, _ranks(factors)), _adapted(layers, factors, masks), strict=True):
        torch.mm(x if dropped is None else dropped(x), A.T, out=part)
    return inner


def _through_B(dy: Tensor, layers: Sequence[Linear], factors: Factors) -> Tensor:
    """dy B of all factors side by side: T N -> T r."""
    parts = _columns(dy, [len(layer.weight) for layer in layers])
    products = [part @ B for part, B in zip(parts, factors[1::2], strict=True) if B is not None]
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)
