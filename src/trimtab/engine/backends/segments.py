"""Attention by PyTorch's own operations, a call for each segment: the reference, and the last resort of every device.

A segment's keys are those of the virtual tokens, of its ancestors, and its own, side by side. Its queries go in blocks, and a
block's keys end with its last query, so that nearly half of the hidden scores are not computed.

CPUs use flash attention (Dao 2023, arXiv:2307.08691), which keeps one number a query and head for the
backward pass, not the scores. Elsewhere nothing is kept but queries, keys and values: the backward pass computes each block again.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from trimtab.core import attention
from trimtab.core.attention import Rules, at_least_float32, is_seen
from trimtab.data.prefix_tree import paths_of
from trimtab.engine.backends import AttentionInputs, AttentionPlan, Heads

BLOCK = 256
"""Queries in a call, at most; where a mask is needed, if the scores are not kept."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Local(NamedTuple):
    """To which of the keys before it a query attends, by their places in the row."""

    window: int | None
    chunk: int | None

    def first_seen(self, place: int) -> int:
        first = 0 if self.window is None else max(0, place - self.window + 1)
        return first if self.chunk is None else max(first, place - place % self.chunk)

    @property
    def rules(self) -> Rules:
        return Rules(None, self.window, chunk=self.chunk)


class ScoreBlock(NamedTuple):
    """Queries `start:end` of a pack attend to `low:high` of their segment's keys, where the first of them has the place `place`."""

    start: int
    end: int
    place: int
    low: int
    high: int
    local: _Local | None
    """None if every query attends to all keys from the first up to its own place."""

    @property
    def is_causal(self) -> bool:
        """A triangle: as many queries as keys."""
        return self.local is None and self.place == self.low


class SegmentPlan(NamedTuple):
    """The attention of one segment."""

    path: tuple[tuple[int, int], ...]
    """Where in the pack its keys are, after the virtual ones."""
    blocks: tuple[ScoreBlock, ...]


