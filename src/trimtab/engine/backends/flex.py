"""Attention over a tree by FlexAttention (arXiv:2412.05496), compiled: for soft-capped scores, which flash attention has not.

Where a pack's segments stand depth first, a token's descendants are the tokens after it up to some place, so that four numbers say
who sees whom, and pairs of blocks that see nothing of each other are left out. Windows, chunks and virtual tokens are in these
numbers, so that all kinds of layers have one compiled kernel; it is compiled again for each size to which packs are padded.

Shapes: T tokens padded to N, P virtual tokens; P + N keys padded to M; H query heads in G groups, K head size.
"""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trimtab.core.transfer import to_device
from trimtab.engine.backends import AttentionInputs, AttentionPlan
from trimtab.engine.backends.passes import rotate

BLOCK = 128
SIZES = tuple(1024 * 2**n for n in range(6))
"""To which tokens are padded, in attention only: PyTorch compiles one function for at most eight."""


_Array = NDArray[Any]


class Sight(NamedTuple):
    """Query i sees key j if `first[i] <= place[j]`, `j <= last[i]` and `i < reach[j]`. Padding sees itself, and nobody sees it."""

    last: _Array
    """N: the key of the query's own token."""
    first: _Array
    """N: the lowest place in the row that its window and chunk have."""
    reach: _Array
    """M: the end of the tokens that descend from the key's."""
    place: _Array
    """M: in its row, virtual tokens included."""


@lru_cache(maxsize=32)
def takes(plan: AttentionPlan) -> bool:
    """Whether segments stand depth first, in a pack that has a size."""
    depth_first, path = True, [-1]
    for number, (_, _, parent) in enumerate(plan.segments):
        depth_first &= parent in path
        path = [*path[: path.index(parent) + 1], number] if depth_first else path
    return depth_first and all(end <= SIZES[-1] for _, end, _ in plan.segments)


def attend(inputs: AttentionInputs, plan: AttentionPlan, backward: bool) -> tuple[Tensor, Sequence[Tensor | None]]:
    """As a back end's function, for plans that are taken, without sinks. The backward pass computes it again."""
    q, k, v, cos, sin, virtual_k, virtual_v, sinks = inputs
    if cos.shape[1]:
        q, k = (rotate(t, cos, sin, plan.heads.size, plan.interleaved) for t in (q, k))
    _, out = _attended((q, k, v, virtual_k, virtual_v), plan)
    return out.detach(), (q, k, v, virtual_k, virtual_v, sinks, cos, sin)


def attend_backward(dout: Tensor, saved: Sequence[Tensor | None], plan: AttentionPlan) -> Sequence[Tensor | None]:
    """As a back end's function."""
    leaves, out = _attended(saved[:5], plan)
    cos, sin = cast(Any, saved[6:8])
    gradients = list(torch.autograd.grad(out, [t for t in leaves if t is not None], dout))
    for gradient in gradients[:2] if cos.shape[1] else ():
        rotate(gradient, cos, sin, plan.heads.size, plan.interleaved, -1.0, gradient)
    return [*gradients, *[None] * (6 - len(gradients))]


def _attended(tensors: Sequence[Tensor | None], plan: AttentionPlan) -> tuple[list[Tensor | None], Tensor]:
    """q, k, v and virtual keys and values as leaves of a graph, and T H·K; the graph in the forward pass, too: one kernel for both."""
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        q, k, v, virtual_k, virtual_v = cast(Any, leaves)
        keys, values = (
            t.unflatten(1, (plan.heads.groups, -1))
            if first is None
            else torch.cat([first.transpose(0, 1), t.unflatten(1, (plan.heads.groups, -1))])
            for t, first in ((k, virtual_k), (v, virtual_v))
        )
        mask, lengths = _block_mask(plan, q.device)
        queries = _padded(q.unflatten(1, (-1, plan.heads.size)), lengths[0])
        keys, values = (_padded(t, lengths[1]) for t in (keys, values))
        grouped = plan.heads.per_group > 1
        out = _flex_attention()(queries, keys, values, _cap(plan.softcap), mask, plan.scale, grouped)
        return leaves, out[0, :, : len(q)].transpose(0, 1).flatten(1)


