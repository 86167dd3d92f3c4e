"""Decoder layers computed by fused operations, part by part, as their structure says.

Fused operations compute each part of a layer where they give the same (frozen norms, matrices with low-rank updates), and its
module elsewhere. Outside packed passes the model runs its own code, with which tests, and the check pre every run, compare.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.core.attention import Virtual
from trimtab.core.attention_hook import holding
from trimtab.engine import operations
from trimtab.engine.backends import AttentionInputs, AttentionPlan, Norm
from trimtab.engine.low_rank import linear_of
from trimtab.engine.recompute import recomputable
from trimtab.engine.structure import (
    AttentionPart,
    Branch,
    LayerStructure,
    Mixer,
    MLPPart,
    NormPart,
    is_interleaved,
    rotary_angles,
)
from trimtab.engine.tree_attention import attend
from trimtab.methods import AdapterLayer, Routing, unwrap

_in_fused_layer: ContextVar[bool] = ContextVar("in_fused_layer", default=False)


class _Norm(NamedTuple):
    module: nn.Module
    part: NormPart | None
    """None if the module is called."""


class _Pending(NamedTuple):
    """What a mixer gives, before its last linear layer."""

    y: Tensor
    linear: nn.Module | None = None
    """None if there is none to come."""
    gate: operations.Gate | None = None
    saving: AbstractContextManager[Any] = nullcontext()
    """Around the operations that are left: what they need not keep for the backward pass is computed again."""


def compute_layer(
    layer: Any, structure: LayerStructure, hidden: Tensor, kwargs: dict[str, Any], output_at: Tensor | None = None
) -> Any:
    """What the layer returns for 1 T d: 1 T d; or, in the last layer, 1 M d of the tokens at `output_at`: no layer attends to others."""
    if not structure.branches:
        with holding(_in_fused_layer, True):
            return type(layer).forward(layer, hidden, **kwargs)
    x = hidden[0]
    for number, branch in enumerate(structure.branches):
        x = _branch(x, layer, structure, branch, kwargs, output_at if number == structure.narrow_at else None)
    if structure.factor is not None:
        x = x * getattr(layer, structure.factor)
    return structure.result(x[None])


def _branch(
    x: Tensor, layer: Any, structure: LayerStructure, branch: Branch, kwargs: dict[str, Any], at: Tensor | None
) -> Tensor:
    """x + scale · post(Σ mixers(pre(x))): T d, or M d of the tokens `at`."""
    pre, post = (_Norm(getattr(layer, n), structure.norms.get(n)) if n else None for n in (branch.pre, branch.post))
    if len(branch.mixers) == 1:
        x, pending = _mix(x, pre, layer, branch.mixers[0], kwargs, at)
        return _finish(_selected(x, at), pending, post, branch.scale)
    h, x = x if pre is None else _normalized(x, pre), _selected(x, at)
    total, scale = (x, branch.scale) if post is None else (None, 1.0)
    for mixer in branch.mixers:
        h, pending = _mix(h, None, layer, mixer, kwargs, at)
        total = _finish(total, pending, None, scale)
    assert total is not None
    return total if post is None else _add(x, total, post, branch.scale)


def _selected(x: Tensor, at: Tensor | None) -> Tensor:
    return x if at is None else x.index_select(0, at)


def _mix(
    x: Tensor, pre: _Norm | None, layer: Any, mixer: Mixer, kwargs: dict[str, Any], at: Tensor | None
) -> tuple[Tensor, _Pending]:
    """x, for the residual connection, and mixer(pre(x))."""
    module = getattr(layer, mixer.name)
    own: Any = _unwrap_inactive(module)
    if isinstance(mixer.part, AttentionPart) and _is_standard(own, mixer.part, kwargs):
        return _attention(x, pre, own, mixer.part, kwargs, at)
    if isinstance(mixer.part, MLPPart) and not isinstance(own, AdapterLayer):
        return _mlp(x, pre, own, mixer.part, at)
    h = x[None] if pre is None else _normalized(x, pre)[None]
    with holding(_in_fused_layer, True):
        out = mixer.call(module, h, kwargs)
    return x, _Pending(_selected(out[0], at))


def _attention(
    x: Tensor, pre: _Norm | None, own: Any, part: AttentionPart, kwargs: dict[str, Any], at: Tensor | None
) -> tuple[Tensor, _Pending]:
    layout, heads = kwargs["layout"], part.heads
    layout.reached = True
    wide, narrow = heads.groups * heads.per_group * heads.size, heads.groups * heads.size
    widths = [wide, narrow, narrow] if len(part.inputs) == 1 else None
    x, q, k, *others = _linears(x, pre, [getattr(own, name) for name in part.inputs], widths)
    v, *others = others or [k]
    if part.gate == "within q":
        q, gate = (t.flatten(1) for t in q.unflatten(1, (-1, 2, heads.size)).unbind(2))
        others = [gate]
    q, k, v = (_normalized_heads(t, own, norm, heads.size) for t, norm in zip((q, k, v), part.norms, strict=True))
    if part.position_scale is not None:
        q = q * part.position_scale.of(kwargs["position_ids"][0], q)[:, None]
    virtual: Sequence[Virtual] = kwargs.get("virtual", ())
    virtual_kv = [t[0] for t in virtual[0].of(own, x)] if virtual else [None, None]
    mask = kwargs.get("attention_mask")
    window, chunk = (part.window(own), None) if mask is None else (mask.window, mask.chunk)
    count = 0 if virtual_kv[0] is None else virtual_kv[0].shape[1]
    plan = AttentionPlan(layout.segments, heads, part.scale, window, count, chunk, is_interleaved(part.rotary), part.softcap)
    cos, sin = rotary_angles(part.rotary, kwargs.get("position_embeddings"), q)
    sinks = None if part.sinks is None else getattr(own, part.sinks)
    out = _selected(attend(AttentionInputs(q, k, v, cos, sin, virtual_kv[0], virtual_kv[1], sinks), plan), at)
    if others:
        out = out * _selected(others[0], at).sigmoid()
    return x, _Pending(out, getattr(own, part.output))


def _is_standard(own: Any, part: AttentionPart, kwargs: dict[str, Any]) -> bool:
    """Whether `tree_attention` computes this attention in this pass."""
    virtual: Sequence[Virtual] = kwargs.get("virtual", ())
    return (
        not isinstance(own, AdapterLayer)
        and not isinstance(kwargs.get("attention_mask"), Tensor)
        and not (own.training and getattr(own, "attention_dropout", 0.0))
        and len(virtual) <= 1
        and all(tokens.acts_on is None for tokens in virtual)
    )


class PatchedPartForward:
    """The forward pass of an MLP, attention or norm, by fused operations where `compute_layer` has its module called."""

    is_patch = True

    def __init__(self, module: Any, part: NormPart | AttentionPart | MLPPart) -> None:
        self.module, self.part = module, part

    def of_twin(self, twin: Any) -> "PatchedPartForward":
        """The same of a module that has other weights."""
        return PatchedPartForward(twin, self.part)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        part, own = self.part, self.module
        x = args[0] if args else kwargs.get("hidden_states")
        if not _in_fused_layer.get() or len(args) > 1 or x is None:
            return type(own).forward(own, *args, **kwargs)
        if isinstance(part, NormPart):
            norm = Norm(own.weight, part.offset, part.eps)
            return operations.rms_norm(x.reshape(-1, x.shape[-1]), norm).view(x.shape)
        if isinstance(part, MLPPart):
            return _finish(None, _mlp(x[0], None, own, part, None)[1], None, 1.0)[None]
        if not _is_standard(own, part, kwargs):
            return type(own).forward(own, *args, **kwargs)
        _, pending = _attention(x[0], None, own, part, kwargs, None)
        return _finish(None, pending, None, 1.0)[None], None


def patch_parts(layer: Any, structure: LayerStructure | None) -> None:
    """Let the layer's modules compute as the structure says, where they are called; None: as they did before."""
    found: dict[str, Any] = {}
    if structure is not None:
        mixers = (mixer for branch in structure.branches for mixer in branch.mixers)
        found = {mixer.name: mixer.part for mixer in mixers if isinstance(mixer.part, MLPPart)} | dict(structure.parts)
    for name, child in layer.named_children():
        module: Any = unwrap(child)
        if type(vars(module).get("forward")) is PatchedPartForward:
            del module.forward
        if name in found and "forward" not in vars(module):
            module.forward = PatchedPartForward(module, found[name])