@lru_cache(maxsize=16)  # every layer asks for the same
def _segment_plans(plan: AttentionPlan, most: int | None) -> tuple[SegmentPlan, ...]:
    """Each segment's; in blocks of at most so many queries, or else those of plain causality whole."""
    segments, plans, local = plan.segments, [], _Local(plan.window, plan.chunk)
    for (start, end, _), numbers in zip(segments, paths_of(segments), strict=True):
        path = tuple((segments[n].start, segments[n].end) for n in numbers)
        before = plan.virtual + sum(high - low for low, high in path[:-1])
        whole = most is None and plan.softcap is None and not before and not local.first_seen(end - start - 1)
        size = -(-(end - start) // (1 if whole else -(-(end - start) // (most or BLOCK))))
        blocks = []
        for at in range(start, end, size):
            stop = min(at + size, end)
            place, high = before + at - start, before + stop - start
            low = local.first_seen(place)
            blocks.append(ScoreBlock(at, stop, place, low, high, local if local.first_seen(high - 1) > low else None))
        plans.append(SegmentPlan(path, tuple(blocks)))
    return tuple(plans)


def attend(inputs: AttentionInputs, plan: AttentionPlan, backward: bool) -> tuple[Tensor, Sequence[Tensor | None]]:
    q, k, v, cos, sin, virtual_k, virtual_v, sinks = inputs
    heads, way = plan.heads, _way(q, plan)
    q, k = (rotated(t, plan, cos, sin) for t in (q, k))
    out, sums = torch.empty_like(q), list[Tensor | None]()
    for segment in _segment_plans(plan, way.most):
        keys, values = _gathered(k, segment, virtual_k, heads), _gathered(v, segment, virtual_v, heads)
        for block in segment.blocks:
            seen = (t[..., block.low : block.high, :] for t in (keys, values))
            part, kept = way.forward(_queries(q, block, heads), *seen, sinks, block, plan)
            _queries(out, block, heads).copy_(part)
            sums.append(kept)
    return out, (q, k, v, virtual_k, virtual_v, sinks, cos, sin, out, *sums)


def attend_backward(dout: Tensor, saved: Sequence[Tensor | None], plan: AttentionPlan) -> Sequence[Tensor | None]:
    *inputs, cos, sin, out = cast(Any, saved[:9])
    q, k, v, virtual_k, virtual_v, sinks = inputs
    heads, way, sums = plan.heads, _way(q, plan), iter(saved[9:])
    exact = torch.promote_types(q.dtype, torch.float32)  # in which the gradients of a key that many segments share are summed
    gradients = [None if t is None else t.new_zeros(t.shape, dtype=exact) for t in inputs]
    dq, dk, dv, dvirtual_k, dvirtual_v, dsinks = cast(Any, gradients)
    for segment in _segment_plans(plan, way.most):
        keys, values = _gathered(k, segment, virtual_k, heads), _gathered(v, segment, virtual_v, heads)
        dkeys, dvalues = (dk.new_zeros(t.shape[0], t.shape[2], t.shape[3]) for t in (keys, values))
        for block in segment.blocks:
            low, high = block.low, block.high
            of_out, out_of, of_q = (_queries(t, block, heads) for t in (dout, out, q))
            seen = (t[..., low:high, :] for t in (keys, values))
            of_q, of_k, of_v, of_sinks = way.backward(of_out, out_of, next(sums), of_q, *seen, sinks, block, plan)
            _queries(dq, block, heads).copy_(of_q)
            dkeys[:, low:high] += of_k.sum(dim=1, dtype=exact)
            dvalues[:, low:high] += of_v.sum(dim=1, dtype=exact)
            if dsinks is not None:
                dsinks += of_sinks
        _scatter_(dkeys, dk, segment, dvirtual_k, heads)
        _scatter_(dvalues, dv, segment, dvirtual_v, heads)
    gradients[:2] = [rotated(t, plan, cos, -sin) for t in (dq, dk)]
    return [None if t is None else t.to(like.dtype) for t, like in zip(gradients, inputs, strict=True)]


class _Way(NamedTuple):
    """How a block is computed. Shapes: queries G R n K, keys G R L K."""

    forward: Callable[..., tuple[Tensor, Tensor | None]]
    """G R n K, and what is kept of them for the backward pass."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]
    """The gradients of queries, of keys and values (of each query head), and of sinks."""
    most: int | None
    """Queries in a block; None: as many as need no mask, else BLOCK."""


def _way(q: Tensor, plan: AttentionPlan) -> _Way:
    return _KEEPING if q.is_cpu and plan.softcap is None else _RECOMPUTING


def _keeping(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, block: ScoreBlock, plan: AttentionPlan
) -> tuple[Tensor, Tensor | None]:
    mask = _mask(block, q.dtype)
    out, logsumexp = _flash(q, k, v, 0.0, mask is None, attn_mask=mask, scale=plan.scale)
    if sinks is not None:
        without, logsumexp = logsumexp, torch.logaddexp(logsumexp, sinks.view(*q.shape[:2], 1))
        out = out * (without - logsumexp).exp()[..., None]
    return out, logsumexp


def _keeping_backward(
    dout: Tensor, out: Tensor, logsumexp: Tensor,
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, block: ScoreBlock, plan: AttentionPlan,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    mask = _mask(block, q.dtype)
    gradients = _flash_backward(dout, q, k, v, out, logsumexp, 0.0, mask is None, attn_mask=mask, scale=plan.scale)
    if sinks is None:
        return *gradients, None
    share = (sinks.view(*q.shape[:2], 1) - logsumexp).exp()  # of a sink, whose value is zero: it takes from all others
    return *gradients, -(share * (at_least_float32(dout) * out).sum(-1)).sum(-1).flatten()


def _mask(block: ScoreBlock, dtype: torch.dtype) -> Tensor | None:
    """To be added to the scores; None for plain causality."""
    if block.is_causal:
        return None
    if block.local is not None:
        return _local_mask(block.place, block.low, block.high, block.local, dtype)
    keys = block.high - block.low
    return _causal_mask(block.end - block.start, 1 << (keys - 1).bit_length(), dtype)[:, -keys:]  # they see all earlier ones


@lru_cache(maxsize=256)
def _causal_mask(queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    """−∞ above the diagonal that ends in the lower right corner."""
    return torch.full((queries, keys), float("-inf"), dtype=dtype).triu_(keys - queries + 1)


@lru_cache(maxsize=256)
def _local_mask(place: int, low: int, high: int, local: _Local, dtype: torch.dtype) -> Tensor:
    q, k = torch.arange(place, high)[:, None], torch.arange(low, high)
    return torch.zeros(high - place, high - low, dtype=dtype).masked_fill_(~is_seen(q, k, local.rules), float("-inf"))


def _recomputing(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, block: ScoreBlock, plan: AttentionPlan
) -> tuple[Tensor, Tensor | None]:
    mask, rules = None, (block.local or _Local(None, None)).rules._replace(scale=plan.scale, softcap=plan.softcap, sinks=sinks)
    if not block.is_causal:
        place, low = (torch.arange(first, block.high, device=q.device) for first in (block.place, block.low))
        mask = is_seen(place[:, None], low, rules)
    # one batch of H heads, each with its own keys: kernels that take masks or float32 do not take groups
    queries, keys, values = (t.flatten(0, 1)[None] for t in (q, k, v))
    out = attention.attend(queries, keys, values, mask, rules)
    return out[0].view(q.shape), None


def _recomputing_backward(
    dout: Tensor, out: Tensor, kept: None,
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, block: ScoreBlock, plan: AttentionPlan,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    leaves: Any = [None if t is None else t.detach().requires_grad_() for t in (q, k, v, sinks)]
    with torch.enable_grad():
        again, _ = _recomputing(*leaves, block, plan)  # type: ignore[call-arg]
    gradients = iter(torch.autograd.grad(again, [t for t in leaves if t is not None], dout))
    return cast(Any, tuple(None if t is None else next(gradients) for t in leaves))


_KEEPING = _Way(_keeping, _keeping_backward, BLOCK)
_RECOMPUTING = _Way(_recomputing, _recomputing_backward, None)


def rotated(x: Tensor, plan: AttentionPlan, cos: Tensor, sin: Tensor) -> Tensor:
    """Each head of x (T heads·K), its first R numbers rotated by its token's angles (cos and sin T R), and rounded once."""
    if not cos.shape[1]:
        return x
    cos, sin, per_head = at_least_float32(cos), at_least_float32(sin), at_least_float32(x).unflatten(1, (-1, plan.heads.size))
    turned, rest = per_head[..., : cos.shape[1]], per_head[..., cos.shape[1] :]
    if plan.interleaved:
        across = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=3).flatten(2)
    else:
        first, second = turned.chunk(2, dim=2)
        across = torch.cat([-second, first], dim=2)
    return torch.cat([turned * cos[:, None] + across * sin[:, None], rest], dim=2).flatten(1).to(x.dtype)


def _queries(t: Tensor, block: ScoreBlock, heads: Heads) -> Tensor:
    """G R n K, a view: groups as the batch, so that a group's heads share its keys without a copy."""
    return t[block.start : block.end].view(-1, *heads).permute(1, 2, 0, 3)


def _gathered(t: Tensor, segment: SegmentPlan, virtual: Tensor | None, heads: Heads) -> Tensor:
    """A segment's L keys (or values), for all query heads: G R L K."""
    parts = [t[low:high].view(high - low, heads.groups, heads.size).transpose(0, 1) for low, high in segment.path]
    parts = parts if virtual is None else [virtual, *parts]
    joint = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return joint[:, None].expand(-1, heads.per_group, -1, -1)


def _scatter_(gradient: Tensor, to: Tensor, segment: SegmentPlan, virtual: Tensor | None, heads: Heads) -> None:
    """Add the gradient of a segment's keys (G L K) to that of the tokens and virtual tokens."""
    at = 0
    if virtual is not None:
        at = virtual.shape[1]
        virtual += gradient[:, :at]
    for low, high in segment.path:
        place = to[low:high].view(high - low, heads.groups, heads.size).transpose(0, 1)
        place += gradient[:, at : at + high - low]
        at += high - low
