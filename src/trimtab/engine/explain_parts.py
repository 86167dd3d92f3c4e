"""Explain what was watched of an RMSNorm, an MLP or attention: the projections, norms, rotation and gate that give the same numbers."""

from collections.abc import Sequence
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.core.attention import LocalMask
from trimtab.engine.backends import Activation, AttentionPlan, Heads, Norm, backend_for
from trimtab.engine.backends import torch as reference
from trimtab.engine.structure import (
    AttentionPart,
    Gating,
    MLPPart,
    NormPart,
    PositionScale,
    Rotary,
    is_interleaved,
    rotary_angles,
)
from trimtab.engine.watching import CLOSE, Attended, Call, Watched, alike, is_linear, is_norm

ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")
ROTARIES: tuple[Rotary, ...] = ("halves", "none", "halves of one", "neighbours of halves", "neighbours")


def norm_part(name: str, module: nn.Module) -> NormPart | None:
    """The module as an RMSNorm, if that gives the same for numbers small and large."""
    own = dict(module.named_parameters())
    eps = next((value for key in ("variance_epsilon", "eps") if isinstance(value := getattr(module, key, None), float)), None)
    if not is_norm(module) or own.keys() != {"weight"} or eps is None or own["weight"].ndim != 1 or not eps > 0:
        return None
    weight, draw = own["weight"].detach(), torch.Generator().manual_seed(0)
    x = torch.randn(5, len(weight), generator=draw) * torch.tensor([[0.5 * eps**0.5], [3 * eps**0.5], [1.0], [20.0], [500.0]])
    with torch.no_grad():
        x = x.to(weight.dtype)
        y = module(x[None])[0]
        for offset in (0.0, 1.0):
            if alike(reference.rms_norm(x, Norm(weight, offset, eps))[0], y, CLOSE):
                return NormPart(name, offset, eps)
    return None


def mixer_part(seen: Watched, call: Call) -> AttentionPart | MLPPart | None:
    """How a module is computed by hand, if that is known."""
    inner, attended = seen.calls[call.name], [one for one in seen.attended if one.module is call.module]
    if len({one.name for one in inner}) != len(inner) or not inner:
        return None
    if "forward" in vars(call.module):  # patched, to count tokens or keep states by the layout: no plain attention or MLP
        return None
    if not attended:
        return _mlp(call, inner)
    return _attention(seen, call, attended[0]) if len(attended) == 1 else None


def _mlp(call: Call, inner: Sequence[Call]) -> MLPPart | None:
    linears = [one for one in inner if one.x is call.x and is_linear(one.module)]
    last = inner[-1] if inner else None
    if last is None or last.y is not call.y or not is_linear(last.module):
        return None
    gates = [one.y for one in linears] if len(linears) == 2 else linears[0].y.chunk(2, dim=-1) if len(linears) == 1 else []
    if len(gates) != 2 or gates[0].shape != last.x.shape or gates[1].shape != last.x.shape:
        return None
    names = [one.name for one in linears]
    for swapped, activation in product((False, True) if len(linears) == 2 else (False,), ACTIVATIONS):
        gate, up = (gates[1], gates[0]) if swapped else gates
        if alike(reference.gate(gate, up, activation), last.x, CLOSE):
            return MLPPart(tuple(names[::-1] if swapped else names), last.name, gate.shape[-1], activation)
    return None