def _mlp(x: Tensor, pre: _Norm | None, own: Any, part: MLPPart, at: Tensor | None) -> tuple[Tensor, _Pending]:
    (x, g, u), saving = recomputable(partial(_gate_and_up, pre=pre, mlp=own, part=part, at=at), x, own)
    return x, _Pending(g, getattr(own, part.output), (u, part.activation), saving)


def _gate_and_up(x: Tensor, pre: _Norm | None, mlp: Any, part: MLPPart, at: Tensor | None) -> Sequence[Tensor]:
    modules = [getattr(mlp, name) for name in part.inputs]
    x, g, u = _linears(x, pre, modules, 2 * [part.width] if len(modules) == 1 else None)  # one: Phi-3
    return x, _selected(g, at), _selected(u, at)


def _unwrap_inactive(module: nn.Module) -> nn.Module:
    """The module without the adapters around it that are off."""
    while isinstance(module, AdapterLayer) and not module.switch.state:
        module = module.base
    return module


def _finish(x: Tensor | None, pending: _Pending, post: _Norm | None, scale: float) -> Tensor:
    """x + scale · post(what is pending)."""
    if pending.linear is None:
        return _add(x, pending.y, post, scale)
    with pending.saving:
        return _linear_add(x, pending.y, pending.linear, post, scale, pending.gate)