def _padded(t: Tensor, rows: int) -> Tensor:
    """1 heads rows K."""
    return F.pad(t, (0, 0, 0, 0, 0, rows - len(t))).transpose(0, 1)[None]


@cache
def _flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)  # with symbolic sizes: NaN (pytorch #186775)


@cache
def _cap(softcap: float | None) -> Callable[..., Tensor] | None:
    return None if softcap is None else lambda score, b, h, q, k: softcap * torch.tanh(score / softcap)


def sight_of(plan: AttentionPlan) -> Sight:
    """On the host."""
    tokens, keys = plan.segments[-1].end, plan.virtual + plan.segments[-1].end
    N = next(size for size in SIZES if tokens <= size)
    M = N + max(BLOCK, -(-plan.virtual // BLOCK) * BLOCK)  # the same with few virtual tokens as without
    reach, place = np.zeros(M, np.int32), np.zeros(M, np.int32)
    reach[: plan.virtual], place[: plan.virtual] = N, np.arange(plan.virtual)
    reach[keys : plan.virtual + N] = np.arange(tokens, N) + 1
    ends = [end for _, end, _ in plan.segments]
    befores = list[int]()
    for start, end, parent in plan.segments:
        befores.append(
            plan.virtual if parent < 0 else befores[parent] + plan.segments[parent].end - plan.segments[parent].start
        )
        place[plan.virtual + start : plan.virtual + end] = befores[-1] + np.arange(end - start)
    for number in reversed(range(len(ends))):
        start, end, parent = plan.segments[number]
        reach[plan.virtual + start : plan.virtual + end] = ends[number]
        if parent >= 0:
            ends[parent] = max(ends[parent], ends[number])
    own = place[plan.virtual : plan.virtual + N]
    first = np.zeros(N, np.int32) if plan.window is None else np.maximum(own - plan.window + 1, 0)
    first = first if plan.chunk is None else np.maximum(first, own - own % plan.chunk)
    first[tokens:] = 0
    return Sight(plan.virtual + np.arange(N, dtype=np.int32), first.astype(np.int32), reach, place)


def blocks_of(sight: Sight) -> tuple[Any, Any]:
    """Which blocks of queries see something, or perhaps nothing, of which blocks of keys; and which see all: N/128 M/128 each."""
    last, first, reach, place = (array.reshape(-1, BLOCK) for array in sight)
    low_q, low_k = (np.arange(len(array))[:, None] * BLOCK for array in (last, reach))
    some = (last.max(1)[:, None] >= low_k.T) & (reach.max(1) > low_q) & (place.max(1) >= first.min(1)[:, None])
    whole = (
        (last.min(1)[:, None] >= low_k.T + BLOCK - 1)
        & (reach.min(1) >= low_q + BLOCK)
        & (place.min(1) >= first.max(1)[:, None])
    )
    return some, whole


@lru_cache(maxsize=16)  # every layer of a kind asks for the same
def _block_mask(plan: AttentionPlan, device: torch.device) -> tuple[Any, tuple[int, int]]:
    """As FlexAttention takes it, and N and M."""
    from torch.nn.attention.flex_attention import BlockMask

    sight = sight_of(plan)
    some, whole = blocks_of(sight)
    arrays = [*sight]
    for blocks in (some & ~whole, whole):
        arrays += [blocks.sum(1), np.argsort(~blocks, axis=1, kind="stable")]
    joint = to_device(torch.from_numpy(np.concatenate([array.ravel() for array in arrays]).astype(np.int32)), device)
    parts = [part.view(array.shape) for part, array in zip(joint.split([array.size for array in arrays]), arrays, strict=True)]
    last, first, reach, place, *lists = parts

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= last[q]) & (q < reach[k]) & (place[k] >= first[q])

    counts, indices, whole_counts, whole_indices = (t[None, None] for t in lists)
    mask = BlockMask.from_kv_blocks(counts, indices, whole_counts, whole_indices, BLOCK_SIZE=BLOCK, mask_mod=sees)
    return mask, (len(last), len(reach))