def _attention(seen: Watched, call: Call, attended: Attended) -> AttentionPart | None:
    inner, rules = seen.calls[call.name], attended.rules
    H, G, size = len(attended.query), len(attended.key), attended.query.shape[2]
    if attended.value.shape != attended.key.shape or attended.key.shape[2] != size or H % G:
        return None
    if rules.softcap is not None and not backend_for(attended.query).supports_softcap(attended.query):
        return None
    if seen.shares or call.kwargs.get("position_embeddings") is not seen.kwargs.get("position_embeddings"):
        return None
    linears = [one for one in inner if one.x is call.x and is_linear(one.module)]
    found = _inputs(linears, H * size, G * size)
    output = inner[-1]
    if found is None or output.y is not call.y or not is_linear(output.module):
        return None
    names, before, others = found
    gate: Gating = "own" if others else "none"
    if before[0].shape[1] == 2 * H * size:
        gate, (before[0], *others) = "within q", [t.flatten(1) for t in before[0].unflatten(1, (-1, 2, size)).unbind(2)]
    gated = attended.out * others[0].sigmoid() if others else attended.out
    if len(others) > 1 or not alike(gated, output.x[0], CLOSE):
        return None
    q, k, v = (t.transpose(0, 1).flatten(1) for t in (attended.query, attended.key, attended.value))
    embeddings = seen.kwargs.get("position_embeddings")
    norms = [_normed(inner, t, size) for t in before]
    way_q, way_k = _turned(seen, norms[0][1], q, size, embeddings), _turned(seen, norms[1][1], k, size, embeddings)
    if way_q is None or way_k is None or way_k != (way_q[0], None) or not alike(norms[2][1], v, CLOSE):
        return None
    sinks = rules.sinks
    named = [name for name, parameter in attended.module.named_parameters(recurse=False) if parameter is sinks]
    if sinks is not None and not named:
        return None
    window = _window_from(attended, seen.kwargs.get("attention_mask"))
    if window is None:
        return None
    scale = size**-0.5 if rules.scale is None else float(rules.scale)
    return AttentionPart(
        names, output.name, Heads(G, H // G, size), scale, rules.softcap, window, tuple(norm for norm, _ in norms), *way_q, gate,
        named[0] if named else None,
    )  # fmt: skip


def _window_from(attended: Attended, mask: Any) -> Literal["nowhere", "module", "config"] | None:
    """What holds the window that attention was asked for; None if that is not known."""
    window, module = attended.rules.window, attended.module
    if isinstance(mask, LocalMask) or window is None:
        return "nowhere" if attended.rules.chunk is None or isinstance(mask, LocalMask) else None
    if getattr(module, "sliding_window", None) == window:
        return "module"
    return "config" if getattr(getattr(module, "config", None), "sliding_window", None) == window else None


def _inputs(linears: Sequence[Call], wide: int, narrow: int) -> tuple[tuple[str, ...], list[Tensor], list[Tensor]] | None:
    """The names of the linear layers, in the order of their calls, and what they return for q, k, v, and beyond (a gate); T n."""
    names, outs = tuple(one.name for one in linears), [one.y[0] for one in linears]
    widths = [out.shape[1] for out in outs]
    if widths == [wide + 2 * narrow]:
        return names, list(outs[0].split([wide, narrow, narrow], dim=1)), []
    if widths[:1] not in ([wide], [2 * wide]) or widths[1:] not in ([narrow], [narrow, narrow], [narrow, narrow, wide]):
        return None
    return names, [*outs, outs[1]][:3], outs[3:]


def _normed(inner: Sequence[Call], x: Tensor, size: int) -> tuple[NormPart | str | None, Tensor]:
    """The norm that was called with x (T n), and what it gave."""
    for call in inner:
        if is_norm(call.module) and (given := _as_rows(call.x, x, size)) is not None and torch.equal(given, x):
            rows = _as_rows(call.y, x, size)
            assert rows is not None
            return norm_part(call.name, call.module) or call.name, rows
    return None, x


def _turned(
    seen: Watched, before: Tensor, after: Tensor, size: int, embeddings: Any
) -> tuple[Rotary, PositionScale | None] | None:
    """How queries or keys were rotated, and scaled by their positions."""
    heads = Heads(before.shape[1] // size, 1, size)
    for scale, rotary in product(dict.fromkeys((None, _position_scale(seen))), ROTARIES):
        angles = _angles(rotary, embeddings, before, size)
        if angles is not None:
            plan = AttentionPlan((), heads, 1.0, interleaved=is_interleaved(rotary))
            rotated = reference.rotated(before, plan, *angles)
            scaled = rotated if scale is None else rotated * scale.of(seen.kwargs["position_ids"][0], rotated)[:, None]
            if alike(scaled.unflatten(1, (-1, size)), after.unflatten(1, (-1, size)), CLOSE):
                return rotary, scale
    return None


def _as_rows(x: Tensor, like: Tensor, size: int) -> Tensor | None:
    """What a norm got (1 T n, 1 T H K or 1 H T K) as T n; None if it is of another size."""
    if x.numel() != like.numel():
        return None
    if x.ndim == 4 and x.shape[1:] == (like.shape[1] // size, len(like), size):
        x = x.transpose(1, 2)
    return x.reshape(like.shape)


def _angles(style: Rotary, embeddings: Any, like: Tensor, size: int) -> tuple[Tensor, Tensor] | None:
    if style == "none":
        return rotary_angles(style, None, like)
    pair = isinstance(embeddings, tuple) and len(embeddings) == 2 and all(isinstance(t, Tensor) for t in embeddings)
    if not pair or any(t.ndim != 3 or t.shape[:2] != (1, len(like)) or t.dtype != like.dtype for t in embeddings):
        return None
    cos, sin = rotary_angles(style, embeddings, like)
    return (cos, sin) if cos.shape[1] <= size and cos.shape[1] % 2 == 0 else None


def _position_scale(seen: Watched) -> PositionScale | None:
    parameters = getattr(getattr(seen.layer, "config", None), "rope_parameters", None)
    for module in seen.layer.modules():
        parameters = parameters or getattr(getattr(module, "config", None), "rope_parameters", None)
    beta, original = ((parameters or {}).get(key) for key in ("llama_4_scaling_beta", "original_max_position_embeddings"))
    return None if beta is None or original is None or "position_ids" not in seen.kwargs else PositionScale(beta, original)
