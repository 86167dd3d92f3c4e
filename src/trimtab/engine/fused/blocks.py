"""Decoder layers by hand, on the model's own modules: the families that Transformers writes alike, without its passes over memory.

A layer that is known stands in for its own forward pass in packed passes alone; every other pass is the model's own, which
is what tests, and the check before every run, compare with. Within a layer, each part is done by hand where that computes
the same (frozen norms, matrices with low-rank changes), and by its module where not.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.attention import Virtual
from trimtab.engine.fused import ops
from trimtab.engine.fused.kernels import Gate
from trimtab.engine.fused.tree_attention import Sizes, attend, pieces
from trimtab.engine.layouts import PackLayout
from trimtab.methods import AdapterLayer, Routing

PRE_NORM = {"Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Granite"}
"""Families whose layers are x + attention(norm(x)), then x + mlp(norm(x))."""
SANDWICH = {"Gemma2", "Gemma3"}
"""Families that norm what attention and the MLP give, too."""
WINDOW_OF_MODEL = {"Mistral", "Phi3"}
"""Families whose sliding window the configuration says; in others that have one, each layer does."""
GATES: dict[str, Gate] = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh"}

_by_hand: ContextVar[bool] = ContextVar("by_hand", default=True)
_inside: ContextVar[bool] = ContextVar("inside", default=False)
"""What runs is called by a layer by hand."""


@contextmanager
def unfused() -> Iterator[None]:
    """Packed passes within the block, in this thread, are the model's own code but for attention: the reference."""
    token = _by_hand.set(False)
    try:
        yield
    finally:
        _by_hand.reset(token)


def fuse(model: nn.Module) -> None:
    """Let each layer that is known stand in for its own forward pass, where a pass has a PackLayout. `unheed` undoes it."""
    for module in model.modules():
        for part, stand_in in (("DecoderLayer", StandIn), ("MLP", MLPStandIn)):
            if _family(module, part) in PRE_NORM | SANDWICH and "forward" not in module.__dict__:
                module.forward = stand_in(module)


def _family(module: nn.Module, part: str) -> str | None:
    """Whose decoder layer, attention, … of Transformers this is."""
    kind = type(module)
    known = kind.__module__.startswith("transformers.models.") and kind.__name__.endswith(part)
    return kind.__name__.removesuffix(part) if known else None


class StandIn:
    """A decoder layer's forward pass."""

    stands_in = True

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        plain = type(kwargs.get("layout")) is PackLayout and not args and hidden_states.shape[0] == 1 and hidden_states.is_cpu
        if not plain or not _by_hand.get() or hidden_states.dtype not in (torch.float32, torch.float64) or _watched(layer):
            return type(layer).forward(layer, hidden_states, *args, **kwargs)
        run = partial(_layer, layer, kwargs=kwargs)
        if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():  # as Transformers' own class does
            return layer._gradient_checkpointing_func(run, hidden_states)
        return run(hidden_states)


class MLPStandIn:
    """An MLP's forward pass, for an adapter around it that is called by a layer by hand."""

    stands_in = True

    def __init__(self, mlp: Any) -> None:
        self.mlp = mlp

    def __call__(self, x: Tensor) -> Tensor:
        if not _inside.get() or (gate := _gate(self.mlp)) is None:
            return type(self.mlp).forward(self.mlp, x)
        g, u = _gate_and_up(x[0], None, self.mlp)
        return _through(None, g, self.mlp.down_proj, None, 1.0, gated=(u, gate))[None]


