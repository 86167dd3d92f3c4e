"""Attention over a tree of segments, rotary embedding included, as one operation on the CPU.

By compiled code (attention.h), or by PyTorch's flash attention (Dao 2023, arXiv:2307.08691) where there is no compiler. A
segment's keys are those of virtual tokens, of its ancestors, and its own, side by side.

Shapes: T tokens, H = G · R query heads in G groups, K head size, P virtual tokens.
"""

import ctypes
from functools import lru_cache
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from trimtab.data.prefix_tree import Segment, evenly_chained, paths_of
from trimtab.engine.arena import kept
from trimtab.engine.fused import kernels

BLOCK = 256
"""Queries in a call, at most."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class AttentionPlan(NamedTuple):
    """What each token sees."""

    segments: tuple[Segment, ...]
    virtual: int
    """Tokens before every segment, which all see."""
    window: int | None
    """How many tokens back, itself included."""


class ScoreBlock(NamedTuple):
    """Queries `start:end` of a pack see, of their segment's keys in sight, `low:high`."""

    start: int
    end: int
    low: int
    high: int
    hidden: Tensor | None
    """What they do not see of those, to be added to the scores; None for plain causality."""


class SegmentPlan(NamedTuple):
    """A segment's blocks, and where in the pack the keys in its sight are, after the virtual ones."""

    path: tuple[tuple[int, int], ...]
    blocks: tuple[ScoreBlock, ...]