def _add(x: Tensor | None, y: Tensor, post: _Norm | None, scale: float) -> Tensor:
    """x + scale · post(y)."""
    y = y if post is None else _normalized(y, post)
    if x is None:
        return y
    return x + y if scale == 1.0 else torch.add(x, y, alpha=scale)


def _normalized(x: Tensor, given: _Norm) -> Tensor:
    norm = _norm(given)
    return operations.rms_norm(x, norm) if norm is not None else given.module(x[None])[0]


def _normalized_heads(x: Tensor, own: Any, part: NormPart | str | None, size: int) -> Tensor:
    """Each head of x by itself, or all of x, as the size of the norm's weight says: T H·K."""
    if part is None:
        return x
    module: Any = getattr(own, part if isinstance(part, str) else part.name)
    if not isinstance(part, str) and (norm := _norm(_Norm(module, part))) is not None:
        n = len(norm.weight)  # heads side by side, which C takes from a copy
        rows = x if n == x.shape[1] else x.reshape(-1, n) if x.is_cpu else x.unflatten(1, (-1, n))
        return operations.rms_norm(rows, norm).view(x.shape)
    weight = getattr(unwrap(module), "weight", None)
    whole = weight is not None and len(weight) == x.shape[1]
    return module((x if whole else x.unflatten(1, (-1, size)))[None])[0].reshape(x.shape)


def _norm(given: _Norm) -> Norm | None:
    """An RMSNorm; an adapter may train its weight."""
    module, weight = given.module, None
    while isinstance(module, AdapterLayer):
        if state := module.switch.state:
            replaced = None if isinstance(state, Routing) else module.replacement_parameters()
            if replaced is None or weight is not None:
                return None
            weight = replaced["weight"]
        module = module.base
    if given.part is None:
        return None
    own: Any = module
    if weight is None or not weight.requires_grad:
        weight = own.weight if weight is None else weight.to(own.weight.dtype)
    return Norm(weight, given.part.offset, given.part.eps)


def _linears(
    x: Tensor, pre: _Norm | None, modules: Sequence[nn.Module], widths: Sequence[int] | None = None
) -> Sequence[Tensor]:
    """x, for the residual connection, and each module's output for pre(x); or a single one's, split into these widths."""
    layers = [layer for module in modules if (layer := linear_of(module, x.dtype)) is not None]
    fused, norm = len(layers) == len(modules), _norm(pre) if pre is not None else None
    if norm is not None and norm.weight.requires_grad:
        norm = None  # then the norm is an operation of its own
    y = x if pre is None or (fused and norm is not None) else _normalized(x, pre)
    if fused:
        residual, *outputs = operations.linears(y, norm, layers, widths or [len(layer.weight) for layer in layers])
        return residual if y is x else x, *outputs
    outputs = [module(y[None])[0] for module in modules]
    return x, *(outputs if widths is None else outputs[0].split(list(widths), dim=1))


def _linear_add(
    x: Tensor | None, y: Tensor, module: nn.Module, post: _Norm | None, scale: float, gate: operations.Gate | None = None
) -> Tensor:
    """x + scale · post(module(y)); with a gate (u and activation) of act(y) · u instead of y."""
    layer = linear_of(module, y.dtype)
    if layer is None:
        return _add(x, module((operations.gate(y, *gate) if gate else y)[None])[0], post, scale)
    if post is None:
        return operations.linear_add(x, y, layer, scale, gate)
    return _add(x, operations.linear_add(None, y, layer, 1.0, gate), post, scale)
