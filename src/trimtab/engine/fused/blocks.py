"""Decoder layers by hand, on the model's own modules: the families that Transformers writes alike, without its passes over memory.

Each part of a layer is done by hand where that computes the same (frozen norms, matrices with low-rank changes), and by its
module where not. Outside packed passes the model is its own code: what tests, and the check before every run, compare with.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.attention_hook import Virtual, holding
from trimtab.engine.fused import ops
from trimtab.engine.fused.kernels import Gate
from trimtab.engine.fused.tree_attention import AttentionPlan, Sizes, attend
from trimtab.methods import AdapterLayer, Routing

PRE_NORM = {"Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Granite"}
"""Families whose layers are x + attention(norm(x)), then x + mlp(norm(x))."""
SANDWICH = {"Gemma2", "Gemma3"}
"""Families that norm what attention and the MLP give, too."""
WINDOW_OF_MODEL = {"Mistral", "Phi3"}
"""Families whose sliding window the configuration says; in others that have one, each layer does."""
GATES: dict[str, Gate] = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh"}

_inside: ContextVar[bool] = ContextVar("inside", default=False)
"""What runs is called by a layer by hand."""


def is_known(module: nn.Module, part: str) -> bool:
    """Whether this is a DecoderLayer, Attention, MLP or RMSNorm that can be computed by hand."""
    return _family(module, part) in PRE_NORM | SANDWICH


def _family(module: nn.Module, part: str) -> str | None:
    """Whose it is in Transformers."""
    kind = type(module)
    known = kind.__module__.startswith("transformers.models.") and kind.__name__.endswith(part)
    return kind.__name__.removesuffix(part) if known else None


def layer_by_hand(layer: Any, hidden: Tensor, kwargs: dict[str, Any], wanted: Tensor | None = None) -> Tensor:
    """1 T d -> 1 T d; or 1 M d, of the tokens that are wanted: in the last layer, nobody attends to what the others become."""
    scale = getattr(layer, "residual_multiplier", 1.0)  # Granite
    between, inner, end = None, layer.post_attention_layernorm, None
    if _family(layer, "DecoderLayer") in SANDWICH:
        between, inner, end = inner, layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm
    x = _attention(hidden[0], layer.input_layernorm, layer.self_attn, between, scale, kwargs, wanted)
    return _mlp(x, inner, layer.mlp, end, scale)[None]


def _attention(
    x: Tensor, before: nn.Module, module: nn.Module, after: nn.Module | None, scale: float, kwargs: Any, wanted: Tensor | None
) -> Tensor:
    """x + scale · after(attention(before(x))): T d, or M d of those that are wanted."""
    attention: Any = _acting(module)
    virtual: Sequence[Virtual] = kwargs.get("virtual", ())
    cos, sin = (t[0].contiguous() for t in kwargs["position_embeddings"])
    if not _is_plain(attention, cos, virtual):
        out = module(hidden_states=_normed(x, before)[None], **kwargs)[0][0]
        return _added(*_rows(wanted, x, out), after, scale)
    layout = kwargs["layout"]
    layout.reached = True
    heads, size = attention.config.num_attention_heads, attention.head_dim
    groups = attention.config.num_key_value_heads
    if hasattr(attention, "qkv_proj"):  # Phi-3
        x, q, k, v = _linears(x, before, [attention.qkv_proj], [heads * size, groups * size, groups * size])
    else:
        x, q, k, v = _linears(x, before, [attention.q_proj, attention.k_proj, attention.v_proj])
    if hasattr(attention, "q_norm"):  # Qwen3, Gemma 3
        q, k = (_normed_heads(t, size, how) for t, how in ((q, attention.q_norm), (k, attention.k_norm)))
    holder = attention.config if _family(attention, "Attention") in WINDOW_OF_MODEL else attention
    first = virtual[0].of(attention, x) if virtual else None
    window = getattr(holder, "sliding_window", None)
    plan = AttentionPlan(layout.segments, first[0].shape[2] if first else 0, window)
    sizes = Sizes(groups, heads // groups, size)
    out = attend(q, k, v, cos, sin, plan, sizes, attention.scaling, (first[0][0], first[1][0]) if first else None)
    return _through(*_rows(wanted, x, out), attention.o_proj, after, scale)


def _rows(wanted: Tensor | None, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    return (x, out) if wanted is None else (x.index_select(0, wanted), out.index_select(0, wanted))


def _is_plain(attention: Any, cos: Tensor, virtual: Sequence[Virtual]) -> bool:
    """Attention as `tree_attention` does it."""
    return (
        is_known(attention, "Attention")
        and getattr(attention, "attn_logit_softcapping", None) is None
        and cos.shape[1] == attention.head_dim  # every number of a head is turned
        and not (attention.training and attention.attention_dropout)
        and len(virtual) <= 1
        and all(one.acts_on is None for one in virtual)
    )


def _mlp(x: Tensor, before: nn.Module, module: nn.Module, after: nn.Module | None, scale: float) -> Tensor:
    """x + scale · after(mlp(before(x))): T d."""
    mlp: Any = _acting(module)
    if (gate := _gate(mlp)) is None:
        with holding(_inside, True):
            return _added(x, module(_normed(x, before)[None])[0], after, scale)
    x, g, u = _gate_and_up(x, before, mlp)
    return _through(x, g, mlp.down_proj, after, scale, gated=(u, gate))


def mlp_by_hand(mlp: Any, x: Tensor) -> Tensor | None:
    """1 T d -> 1 T d, for an adapter around an MLP that a layer by hand calls; None if it is not that, or not known."""
    if not _inside.get() or (gate := _gate(mlp)) is None:
        return None
    _, g, u = _gate_and_up(x[0], None, mlp)
    return _through(None, g, mlp.down_proj, None, 1.0, gated=(u, gate))[None]


def _gate(mlp: Any) -> Gate | None:
    """The gate of an MLP that is known."""
    activate = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
    return GATES.get(type(activate).__name__) if is_known(mlp, "MLP") else None


def _gate_and_up(x: Tensor, before: nn.Module | None, mlp: Any) -> Sequence[Tensor]:
    if hasattr(mlp, "gate_up_proj"):  # Phi-3
        return _linears(x, before, [mlp.gate_up_proj], 2 * [mlp.config.intermediate_size])
    return _linears(x, before, [mlp.gate_proj, mlp.up_proj])


def _acting(module: nn.Module) -> nn.Module:
    """What computes here: the module without the adapters on it that are off."""
    while isinstance(module, AdapterLayer) and not module.switch.state:
        module = module.base
    return module


def _added(x: Tensor | None, y: Tensor, after: nn.Module | None, scale: float) -> Tensor:
    """x + scale · after(y)."""
    y = y if after is None else _normed(y, after)
    if x is None:
        return y
    return x + y if scale == 1.0 else torch.add(x, y, alpha=scale)


def _normed(x: Tensor, module: nn.Module) -> Tensor:
    how = _norm(module)
    return ops.norm(x, how) if how is not None else module(x[None])[0]


def _normed_heads(x: Tensor, size: int, module: nn.Module) -> Tensor:
    """Each head of x by itself: T H·K."""
    if (how := _norm(module)) is not None:
        return ops.norm(x.reshape(-1, size), how).view(x.shape)
    return module(x.unflatten(1, (-1, size))[None])[0].reshape(x.shape)


def _norm(module: nn.Module) -> ops.Norm | None:
    """A norm that is known; an adapter may train its weight."""
    weight: Tensor | None = None
    while isinstance(module, AdapterLayer):
        if state := module.switch.state:
            replaced = None if isinstance(state, Routing) else module.replaced()
            if replaced is None or weight is not None:
                return None
            weight = replaced["weight"]
        module = module.base
    own: Any = module
    if (family := _family(own, "RMSNorm")) not in PRE_NORM | SANDWICH:
        return None
    weight = own.weight if weight is None else weight
    return ops.Norm(weight, 1.0, own.eps) if family in SANDWICH else ops.Norm(weight, 0.0, own.variance_epsilon)


def _linears(
    x: Tensor, before: nn.Module | None, modules: Sequence[nn.Module], cut: Sequence[int] | None = None
) -> Sequence[Tensor]:
    """x, to go on with, and what each of the modules makes of before(x); or one's, cut into columns of these widths."""
    sites = [site for module in modules if (site := _site(module)) is not None]
    how = _norm(before) if before is not None else None
    if how is not None and how.weight.requires_grad:
        how = None  # then the norm is an operation of its own
    if len(sites) == len(modules) and (before is None or how is not None):
        return ops.linears(x, how, sites, cut or [len(site.weight) for site in sites])
    y = x if before is None else _normed(x, before)
    if len(sites) == len(modules):
        return x, *ops.linears(y, None, sites, cut or [len(site.weight) for site in sites])[1:]
    made = [module(y[None])[0] for module in modules]
    return x, *(made if cut is None else made[0].split(list(cut), dim=1))


