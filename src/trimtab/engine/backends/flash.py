"""Attention over a tree by one call of flash attention a layer, with the keys gathered along each segment's path (see `paths`).

Two of PyTorch's kernels take sequences of various lengths, with masks that end in the lower right corner. For the backward pass,
both keep one number a query and head; queries, keys and values are kept as they were before they were gathered.

Shapes: T tokens, P virtual tokens, L gathered keys of a call; H = G · R query heads in G groups, K head size.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from trimtab.core.attention import at_least_float32
from trimtab.engine.backends import AttentionInputs, AttentionPlan
from trimtab.engine.backends.passes import rotate, summed_by_users
from trimtab.engine.backends.paths import Call, calls_of

_aten = torch.ops.aten


class Kernel(NamedTuple):
    """Attention of the sequences of a call. Shapes: queries T H K, keys and values L G K."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Call, AttentionPlan], Sequence[Tensor]]
    """T H K; the scores' log-sum-exp, H T where sinks are taken; and what else the backward pass needs."""
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Sequence[Tensor], Call, AttentionPlan], Sequence[Tensor]]
    """The gradients of queries, keys and values, from that of what came out, these, and all that `forward` gave."""


def attend(
    kernel: Kernel, inputs: AttentionInputs, plan: AttentionPlan, backward: bool
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """As a back end's function, by this kernel."""
    q, k, v, cos, sin, virtual_k, virtual_v, sinks = inputs
    if cos.shape[1]:
        q, k = (rotate(t, cos, sin, plan.heads.size, plan.interleaved) for t in (q, k))
        v = _alone(v) if backward else v
    queries, outs, kept = q.unflatten(1, (-1, plan.heads.size)), list[Tensor](), list[Tensor]()
    keys, values = _rows(k, virtual_k, plan), _rows(v, virtual_v, plan)
    for call in calls_of(plan, q.device):
        own, seen = queries[call.start : call.end], [_gathered(t, call) for t in (keys, values)]
        out, logsumexp, *rest = kernel.forward(own, seen[0], seen[1], call, plan)
        if sinks is not None:  # they take their share of what the other keys have
            without, logsumexp = logsumexp, torch.logaddexp(logsumexp, at_least_float32(sinks)[:, None])
            out = (out * (without - logsumexp).exp().T[:, :, None]).to(q.dtype)
        outs.append(out)
        kept += [logsumexp, *rest]
    out = (outs[0] if len(outs) == 1 else torch.cat(outs)).flatten(1)
    return out, (q, k, v, virtual_k, virtual_v, sinks, cos, sin, out, *kept)


def attend_backward(
    kernel: Kernel, dout: Tensor, saved: Sequence[Tensor | None], plan: AttentionPlan
) -> Sequence[Tensor | None]:
    """As a back end's function, by this kernel."""
    q, k, v, virtual_k, virtual_v, sinks, cos, sin, joint, *kept = cast(Any, saved)
    q, joint, dout = (t.unflatten(1, (-1, plan.heads.size)) for t in (q, joint, dout.contiguous()))
    keys, values, calls = _rows(k, virtual_k, plan), _rows(v, virtual_v, plan), calls_of(plan, q.device)
    each, dqs, sums, dsinks = len(kept) // len(calls), list[Tensor](), list[list[Tensor]](), list[Tensor]()
    for number, call in enumerate(calls):
        own, seen = slice(call.start, call.end), [_gathered(t, call) for t in (keys, values)]
        logsumexp, *rest = kept[number * each : (number + 1) * each]
        dq, *gradients = kernel.backward(dout[own], q[own], seen[0], seen[1], (joint[own], logsumexp, *rest), call, plan)
        dqs.append(dq)
        sums.append([_summed(t.flatten(1), call) for t in gradients])
        if sinks is not None:  # the share of a sink, whose value is zero, takes from all others
            taken = (at_least_float32(dout[own]) * joint[own]).sum(2)
            dsinks.append(-((at_least_float32(sinks) - logsumexp.T).exp() * taken).sum(0))
    dk, dv = (parts[0] if len(parts) == 1 else _total(parts) for parts in zip(*sums, strict=True))
    dq = (dqs[0] if len(dqs) == 1 else torch.cat(dqs)).flatten(1)
    of_tokens = dq, dk[plan.virtual :], dv[plan.virtual :]
    beside = dq.new_empty(len(dq), sum(t.shape[1] for t in of_tokens)).split([t.shape[1] for t in of_tokens], dim=1)
    for gradient, out in zip(of_tokens[:2], beside, strict=False):
        rotate(gradient, cos, sin, plan.heads.size, plan.interleaved, -1.0, out)
    beside[2].copy_(of_tokens[2])
    virtual = [t[: plan.virtual].unflatten(1, (plan.heads.groups, -1)).transpose(0, 1) for t in (dk, dv)]
    dvirtual = virtual if plan.virtual else [None, None]
    return *beside, *dvirtual, torch.stack(dsinks).sum(0).to(sinks.dtype) if dsinks else None


def _alone(t: Tensor) -> Tensor:
    """Not in memory that holds other tensors, too: what is saved for the backward pass keeps all of it (here q and k as they were)."""
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone(memory_format=torch.contiguous_format)


def _rows(t: Tensor, virtual: Tensor | None, plan: AttentionPlan) -> Tensor:
    """Of the virtual tokens and the pack's: P + T G K."""
    rows = t.unflatten(1, (plan.heads.groups, -1))
    return rows if virtual is None else torch.cat([virtual.transpose(0, 1), rows])


def _gathered(rows: Tensor, call: Call) -> Tensor:
    return rows if call.rows is None else rows.index_select(0, call.rows)


def _summed(gradient: Tensor, call: Call) -> Tensor:
    """The gradients of the rows (P + T n) from those of a call's gathered keys (L n)."""
    if call.starts is None or call.users is None:
        return gradient
    return summed_by_users(gradient, call.starts, call.users)


def _total(parts: Sequence[Tensor]) -> Tensor:
    total = at_least_float32(parts[0])
    for part in parts[1:]:
        total = total + part
    return total.to(parts[0].dtype)


def _flash(q: Tensor, k: Tensor, v: Tensor, call: Call, plan: AttentionPlan) -> Sequence[Tensor]:
    lengths, (causal, options) = (call.cu_q, call.cu_k, call.max_q, call.max_k), _flash_mask(plan)
    out, logsumexp, *state, _ = _aten._flash_attention_forward(q, k, v, *lengths, 0.0, causal, False, **options)
    return out, logsumexp, *state


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Sequence[Tensor], call: Call, plan: AttentionPlan
) -> Sequence[Tensor]:
    lengths, (causal, options) = (call.cu_q, call.cu_k, call.max_q, call.max_k), _flash_mask(plan)
    out, logsumexp, *state = kept
    gradients = _aten._flash_attention_backward(dout, q, k, v, out, logsumexp, *lengths, 0.0, causal, *state, **options)
    return cast(Sequence[Tensor], gradients)


