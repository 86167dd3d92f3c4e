"""Decoder layers computed by fused operations, for the families of models whose layers Transformers writes alike.

Fused operations compute each part of a layer where they give the same (frozen norms, matrices with low-rank updates), and its
module elsewhere. Outside packed passes the model runs its own code, with which tests, and the check pre every run, compare.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.attention import Virtual
from trimtab.core.attention_hook import holding
from trimtab.engine import operations
from trimtab.engine.backends import Activation, AttentionInputs, AttentionPlan, Heads, Norm
from trimtab.engine.tree_attention import attend
from trimtab.methods import AdapterLayer, Routing

PRE_NORM = {"Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Granite"}
"""Families whose layers are x + attention(norm(x)), then x + mlp(norm(x))."""
SANDWICH = {"Gemma2", "Gemma3"}
"""Families that normalize the outputs of attention and of the MLP, too."""
WINDOW_OF_MODEL = {"Mistral", "Phi3"}
"""Families whose configuration holds the sliding window; in others that have one, each attention module does."""
ACTIVATIONS: dict[str, Activation] = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh"}

_in_fused_layer: ContextVar[bool] = ContextVar("in_fused_layer", default=False)


def is_supported(module: nn.Module, part: str) -> bool:
    """Whether this is a DecoderLayer, Attention, MLP or RMSNorm of a supported family."""
    return _family(module, part) in PRE_NORM | SANDWICH


def _family(module: nn.Module, part: str) -> str | None:
    """The prefix of its class's name in Transformers; None for other classes."""
    kind = type(module)
    own = kind.__module__.startswith("transformers.models.") and kind.__name__.endswith(part)
    return kind.__name__.removesuffix(part) if own else None


def compute_layer(layer: Any, hidden: Tensor, kwargs: dict[str, Any], output_at: Tensor | None = None) -> Tensor:
    """1 T d -> 1 T d; or, in the last layer, 1 M d of the tokens at `output_at`: no layer attends to the others any more."""
    scale = getattr(layer, "residual_multiplier", 1.0)  # Granite
    post_attention, pre_mlp, post_mlp = None, layer.post_attention_layernorm, None
    if _family(layer, "DecoderLayer") in SANDWICH:
        post_attention, pre_mlp, post_mlp = pre_mlp, layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm
    x = _attention(hidden[0], layer.input_layernorm, layer.self_attn, post_attention, scale, kwargs, output_at)
    return _mlp(x, pre_mlp, layer.mlp, post_mlp, scale)[None]