@lru_cache(maxsize=16)  # every layer asks the same
def segment_plans(plan: AttentionPlan, dtype: torch.dtype) -> tuple[SegmentPlan, ...]:
    """A tree's attention, as calls: each segment after the virtual tokens."""
    segments, virtual, window = plan
    made = []
    for (start, end, _), numbers in zip(segments, paths_of(segments), strict=True):
        path = tuple((segments[n].start, segments[n].end) for n in numbers)
        before = virtual + sum(high - low for low, high in path[:-1])
        size = -(-(end - start) // -(-(end - start) // BLOCK))
        blocks = []
        for at in range(start, end, size):
            stop = min(at + size, end)
            place, high = before + at - start, before + stop - start
            low = 0 if window is None else max(0, place - window + 1)
            blocks.append(ScoreBlock(at, stop, low, high, _hidden(place - low, high - low, window, dtype)))
        made.append(SegmentPlan(path, tuple(blocks)))
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
    plan: AttentionPlan,
    sizes: Sizes,
    scale: float,
    virtual: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """T H·K queries, T G·K keys and values -> T H·K. Turns q and k by cos and sin (T K).

    Args:
        virtual: Keys and values before every segment's: each G P K.
    """
    how = _Compiled if kernels.compiled(q, k, v, cos, sin, *(virtual or ())) else _InTorch
    return how.apply(q, k, v, cos, sin, plan, sizes, scale, *(virtual or (None, None)))


class _Tree(ctypes.Structure):
    """As in attention.h."""

    _fields_: ClassVar = [
        *((name, ctypes.c_int64) for name in ("segments", "tokens", "groups", "each", "head", "virtual_tokens", "window")),
        *((name, ctypes.c_int64) for name in ("q_row", "k_row", "v_row", "d_row")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("start", "end", "path", "on_path", "users", "user", "before", "order")),
    ]


@lru_cache(maxsize=16)  # every layer asks the same
def _cut(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """A long row would be one task a head, which few threads share evenly."""
    return evenly_chained(segments, 512)


@lru_cache(maxsize=16)
def _arrays(segments: tuple[Segment, ...], virtual: int) -> tuple[Tensor, ...]:
    """Of attention.h's Tree."""
    lengths = [end - start for start, end, _ in segments]
    paths = paths_of(segments)
    seen_by: list[list[tuple[int, int]]] = [[] for _ in segments]
    for number, path in enumerate(paths):
        for place, one in enumerate(path):
            seen_by[one].append((number, virtual + sum(lengths[n] for n in path[:place])))
    arrays = [
        [start for start, _, _ in segments],
        [end for _, end, _ in segments],
        [0, *accumulate(map(len, paths))],
        [n for path in paths for n in path],
        [0, *accumulate(map(len, seen_by))],
        [user for users in seen_by for user, _ in users],
        [before for users in seen_by for _, before in users],
        sorted(range(len(segments)), key=lambda n: -lengths[n] * sum(lengths[m] for m in paths[n])),
    ]
    return tuple(torch.tensor(array, dtype=torch.int64) for array in arrays)


class _Compiled(torch.autograd.Function):
    """By attention.h."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan, sizes: Sizes, scale: float,
        first_k: Tensor | None, first_v: Tensor | None,
    ) -> Tensor:  # fmt: skip
        first_k, first_v = (None if t is None else t.contiguous() for t in (first_k, first_v))
        wanted = any(ctx.needs_input_grad)
        out, sums = kept(q, len(q), q.shape[1], wanted), kept(q, q.shape[1] // sizes.head, len(q), wanted)
        ctx.about = plan, sizes, scale
        ctx.save_for_backward(q, k, v, cos, sin, first_k, first_v, out, sums)
        _call("attend", ctx.about, 0, q, k, v, cos, sin, first_k, first_v, out, sums)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        q, k, v, cos, sin, first_k, first_v, out, sums = ctx.saved_tensors
        widths = [q.shape[1], k.shape[1], v.shape[1]]
        both = q.new_empty(len(q), sum(widths))
        dq, dk, dv = both.split(widths, dim=1)
        dfirst = [None if t is None else torch.empty_like(t) for t in (first_k, first_v)]
        dout = gradients[0].contiguous()
        given = (q, k, v, cos, sin, first_k, first_v, out, sums, dout, dq, dk, dv, *dfirst)
        _call("attend_backward", ctx.about, both.stride(0), *given)
        return dq, dk, dv, None, None, None, None, None, *dfirst


def _call(
    name: str, about: tuple[AttentionPlan, Sizes, float], d_row: int, q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None
) -> None:
    (plan, sizes, scale), call = about, kernels.compiled(q, k, v)
    assert call is not None, "as in the forward pass"
    segments, window = _cut(plan.segments), plan.window or 0
    arrays = _arrays(segments, plan.virtual)
    rows = (q.stride(0), k.stride(0), v.stride(0), d_row)
    numbers = (len(segments), len(q), *sizes, plan.virtual, window, *rows)
    tree = _Tree(*numbers, scale, *(array.data_ptr() for array in arrays))
    if call(name, tree, q, k, v, *others):
        raise MemoryError(f"no memory for attention over {len(q):,} tokens: lower train.pack_tokens or data.max_length")


class _InTorch(torch.autograd.Function):
    """By PyTorch's flash attention for CPUs, which keeps one number a row and head for the backward pass, not the scores.

    Each segment's tokens go in blocks, and a block's call ends with the block's last key: so nearly half of what causality
    hides is not computed.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan, sizes: Sizes, scale: float,
        first_k: Tensor | None, first_v: Tensor | None,
    ) -> Tensor:  # fmt: skip
        q, k = (_turned(t, sizes.head, cos, sin) for t in (q, k))
        out, sums = torch.empty_like(q), []
        for piece in segment_plans(plan, q.dtype):
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
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros(v.shape, dtype=v.dtype)
        dfirst_k, dfirst_v = (None if t is None else torch.zeros_like(t) for t in (first_k, first_v))
        for piece in segment_plans(ctx.plan, q.dtype):
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
        dq, dk = (_turned(t, sizes.head, cos, -sin) for t in (dq, dk))
        return dq, dk, dv, None, None, None, None, None, dfirst_k, dfirst_v


def _turned(x: Tensor, size: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Each head of x (T heads·K) by its row's angles (cos and sin T K; RoFormer, arXiv:2104.09864)."""
    heads = x.unflatten(1, (-1, size))
    first, second = heads.chunk(2, dim=2)
    return (heads * cos[:, None] + torch.cat([-second, first], dim=2) * sin[:, None]).flatten(1)


def _queries(t: Tensor, start: int, end: int, sizes: Sizes) -> Tensor:
    """G R n K, a view: groups as the batch, so that a group's heads share its keys without a copy."""
    return t[start:end].view(end - start, *sizes).permute(1, 2, 0, 3)


def _in_sight(t: Tensor, piece: SegmentPlan, first: Tensor | None, sizes: Sizes) -> Tensor:
    """G R L K of the keys (or values) in a segment's sight."""
    parts = [t[low:high].view(high - low, sizes.groups, sizes.head).transpose(0, 1) for low, high in piece.path]
    parts = parts if first is None else [first, *parts]
    seen = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return seen[:, None].expand(-1, sizes.each, -1, -1)


def _give_back(gradient: Tensor, to: Tensor, piece: SegmentPlan, first: Tensor | None, sizes: Sizes) -> None:
    """Add the gradient of what was in sight (G L K) to where it came from."""
    at = 0
    if first is not None:
        at = first.shape[1]
        first += gradient[:, :at]
    for low, high in piece.path:
        place = to[low:high].view(high - low, sizes.groups, sizes.head).transpose(0, 1)
        place += gradient[:, at : at + high - low]
        at += high - low