def _flash_mask(plan: AttentionPlan) -> tuple[bool, dict[str, Any]]:
    """Whether it is plain causality, and how many keys before a query's own place it attends to."""
    left = -1 if plan.window is None else plan.window - 1
    return plan.window is None, {"scale": plan.scale, "window_size_left": left, "window_size_right": 0}


@cache
def gives_sums_by_token() -> bool:
    """Whether the log-sum-exp is H T, as sinks need it: before PyTorch 2.7 it was S H, padded to the longest sequence."""
    q, ends = torch.empty(3, 2, 8, dtype=torch.float16, device="meta"), torch.empty(3, dtype=torch.int32, device="meta")
    logsumexp = _aten._flash_attention_forward(q, q, q, ends, ends, 2, 2, 0.0, True, False)[1]
    return bool(logsumexp.shape == (2, 3))


_LOWER_RIGHT = 2
"""The mask, in memory-efficient attention."""


def _efficient(q: Tensor, k: Tensor, v: Tensor, call: Call, plan: AttentionPlan) -> Sequence[Tensor]:
    k, v = (t.repeat_interleave(plan.heads.per_group, dim=1) for t in (k, v))
    lengths = call.cu_q, call.cu_k, call.max_q, call.max_k
    out, logsumexp, *state, _, _ = _aten._efficient_attention_forward(
        q[None], k[None], v[None], None, *lengths, 0.0, _LOWER_RIGHT, True, scale=plan.scale, window_size=plan.window
    )
    return out[0], logsumexp, *state


def _efficient_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Sequence[Tensor], call: Call, plan: AttentionPlan
) -> Sequence[Tensor]:
    k, v = (t.repeat_interleave(plan.heads.per_group, dim=1) for t in (k, v))
    out, logsumexp, *state = kept
    lengths = call.cu_q, call.cu_k, call.max_q, call.max_k
    dq, *others, _ = _aten._efficient_attention_backward(
        dout[None], q[None], k[None], v[None], None, out[None], *lengths, logsumexp, 0.0, *state, _LOWER_RIGHT, False,
        scale=plan.scale, window_size=plan.window,
    )  # fmt: skip
    return dq[0], *(t[0].unflatten(1, plan.heads[:2]).sum(2) for t in others)


FLASH = Kernel("flash attention", _flash, _flash_backward)
"""FlashAttention-2 (arXiv:2307.08691), as PyTorch has it; or a later one, where it is installed. In bfloat16 and float16."""
EFFICIENT = Kernel("memory-efficient attention", _efficient, _efficient_backward)
"""Memory-efficient attention (arXiv:2112.05682), as PyTorch has it: in float32, too, and on older cards. It takes no sinks."""
