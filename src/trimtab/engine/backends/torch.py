"""PyTorch's own operations: the reference, for every device and number type; attention by flash attention on CPUs.

Flash attention (Dao 2023, arXiv:2307.08691) keeps one number a query and head for the backward pass, not the scores. A
segment's queries go in blocks, and a block's keys end with its last query, so that nearly half of the hidden scores are not
computed. The keys are those of the virtual tokens, of the segment's ancestors, and its own, side by side.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.data.prefix_tree import Segment, paths_of
from trimtab.engine.backends import Activation, AttentionInputs, AttentionPlan, Heads, Norm, Recurrence

BLOCK = 256
"""Queries in a call, at most."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def supports(*tensors: Tensor | None) -> bool:
    return True


def supports_layers(hidden: Tensor) -> bool:
    return hidden.is_cpu and hidden.dtype in (torch.float32, torch.float64)  # which this attention takes


def rms_norm(x: Tensor, norm: Norm, scratch: bool = False) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(x.square().mean(1) + norm.eps)
    return x * rstd[:, None] * (norm.offset + norm.weight), rstd


def rms_norm_backward(dy: Tensor, x: Tensor, norm: Norm, rstd: Tensor, residual: Tensor | None = None) -> Tensor:
    g, xhat = dy * (norm.offset + norm.weight), x * rstd[:, None]
    dx = rstd[:, None] * (g - xhat * (g * xhat).mean(1, keepdim=True))
    return dx if residual is None else dx + residual


def gate(g: Tensor, u: Tensor, activation: Activation, scratch: bool = False) -> Tensor:
    return _activate(g, activation) * u