def _through(
    x: Tensor | None,
    y: Tensor,
    module: nn.Module,
    after: nn.Module | None,
    scale: float,
    gated: tuple[Tensor, Gate] | None = None,
) -> Tensor:
    """x + scale · after(module(y)); or of act(y) · u instead of y."""
    site = _site(module)
    if site is None:
        return _added(x, module((ops.gated(y, *gated) if gated else y)[None])[0], after, scale)
    residual, factor = (x, scale) if after is None else (None, 1.0)
    out = ops.gated_linear_add(residual, y, *gated, site, factor) if gated else ops.linear_add(residual, y, site, factor)
    return out if after is None else _added(x, out, after, scale)


def _site(module: nn.Module) -> ops.Site | None:
    """A frozen matrix with the low-rank changes that act on it; None for anything else."""
    changes: list[tuple[Tensor, Tensor]] = []
    while isinstance(module, AdapterLayer):
        if state := module.switch.state:
            change = None if isinstance(state, Routing) else module.low_rank()
            if change is None:
                return None
            changes.append(change)
        module = module.base
    if type(module) is not nn.Linear or module.weight.requires_grad:
        return None
    if module.bias is not None and module.bias.requires_grad:
        return None
    if not changes:
        return ops.Site(module.weight, module.bias)
    if any(factor.dtype != module.weight.dtype for change in changes for factor in change):
        return None
    if len(changes) == 1:
        return ops.Site(module.weight, module.bias, *changes[0])
    return ops.Site(module.weight, module.bias, torch.cat([A for A, _ in changes]), torch.cat([B for _, B in changes], dim=1))