def _attention(
    x: Tensor, pre: nn.Module, module: nn.Module, post: nn.Module | None, scale: float, kwargs: Any, output_at: Tensor | None
) -> Tensor:
    """x + scale · post(attention(pre(x))): T d, or M d of the tokens at `output_at`."""
    attention: Any = _unwrap_inactive(module)
    virtual: Sequence[Virtual] = kwargs.get("virtual", ())
    cos, sin = (t[0].contiguous() for t in kwargs["position_embeddings"])
    if not _is_standard(attention, cos, virtual):
        out = module(hidden_states=_normalized(x, pre)[None], **kwargs)[0][0]
        return _add(*_select(output_at, x, out), post, scale)
    layout = kwargs["layout"]
    layout.reached = True
    heads, size = attention.config.num_attention_heads, attention.head_dim
    groups = attention.config.num_key_value_heads
    if hasattr(attention, "qkv_proj"):  # Phi-3
        x, q, k, v = _linears(x, pre, [attention.qkv_proj], [heads * size, groups * size, groups * size])
    else:
        x, q, k, v = _linears(x, pre, [attention.q_proj, attention.k_proj, attention.v_proj])
    if hasattr(attention, "q_norm"):  # Qwen3, Gemma 3
        q, k = (_normalized_heads(t, size, norm) for t, norm in ((q, attention.q_norm), (k, attention.k_norm)))
    holder = attention.config if _family(attention, "Attention") in WINDOW_OF_MODEL else attention
    virtual_kv = [t[0] for t in virtual[0].of(attention, x)] if virtual else []
    window, count = getattr(holder, "sliding_window", None), virtual_kv[0].shape[1] if virtual else 0
    plan = AttentionPlan(layout.segments, Heads(groups, heads // groups, size), attention.scaling, window, count)
    out = attend(AttentionInputs(q, k, v, cos, sin, *virtual_kv), plan)
    return _linear_add(*_select(output_at, x, out), attention.o_proj, post, scale)


def _select(output_at: Tensor | None, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    return (x, out) if output_at is None else (x.index_select(0, output_at), out.index_select(0, output_at))


def _is_standard(attention: Any, cos: Tensor, virtual: Sequence[Virtual]) -> bool:
    """Whether `tree_attention` computes this attention."""
    return (
        is_supported(attention, "Attention")
        and getattr(attention, "attn_logit_softcapping", None) is None
        and cos.shape[1] == attention.head_dim  # all of a head is rotated
        and not (attention.training and attention.attention_dropout)
        and len(virtual) <= 1
        and all(tokens.acts_on is None for tokens in virtual)
    )


def _mlp(x: Tensor, pre: nn.Module, module: nn.Module, post: nn.Module | None, scale: float) -> Tensor:
    """x + scale · post(mlp(pre(x))): T d."""
    mlp: Any = _unwrap_inactive(module)
    if (activation := _activation(mlp)) is None:
        with holding(_in_fused_layer, True):
            return _add(x, module(_normalized(x, pre)[None])[0], post, scale)
    x, g, u = _gate_and_up(x, pre, mlp)
    return _linear_add(x, g, mlp.down_proj, post, scale, gate=(u, activation))


def compute_mlp(mlp: Any, x: Tensor) -> Tensor | None:
    """1 T d -> 1 T d, of an MLP inside an adapter that `compute_layer` calls; None elsewhere, and for unsupported MLPs."""
    if not _in_fused_layer.get() or (activation := _activation(mlp)) is None:
        return None
    _, g, u = _gate_and_up(x[0], None, mlp)
    return _linear_add(None, g, mlp.down_proj, None, 1.0, gate=(u, activation))[None]


def _activation(mlp: Any) -> Activation | None:
    """The activation function of a supported MLP."""
    function = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
    return ACTIVATIONS.get(type(function).__name__) if is_supported(mlp, "MLP") else None


def _gate_and_up(x: Tensor, pre: nn.Module | None, mlp: Any) -> Sequence[Tensor]:
    if hasattr(mlp, "gate_up_proj"):  # Phi-3
        return _linears(x, pre, [mlp.gate_up_proj], 2 * [mlp.config.intermediate_size])
    return _linears(x, pre, [mlp.gate_proj, mlp.up_proj])


def _unwrap_inactive(module: nn.Module) -> nn.Module:
    """The module without the adapters around it that are off."""
    while isinstance(module, AdapterLayer) and not module.switch.state:
        module = module.base
    return module


def _add(x: Tensor | None, y: Tensor, post: nn.Module | None, scale: float) -> Tensor:
    """x + scale · post(y)."""
    y = y if post is None else _normalized(y, post)
    if x is None:
        return y
    return x + y if scale == 1.0 else torch.add(x, y, alpha=scale)


def _normalized(x: Tensor, module: nn.Module) -> Tensor:
    norm = _norm(module)
    return operations.rms_norm(x, norm) if norm is not None else module(x[None])[0]


def _normalized_heads(x: Tensor, size: int, module: nn.Module) -> Tensor:
    """Each head of x by itself: T H·K."""
    if (norm := _norm(module)) is not None:
        return operations.rms_norm(x.reshape(-1, size), norm).view(x.shape)
    return module(x.unflatten(1, (-1, size))[None])[0].reshape(x.shape)


def _norm(module: nn.Module) -> Norm | None:
    """A norm of a supported family; an adapter may train its weight."""
    weight: Tensor | None = None
    while isinstance(module, AdapterLayer):
        if state := module.switch.state:
            replaced = None if isinstance(state, Routing) else module.replacement_parameters()
            if replaced is None or weight is not None:
                return None
            weight = replaced["weight"]
        module = module.base
    own: Any = module
    if (family := _family(own, "RMSNorm")) not in PRE_NORM | SANDWICH:
        return None
    weight = own.weight if weight is None else weight
    return Norm(weight, 1.0, own.eps) if family in SANDWICH else Norm(weight, 0.0, own.variance_epsilon)


def _linears(
    x: Tensor, pre: nn.Module | None, modules: Sequence[nn.Module], widths: Sequence[int] | None = None
) -> Sequence[Tensor]:
    """x, for the residual connection, and each module's output for pre(x); or a single one's, split into these widths."""
    layers = [layer for module in modules if (layer := _linear(module)) is not None]
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
    x: Tensor | None, y: Tensor, module: nn.Module, post: nn.Module | None, scale: float, gate: operations.Gate | None = None
) -> Tensor:
    """x + scale · post(module(y)); with a gate (u and activation) of act(y) · u instead of y."""
    layer = _linear(module)
    if layer is None:
        return _add(x, module((operations.gate(y, *gate) if gate else y)[None])[0], post, scale)
    if post is None:
        return operations.linear_add(x, y, layer, scale, gate)
    return _add(x, operations.linear_add(None, y, layer, 1.0, gate), post, scale)


def _linear(module: nn.Module) -> operations.Linear | None:
    """A frozen linear layer with the low-rank updates that act on it; None for anything else."""
    updates: list[tuple[Tensor, Tensor]] = []
    while isinstance(module, AdapterLayer):
        if state := module.switch.state:
            update = None if isinstance(state, Routing) else module.low_rank_factors()
            if update is None:
                return None
            updates.append(update)
        module = module.base
    if type(module) is not nn.Linear or any(p is not None and p.requires_grad for p in (module.weight, module.bias)):
        return None
    if any(factor.dtype != module.weight.dtype for update in updates for factor in update):
        return None
    if len(updates) > 1:
        updates = [(torch.cat([A for A, _ in updates]), torch.cat([B for _, B in updates], dim=1))]
    return operations.Linear(module.weight, module.bias, *(updates[0] if updates else ()))