def gate_backward_(dh: Tensor, g: Tensor, u: Tensor, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    dg, du = g.new_empty(len(g), 2 * g.shape[1]).chunk(2, dim=1)
    with torch.enable_grad():
        leaf = g.detach().requires_grad_()
        activated = _activate(leaf, activation)
    torch.mul(torch.autograd.grad(activated, leaf, dh * u)[0], 1, out=dg)
    torch.mul(dh, activated.detach(), out=du)
    return dg, du, activated.detach() * u


def _activate(g: Tensor, activation: Activation) -> Tensor:
    return F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh")


def softmax_tile_(logits: Tensor, top: Tensor, total: Tensor) -> Tensor:
    new_top = torch.maximum(top, logits.amax(dim=1))
    rescale = (top - new_top).exp_()
    logits.sub_(new_top[:, None]).exp_()
    total.mul_(rescale).add_(logits.sum(dim=1))
    top.copy_(new_top)
    return rescale


class _Local(NamedTuple):
    """To which of the keys before it a query attends, by their places in the row."""

    window: int | None
    chunk: int | None

    def first_seen(self, place: int) -> int:
        first = 0 if self.window is None else max(0, place - self.window + 1)
        return first if self.chunk is None else max(first, place - place % self.chunk)


class ScoreBlock(NamedTuple):
    """Queries `start:end` of a pack attend to `low:high` of their segment's keys."""

    start: int
    end: int
    low: int
    high: int
    mask: Tensor | None
    """To be added to the scores; None for plain causality."""


class SegmentPlan(NamedTuple):
    """The attention of one segment."""

    path: tuple[tuple[int, int], ...]
    """Where in the pack its keys are, after the virtual ones."""
    blocks: tuple[ScoreBlock, ...]


@lru_cache(maxsize=16)  # every layer asks for the same
def _segment_plans(plan: AttentionPlan, dtype: torch.dtype) -> tuple[SegmentPlan, ...]:
    segments, plans, local = plan.segments, [], _Local(plan.window, plan.chunk)
    for (start, end, _), numbers in zip(segments, paths_of(segments), strict=True):
        path = tuple((segments[n].start, segments[n].end) for n in numbers)
        before = plan.virtual + sum(high - low for low, high in path[:-1])
        size = -(-(end - start) // -(-(end - start) // BLOCK))
        blocks = []
        for at in range(start, end, size):
            stop = min(at + size, end)
            place, high = before + at - start, before + stop - start
            low = local.first_seen(place)
            blocks.append(ScoreBlock(at, stop, low, high, _mask(place, low, high, local, dtype)))
        plans.append(SegmentPlan(path, tuple(blocks)))
    return tuple(plans)


def _mask(place: int, low: int, high: int, local: _Local, dtype: torch.dtype) -> Tensor | None:
    """−∞ at keys of `low:high` to which the queries at places `place` to `high` do not attend; None for plain causality."""
    keys = high - low
    if local.first_seen(high - 1) > low:
        return _local_mask(place, low, high, local, dtype)
    if place == low:
        return None
    return _causal_mask(high - place, 1 << (keys - 1).bit_length(), dtype)[:, -keys:]  # to earlier keys, all of them do


@lru_cache(maxsize=256)
def _causal_mask(queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    """−∞ above the diagonal that ends in the lower right corner."""
    return torch.full((queries, keys), float("-inf"), dtype=dtype).triu_(keys - queries + 1)


@lru_cache(maxsize=256)
def _local_mask(place: int, low: int, high: int, local: _Local, dtype: torch.dtype) -> Tensor:
    q, k = torch.arange(place, high)[:, None], torch.arange(low, high)
    first = torch.tensor([local.first_seen(at) for at in range(place, high)])[:, None]
    return torch.zeros(high - place, high - low, dtype=dtype).masked_fill_((k > q) | (k < first), float("-inf"))


def attend(inputs: AttentionInputs, plan: AttentionPlan, backward: bool) -> tuple[Tensor, Sequence[Tensor | None]]:
    q, k, v, cos, sin, virtual_k, virtual_v, sinks = inputs
    heads = plan.heads
    q, k = (rotated(t, plan, cos, sin) for t in (q, k))
    out, sums = torch.empty_like(q), []
    for segment in _segment_plans(plan, q.dtype):
        keys, values = _gathered(k, segment, virtual_k, heads), _gathered(v, segment, virtual_v, heads)
        for start, end, low, high, mask in segment.blocks:
            part, logsumexp = _flash(
                _queries(q, start, end, heads), keys[..., low:high, :], values[..., low:high, :], 0.0, mask is None,
                attn_mask=mask, scale=plan.scale,
            )  # fmt: skip
            if sinks is not None:
                without, logsumexp = logsumexp, torch.logaddexp(logsumexp, sinks.view(*heads[:2], 1))
                part = part * (without - logsumexp).exp()[..., None]
            _queries(out, start, end, heads).copy_(part)
            sums.append(logsumexp)
    return out, (q, k, v, cos, sin, out, virtual_k, virtual_v, sinks, *sums)


def attend_backward(dout: Tensor, saved: Sequence[Tensor | None], plan: AttentionPlan) -> Sequence[Tensor | None]:
    q, k, v, cos, sin, out, virtual_k, virtual_v, sinks, *sums = cast(Any, saved)
    heads, sum_of = plan.heads, iter(sums)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros(v.shape, dtype=v.dtype)
    dvirtual_k, dvirtual_v, dsinks = (None if t is None else torch.zeros_like(t) for t in (virtual_k, virtual_v, sinks))
    for segment in _segment_plans(plan, q.dtype):
        keys, values = _gathered(k, segment, virtual_k, heads), _gathered(v, segment, virtual_v, heads)
        dkeys, dvalues = (torch.zeros(t.shape[0], t.shape[2], t.shape[3], dtype=t.dtype) for t in (keys, values))
        for start, end, low, high, mask in segment.blocks:
            of_block, logsumexp = [_queries(t, start, end, heads) for t in (dout, q, out)], next(sum_of)
            of_q, of_k, of_v = _flash_backward(
                of_block[0], of_block[1], keys[..., low:high, :], values[..., low:high, :], of_block[2], logsumexp, 0.0,
                mask is None, attn_mask=mask, scale=plan.scale,
            )  # fmt: skip
            _queries(dq, start, end, heads).copy_(of_q)
            dkeys[:, low:high] += of_k.sum(dim=1)
            dvalues[:, low:high] += of_v.sum(dim=1)
            if dsinks is not None:  # the share of a sink, whose value is zero, takes from all others
                share = (sinks.view(*heads[:2], 1) - logsumexp).exp()
                dsinks -= (share * (of_block[0] * of_block[2]).sum(-1)).sum(-1).flatten()
        _scatter_(dkeys, dk, segment, dvirtual_k, heads)
        _scatter_(dvalues, dv, segment, dvirtual_v, heads)
    dq, dk = (rotated(t, plan, cos, -sin) for t in (dq, dk))
    return dq, dk, dv, dvirtual_k, dvirtual_v, dsinks


def rotated(x: Tensor, plan: AttentionPlan, cos: Tensor, sin: Tensor) -> Tensor:
    """Each head of x (T heads·K), its first R numbers rotated by its token's angles (cos and sin T R)."""
    if not cos.shape[1]:
        return x
    per_head = x.unflatten(1, (-1, plan.heads.size))
    turned, rest = per_head[..., : cos.shape[1]], per_head[..., cos.shape[1] :]
    if plan.interleaved:
        across = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=3).flatten(2)
    else:
        first, second = turned.chunk(2, dim=2)
        across = torch.cat([-second, first], dim=2)
    return torch.cat([turned * cos[:, None] + across * sin[:, None], rest], dim=2).flatten(1)


def _queries(t: Tensor, start: int, end: int, heads: Heads) -> Tensor:
    """G R n K, a view: groups as the batch, so that a group's heads share its keys without a copy."""
    return t[start:end].view(end - start, *heads).permute(1, 2, 0, 3)


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


def supports_recurrence(inputs: Recurrence) -> bool:
    """The next two are the reference: Transformers' own functions, which compute in chunks, are faster."""
    return False


def recurrence(inputs: Recurrence, segments: tuple[Segment, ...], backward: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    q, k, v, g, beta = inputs
    q, k = (t.repeat_interleave(v.shape[1] // t.shape[1], dim=1) for t in (q, k))
    outs: list[Tensor] = []
    ends: list[Tensor] = []
    for start, end, parent in segments:
        state = v.new_zeros(v.shape[1], k.shape[2], v.shape[2]) if parent < 0 else ends[parent]
        for t in range(start, end):
            state = state * g[t].exp().view(v.shape[1], -1, 1)
            written = v[t] if beta is None else beta[t, :, None] * (v[t] - (state * k[t, :, :, None]).sum(1))
            state = state + k[t, :, :, None] * written[:, None]
            outs.append((state * q[t, :, :, None]).sum(1))
        ends.append(state)
    return torch.stack(outs), torch.stack(ends), None


def recurrence_backward(
    dout: Tensor, inputs: Recurrence, saved: Tensor | None, segments: tuple[Segment, ...]
) -> Sequence[Tensor | None]:
    with torch.enable_grad():
        leaves = Recurrence(*(None if t is None else t.detach().requires_grad_() for t in inputs))  # type: ignore[arg-type]
        out = recurrence(leaves, segments, True)[0]
    gradients = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], dout))
    return [None if t is None else next(gradients) for t in leaves]
