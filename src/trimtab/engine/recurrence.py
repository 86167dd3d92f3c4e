"""The gated linear recurrence of DeltaNet, KDA and Mamba 2 over a tree of segments, as one differentiable operation.

Transformers' functions for these compute in chunks, padded, with many operations; a back end that computes token by token, with the
state in its cache, takes their place. Which function is which recurrence, the names of its parameters say; that they compute the
same is tried on random numbers at first use, and where they don't, Transformers' function runs.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.data.prefix_tree import Segment
from trimtab.engine.backends import Backend, Recurrence, backend_for

Segments = tuple[Segment, ...]


class _GatedRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, segments: Segments, backend: Backend, *tensors: Any) -> Any:
        ctx.segments, ctx.backend = segments, backend
        out, ends, saved = backend.recurrence(Recurrence(*tensors), segments, any(ctx.needs_input_grad))
        ctx.save_for_backward(*tensors, saved)
        ctx.mark_non_differentiable(ends)
        return out, ends

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        *tensors, saved = ctx.saved_tensors
        return None, None, *ctx.backend.recurrence_backward(gradients[0], Recurrence(*tensors), saved, ctx.segments)


def branching_scan(function: Callable[..., Any], arguments: dict[str, Any], segments: Segments) -> tuple[Tensor, Tensor] | None:
    """What a scan of Transformers gives for a pack, 1 T …, and the state in which each segment ends; None if no back end has it.

    Args:
        arguments: By the names of the function's parameters; its sequences are 1 T ….
    """
    if (kind := _kind(function)) is None:
        return None
    inputs, finish = kind(arguments)
    backend = backend_for(inputs.q, *inputs[1:])
    if not backend.supports_recurrence(inputs) or not _is_right(function, kind, inputs.g.ndim == 3):
        return None
    out, ends = _GatedRecurrence.apply(segments, backend, *inputs)
    return finish(out, ends)


Finish = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Kind = Callable[[dict[str, Any]], tuple[Recurrence, Finish]]


@cache
def _kind(function: Callable[..., Any]) -> Kind | None:
    names = inspect.signature(function).parameters.keys()
    if names >= {"query", "key", "value", "g", "beta", "use_qk_l2norm_in_kernel"}:
        return _delta_rule
    return _mamba2 if names >= {"hidden_states", "dt", "A", "B", "C", "D", "dt_bias", "dt_limit"} else None


def _delta_rule(arguments: dict[str, Any]) -> tuple[Recurrence, Finish]:
    """Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464), or KDA (arXiv:2510.26692), whose decay differs by channel."""
    q, k, v, g, beta = (arguments[name][0].float() for name in ("query", "key", "value", "g", "beta"))
    if arguments.get("use_qk_l2norm_in_kernel"):
        q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    inputs = Recurrence(*((t if t.is_contiguous() else t.contiguous()) for t in (q * q.shape[-1] ** -0.5, k, v, g, beta)))
    dtype = arguments["query"].dtype
    return inputs, lambda out, ends: (out.to(dtype)[None], ends)


def _mamba2(arguments: dict[str, Any]) -> tuple[Recurrence, Finish]:
    """Mamba 2 (Dao and Gu 2024, arXiv:2405.21060): states of heads x N P, here with keys B, queries C and values dt · x."""
    x, dt, B, C = (arguments[name][0] for name in ("hidden_states", "dt", "B", "C"))
    if (bias := arguments.get("dt_bias")) is not None:
        dt = dt + bias.to(dt.dtype)
    dt = F.softplus(dt) if arguments.get("dt_softplus") else dt
    low, high = arguments.get("dt_limit") or (0.0, float("inf"))
    dt, x = dt.clamp(low, high).float(), x.float()
    C, B, values, decay = (t.contiguous() for t in (C.float(), B.float(), x * dt[..., None], arguments["A"].float() * dt))
    D = arguments.get("D")
    inputs = Recurrence(C, B, values, decay, None)
    return inputs, lambda out, ends: ((out if D is None else out + D[..., None] * x)[None], ends.transpose(-1, -2))


@cache
def _is_right(function: Callable[..., Any], kind: Kind, by_channel: bool) -> bool:
    """Whether a function of Transformers computes this recurrence: on random numbers, outputs and last state."""
    draw, tokens = torch.Generator().manual_seed(0), 11
    shared, heads = (1, tokens, 4, 32), (1, tokens, 4, 64)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    if kind is _delta_rule:
        arguments: dict[str, Any] = {"query": numbers(*shared), "key": numbers(*shared), "value": numbers(*heads)}
        decay = numbers(1, tokens, 4, 32) if by_channel else numbers(1, tokens, 4)
        arguments |= {"g": -F.softplus(decay), "beta": numbers(1, tokens, 4).sigmoid(), "use_qk_l2norm_in_kernel": True}
        arguments |= {"output_final_state": True}
    else:
        arguments = {
            "hidden_states": numbers(*heads),
            "dt": numbers(1, tokens, 4),
            "A": -numbers(4).exp(),
            "B": numbers(*shared),
        }
        arguments |= {"C": numbers(*shared), "D": numbers(4), "dt_bias": numbers(4), "dt_softplus": True, "chunk_size": 8}
        arguments |= {"return_final_states": True}
    inputs, finish = kind(arguments)
    backend = backend_for(*inputs)
    if not backend.supports_recurrence(inputs):
        return False
    with torch.no_grad():
        out, ends, _ = backend.recurrence(inputs, (Segment(0, tokens, -1),), False)
        ours, state = finish(out, ends)
        theirs, last = function(**arguments)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in ((ours, theirs), (state, last)))
