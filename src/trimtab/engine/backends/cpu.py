"""CPUs: the C code in `c/`, in float32 and float64. Results do not depend on the number of threads."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from trimtab.data.prefix_tree import Segment, paths_of, split_long
from trimtab.engine.arena import activation_like, scratch_like
from trimtab.engine.backends import Activation, AttentionInputs, AttentionPlan, Norm, Recurrence
from trimtab.engine.backends._compile import load_library

_PREFIXES = {torch.float32: "f32", torch.float64: "f64"}
_ACTIVATIONS = ("silu", "gelu_tanh")
LONGEST = 512
"""Tokens of a segment, which is one task for each head or group of heads: longer ones few threads would share unevenly."""


def supports(*tensors: Tensor | None) -> bool:
    dtype = tensors[0].dtype if tensors[0] is not None else None
    for t in tensors:  # `all` takes twice the time
        if t is not None and not (t.is_cpu and t.dtype == dtype and t.stride(-1) == 1):
            return False
    return dtype in _PREFIXES and load_library() is not None


def supports_layers(hidden: Tensor) -> bool:
    return supports(hidden)


def supports_softcap(hidden: Tensor) -> bool:
    return False


def rms_norm(x: Tensor, norm: Norm, scratch: bool = False) -> tuple[Tensor, Tensor]:
    y, rstd = scratch_like(x) if scratch else x.new_empty(x.shape), activation_like(x, 1, len(x))[0]
    _call("norm", x.dtype, x, norm.weight, y, rstd, *x.shape, x.stride(0), y.stride(0), float(norm.offset), float(norm.eps))
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, norm: Norm, rstd: Tensor, residual: Tensor | None = None) -> Tensor:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    strides = (dy.stride(0), x.stride(0), dx.stride(0), 0 if residual is None else residual.stride(0))
    _call("norm_backward", x.dtype, dy, x, norm.weight, rstd, residual, dx, *x.shape, *strides, float(norm.offset))
    return dx


def gate(g: Tensor, u: Tensor, activation: Activation, scratch: bool = False) -> Tensor:
    h = scratch_like(g) if scratch else g.new_empty(g.shape)
    _call("gate", g.dtype, g, u, h, *g.shape, g.stride(0), u.stride(0), _ACTIVATIONS.index(activation))
    return h


def gate_backward_(dh: Tensor, g: Tensor, u: Tensor, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    both = g.new_empty(len(g), 2 * g.shape[1])
    dg, du = both.chunk(2, dim=1)
    strides = (g.stride(0), u.stride(0), both.stride(0), dh.stride(0))
    _call("gate_backward", g.dtype, dh, g, u, dg, du, *g.shape, *strides, _ACTIVATIONS.index(activation))
    return dg, du, dh


def splits_rows(hidden: Tensor) -> bool:
    return False


def softmax_tile_(logits: Tensor, top: Tensor, total: Tensor) -> Tensor:
    rescale = torch.empty_like(top)
    _call("softmax_tile", logits.dtype, logits, top, total, rescale, *logits.shape)
    return rescale


def attend(inputs: AttentionInputs, plan: AttentionPlan, backward: bool) -> tuple[Tensor, Sequence[Tensor | None]]:
    (q, *others), rest = inputs[:5], [None if t is None else t.contiguous() for t in inputs[5:]]
    out = activation_like(q, len(q), q.shape[1], backward)
    logsumexp = activation_like(q, q.shape[1] // plan.heads.size, len(q), backward)
    _attention("attend", plan, 0, q, *others, *rest, out, logsumexp)
    return out, (q, *others, *rest[:2], out, logsumexp, inputs.sinks)


def attend_backward(dout: Tensor, saved: Sequence[Tensor | None], plan: AttentionPlan) -> Sequence[Tensor | None]:
    *saved, sinks = saved
    q, k, v, _, _, virtual_k, virtual_v, out, logsumexp = cast(Any, saved)
    widths = [q.shape[1], k.shape[1], v.shape[1]]
    joint = q.new_empty(len(q), sum(widths))
    gradients = (*joint.split(widths, dim=1), *(None if t is None else torch.empty_like(t) for t in (virtual_k, virtual_v)))
    _attention("attend_backward", plan, joint.stride(0), *saved, dout.contiguous(), *gradients)
    if sinks is None or not sinks.requires_grad:
        return *gradients, None
    by_head = (dout * out).unflatten(1, (-1, plan.heads.size)).sum(2).T
    return *gradients, -((sinks[:, None] - logsumexp).exp() * by_head).sum(1)


BLOCK = 32
"""RECURRENCE_BLOCK of recurrence.h."""


def supports_recurrence(inputs: Recurrence) -> bool:
    lanes = 32 // inputs.v.element_size()  # an eighth of what a state's row may have at most
    return supports(*inputs) and inputs.v.shape[2] % (2 * lanes) == 0 and inputs.v.shape[2] <= 512


def recurrence(inputs: Recurrence, segments: tuple[Segment, ...], backward: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    v, size = inputs.v, (inputs.v.shape[1], inputs.k.shape[2], inputs.v.shape[2])
    out, ends = torch.empty_like(v), v.new_empty(len(segments), *size)
    starts = v.new_empty(sum(_blocks(segments)), *size) if backward else None
    _recurrence("recurrence", inputs, segments, out, ends, starts)
    return out, ends, starts


def recurrence_backward(
    dout: Tensor, inputs: Recurrence, saved: Tensor | None, segments: tuple[Segment, ...]
) -> Sequence[Tensor | None]:
    q, k, v, g, beta = inputs
    heads, keys = v.shape[1], k.shape[2]
    dq, dk = (v.new_empty(len(v), heads, keys) for _ in range(2))
    dv, dg, dbeta = torch.empty_like(v), torch.empty_like(g), None if beta is None else torch.empty_like(beta)
    dends = v.new_zeros(len(segments), heads, keys, v.shape[2])
    _recurrence("recurrence_backward", inputs, segments, saved, dout.contiguous(), dends, dq, dk, dv, dg, dbeta)
    dq, dk = (t.unflatten(1, (q.shape[1], -1)).sum(2) for t in (dq, dk))
    return dq, dk, dv, dg, dbeta


def _blocks(segments: tuple[Segment, ...]) -> list[int]:
    return [-(-(end - start) // BLOCK) for start, end, _ in segments]


class _Recurrence(ctypes.Structure):
    """`Recurrence` of recurrence.h."""

    _fields_: ClassVar = [
        *((name, ctypes.c_int64) for name in ("segments", "heads", "per_group", "key", "value", "decays")),
        *((name, ctypes.c_void_p) for name in ("start", "end", "parent", "first_block")),
    ]


def _recurrence(name: str, inputs: Recurrence, segments: tuple[Segment, ...], *tensors: Tensor | None) -> None:
    (_, groups, keys), (_, heads, values) = inputs.k.shape, inputs.v.shape
    columns = [*zip(*segments, strict=True), [0, *accumulate(_blocks(segments))][:-1]]
    arrays = [torch.tensor(column, dtype=torch.int64) for column in columns]
    decays = inputs.g.shape[2] if inputs.g.ndim == 3 else 1
    sizes = (len(segments), heads, heads // groups, keys, values, decays)
    structure = _Recurrence(*sizes, *(array.data_ptr() for array in arrays))
    if _call(name, inputs.v.dtype, structure, *inputs, *tensors):
        raise MemoryError("no memory for the states of a recurrence: lower train.pack_tokens")


class _Tree(ctypes.Structure):
    """`Tree` of attention.h."""

    _fields_: ClassVar = [
        *((name, ctypes.c_int64) for name in ("segments", "tokens", "groups", "per_group", "head", "virtual_tokens")),
        *((name, ctypes.c_int64) for name in ("window", "chunk", "rotary", "interleaved", "q_row", "k_row", "v_row", "d_row")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("start", "end", "path", "on_path", "users", "user", "before", "order")),
    ]


@lru_cache(maxsize=16)  # every layer asks for the same
def _arrays(segments: tuple[Segment, ...], virtual: int) -> tuple[Tensor, ...]:
    """The arrays of attention.h's `Tree`."""
    segments = split_long(segments, LONGEST)
    lengths = [end - start for start, end, _ in segments]
    paths = paths_of(segments)
    seen_by: list[list[tuple[int, int]]] = [[] for _ in segments]
    for number, path in enumerate(paths):
        for place, ancestor in enumerate(path):
            seen_by[ancestor].append((number, virtual + sum(lengths[n] for n in path[:place])))
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


def _attention(name: str, plan: AttentionPlan, d_row: int, *tensors: Tensor | None) -> None:
    arrays = _arrays(plan.segments, plan.virtual)
    q, k, v, cos = cast(Any, tensors[:4])
    sizes = (len(arrays[0]), len(q), *plan.heads, plan.virtual, plan.window or 0, plan.chunk or 0)
    columns = (cos.shape[1], int(plan.interleaved), q.stride(0), k.stride(0), v.stride(0), d_row)
    tree = _Tree(*sizes, *columns, plan.scale, *(array.data_ptr() for array in arrays))
    if _call(name, q.dtype, tree, *tensors):
        raise MemoryError(f"no memory for attention over {len(q):,} tokens: lower train.pack_tokens or data.max_length")


def _call(name: str, dtype: torch.dtype, *arguments: Any) -> int:
    """What a C function returns; nothing to be read, unless its comment says so."""
    return int(getattr(load_library(), f"{_PREFIXES[dtype]}_{name}")(*map(_argument, arguments)))


def _argument(value: Any) -> Any:
    """Tensors and structures go by their address."""
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p(None if value is None else value.data_ptr())
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)
