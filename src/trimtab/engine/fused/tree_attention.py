"""Attention over a tree of segments, rotary embedding included, as one operation on the CPU.

Each segment's tokens go in blocks, and a block's call ends with the block's last key: so nearly half of what causality
hides is not computed. A block's keys are those of its ancestors, of virtual tokens, and of its own segment, side by side,
which makes the softmax over all of them one call's. The calls are PyTorch's flash attention for CPUs (Dao 2023,
arXiv:2307.08691), which keeps one number a row and head for the backward pass, not the scores.

Shapes: T tokens, H = G · R query heads in G groups, K head size, P virtual tokens.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.data.tree import Segment
from trimtab.engine.fused import kernels

BLOCK = 256
"""Queries in a call, at most."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Block(NamedTuple):
    """Queries `start:end` of a pack see, of their segment's keys in sight, `low:high`."""

    start: int
    end: int
    low: int
    high: int
    hidden: Tensor | None
    """What they do not see of those, to be added to the scores; None for plain causality."""


class Piece(NamedTuple):
    """A segment's blocks, and where in the pack the keys in its sight are, after the virtual ones."""

    path: tuple[tuple[int, int], ...]
    blocks: tuple[Block, ...]


@lru_cache(maxsize=16)  # every layer asks the same
def pieces(segments: tuple[Segment, ...], virtual: int, window: int | None, dtype: torch.dtype) -> tuple[Piece, ...]:
    """A tree's attention, as calls: each segment after `virtual` tokens, seeing `window` tokens at most."""
    paths: list[tuple[tuple[int, int], ...]] = []
    made = []
    for start, end, parent in segments:
        path = (*(paths[parent] if parent >= 0 else ()), (start, end))
        paths.append(path)
        before = virtual + sum(high - low for low, high in path[:-1])
        size = -(-(end - start) // -(-(end - start) // BLOCK))
        blocks = []
        for at in range(start, end, size):
            stop = min(at + size, end)
            first, high = before + at - start, before + stop - start
            low = 0 if window is None else max(0, first - window + 1)
            blocks.append(Block(at, stop, low, high, _hidden(first - low, high - low, window, dtype)))
        made.append(Piece(path, tuple(blocks)))
    return tuple(made)


def _hidden(before: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
    """−∞ where the queries at `before` to `keys` do not see; None for plain causality."""
    if window is not None and keys > window:
        return _window(keys - before, keys, window, dtype)
    if before == 0:
        return None
    return _triangle(keys - before, 1 << (keys - 1).bit_length(), dtype)[:, -keys:]  # earlier keys are all seen


@lru_cache(maxsize=256)
def _triangle(queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    """−∞ above the diagonal that ends in the lower right corner."""
    return torch.full((queries, keys), float("-inf"), dtype=dtype).triu_(keys - queries + 1)


@lru_cache(maxsize=256)
def _window(queries: int, keys: int, window: int, dtype: torch.dtype) -> Tensor:
    q, k = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    return torch.zeros(queries, keys, dtype=dtype).masked_fill_((k > q) | (k <= q - window), float("-inf"))


class Sizes(NamedTuple):
    groups: int
    """G."""
    each: int
    """R, query heads in a group."""
    head: int
    """K."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    plan: tuple[Piece, ...],
    sizes: Sizes,
    scale: float,
    virtual: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """T H·K queries, T G·K keys and values -> T H·K. Turns q and k by cos and sin (T K) in place: nobody may need them afterwards.

    Args:
        virtual: Keys and values before every segment's: each G P K.
    """
    return _Attend.apply(q, k, v, cos, sin, plan, sizes, scale, *(virtual or (None, None)))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, plan: tuple[Piece, ...], sizes: Sizes, scale: float,
        first_k: Tensor | None, first_v: Tensor | None,
    ) -> Tensor:  # fmt: skip
        q, k = q.data, k.data  # turned in place: unlike detach(), without a word to those who might hold them, who are none
        kernels.rotate_(q, sizes.groups * sizes.each, cos, sin)
        kernels.rotate_(k, sizes.groups, cos, sin)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        sums = []
        for piece in plan:
            keys, values = _in_sight(k, piece, first_k, sizes), _in_sight(v, piece, first_v, sizes)
            for start, end, low, high, hidden in piece.blocks:
                here, lse = _forward(
                    _queries(q, start, end, sizes), keys[..., low:high, :], values[..., low:high, :], 0.0, hidden is None,
                    attn_mask=hidden, scale=scale,
                )  # fmt: skip
                _queries(out, start, end, sizes).copy_(here)
                sums.append(lse)
        ctx.plan, ctx.sizes, ctx.scale = plan, sizes, scale
        ctx.save_for_backward(q, k, v, cos, sin, out, first_k, first_v, *sums)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        q, k, v, cos, sin, out, first_k, first_v, *sums = ctx.saved_tensors
        dout, sizes, sum_of = gradients[0], ctx.sizes, iter(sums)
        both = q.new_empty(len(q), q.shape[1] + k.shape[1] + v.shape[1])
        dq, dk, dv = both.split([q.shape[1], k.shape[1], v.shape[1]], dim=1)
        dk.zero_()
        dv.zero_()
        dfirst_k, dfirst_v = (None if t is None else torch.zeros_like(t) for t in (first_k, first_v))
        for piece in ctx.plan:
            keys, values = _in_sight(k, piece, first_k, sizes), _in_sight(v, piece, first_v, sizes)
            dkeys, dvalues = (torch.zeros(t.shape[0], t.shape[2], t.shape[3], dtype=t.dtype) for t in (keys, values))
            for start, end, low, high, hidden in piece.blocks:
                here = [_queries(t, start, end, sizes) for t in (dout, q, out)]
                of_q, of_k, of_v = _backward(
                    here[0], here[1], keys[..., low:high, :], values[..., low:high, :], here[2], next(sum_of), 0.0,
                    hidden is None, attn_mask=hidden, scale=ctx.scale,
                )  # fmt: skip
                _queries(dq, start, end, sizes).copy_(of_q)
                dkeys[:, low:high] += of_k.sum(dim=1)
                dvalues[:, low:high] += of_v.sum(dim=1)
            _give_back(dkeys, dk, piece, dfirst_k, sizes)
            _give_back(dvalues, dv, piece, dfirst_v, sizes)
        kernels.rotate_(dq, sizes.groups * sizes.each, cos, sin, back=True)
        kernels.rotate_(dk, sizes.groups, cos, sin, back=True)
        return dq, dk, dv, None, None, None, None, None, dfirst_k, dfirst_v


def _queries(t: Tensor, start: int, end: int, sizes: Sizes) -> Tensor:
    """G R n K, a view: groups as the batch, so that a group's heads share its keys without a copy."""
    return t[start:end].view(end - start, *sizes).permute(1, 2, 0, 3)


def _in_sight(t: Tensor, piece: Piece, first: Tensor | None, sizes: Sizes) -> Tensor:
    """G R L K of the keys (or values) in a segment's sight."""
    parts = [t[low:high].view(high - low, sizes.groups, sizes.head).transpose(0, 1) for low, high in piece.path]
    parts = parts if first is None else [first, *parts]
    seen = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return seen[:, None].expand(-1, sizes.each, -1, -1)


def _give_back(gradient: Tensor, to: Tensor, piece: Piece, first: Tensor | None, sizes: Sizes) -> None:
    """Add the gradient of what was in sight (G L K) to where it came from."""
    at = 0
    if first is not None:
        at = first.shape[1]
        first += gradient[:, :at]
    for low, high in piece.path:
        place = to[low:high].view(high - low, sizes.groups, sizes.head).transpose(0, 1)
        place += gradient[:, at : at + high - low]
        at += high - low