def _watched(layer: nn.Module) -> bool:
    """Somebody has put a hook, or a forward pass of their own, on a module inside."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(
        any(getattr(module, kind) for kind in hooks)
        or not getattr(module.__dict__.get("forward", MLPStandIn), "stands_in", False)
        for module in layer.modules()
    )


def _layer(layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """1 T d -> 1 T d."""
    scale = getattr(layer, "residual_multiplier", 1.0)  # Granite
    between, inner, end = None, layer.post_attention_layernorm, None
    if _family(layer, "DecoderLayer") in SANDWICH:
        between, inner, end = inner, layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm
    x = _attention(hidden[0], layer.input_layernorm, layer.self_attn, between, scale, kwargs)
    return _mlp(x, inner, layer.mlp, end, scale)[None]


def _attention(x: Tensor, before: nn.Module, module: nn.Module, after: nn.Module | None, scale: float, kwargs: Any) -> Tensor:
    """x + scale · after(attention(before(x))): T d."""
    attention: Any = _acting(module)
    virtual: Sequence[Virtual] = kwargs.get("virtual", ())
    cos, sin = (t[0].contiguous() for t in kwargs["position_embeddings"])
    if not _is_plain(attention, cos, virtual):
        return _added(x, module(hidden_states=_normed(x, before)[None], **kwargs)[0][0], after, scale)
    kwargs["layout"].reached = True
    heads, size = attention.config.num_attention_heads, attention.head_dim
    groups = attention.config.num_key_value_heads
    if hasattr(attention, "qkv_proj"):  # Phi-3
        q, k, v = _linears(x, before, [attention.qkv_proj], [heads * size, groups * size, groups * size])
    else:
        q, k, v = _linears(x, before, [attention.q_proj, attention.k_proj, attention.v_proj])
    if hasattr(attention, "q_norm"):  # Qwen3, Gemma 3
        q, k = (_normed_heads(t, size, how) for t, how in ((q, attention.q_norm), (k, attention.k_norm)))
    holder = attention.config if _family(attention, "Attention") in WINDOW_OF_MODEL else attention
    first = virtual[0].of(attention, x) if virtual else None
    plan = pieces(
        kwargs["layout"].segments, first[0].shape[2] if first else 0, getattr(holder, "sliding_window", None), x.dtype
    )
    out = attend(
        q,
        k,
        v,
        cos,
        sin,
        plan,
        Sizes(groups, heads // groups, size),
        attention.scaling,
        (first[0][0], first[1][0]) if first else None,
    )
    return _through(x, out, attention.o_proj, after, scale)


def _is_plain(attention: Any, cos: Tensor, virtual: Sequence[Virtual]) -> bool:
    """Attention as `tree_attention` does it."""
    return (
        _family(attention, "Attention") in PRE_NORM | SANDWICH
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
        token = _inside.set(True)
        try:
            return _added(x, module(_normed(x, before)[None])[0], after, scale)
        finally:
            _inside.reset(token)
    g, u = _gate_and_up(x, before, mlp)
    return _through(x, g, mlp.down_proj, after, scale, gated=(u, gate))


def _gate(mlp: Any) -> Gate | None:
    """The gate of an MLP that is known."""
    known = _family(mlp, "MLP") in PRE_NORM | SANDWICH
    return GATES.get(type(getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))).__name__) if known else None


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
    """A norm whose weight is frozen, if it is one that is known."""
    own: Any = _acting(module)
    if (family := _family(own, "RMSNorm")) not in PRE_NORM | SANDWICH or own.weight.requires_grad:
        return None
    if family in SANDWICH:
        return ops.Norm(own.weight, 1.0, own.eps)
    return ops.Norm(own.weight, 0.0, own.variance_epsilon)


def _linears(
    x: Tensor, before: nn.Module | None, modules: Sequence[nn.Module], cut: Sequence[int] | None = None
) -> Sequence[Tensor]:
    """What each of the modules makes of before(x); or one's, cut into columns of these widths. Nobody else holds them."""
    sites = [site for module in modules if (site := _site(module)) is not None]
    how = _norm(before) if before is not None else None
    if before is not None and (how is None or len(sites) < len(modules)):
        x, how = _normed(x, before), None
    if len(sites) == len(modules):
        return ops.linears(x, how, sites, cut or [len(site.weight) for site in sites])
    made = [module(x[None])[0].clone() for module in modules]  # the module may need what it gave
    return made if cut is None else made[0].split(list(cut), dim=1)


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
