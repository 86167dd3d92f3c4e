"""The one door into the attention of Transformers' models.

Once `install_hook` has been called for a model, every call of its attention comes here. A forward pass with the keyword `layout`
attends as that layout says; one with `virtual` sees virtual tokens before its rows; any other goes on to the model's own
attention and is what it was, to the last bit.

Shapes: query B H T K, key and value B G T K, with H query heads, G key-value heads, K head size; output B T H K.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.errors import UnsupportedModel

PREFIX = "trimtab-"
"""Our attention is registered as this and the name of the model's own, which it hands on to."""

_laid_out: ContextVar[bool] = ContextVar("laid_out", default=False)


class Rules(NamedTuple):
    """What a layer asks of its attention besides causality."""

    scale: float | None
    window: int | None
    """A token sees at most this many tokens, itself among them."""
    softcap: float | None
    """Scores s become softcap · tanh(s / softcap) (Gemma 2)."""


@dataclass
class Virtual:
    """P virtual tokens before rows, at positions 0 to P-1: what attention sees of them."""

    layers: Sequence[tuple[Tensor, Tensor]]
    """Keys and values by the number of the attention layer: each G P K."""
    acts_on: Callable[[int], bool] | None = None
    """Whether the row of a token (by its number in the pack) has them; None for every row."""
    seen: set[int] = field(default_factory=set)
    """Layers that have attended to them: a model that drops keywords on the way would silently do without."""
    recorded: bool = field(default_factory=torch.is_grad_enabled)
    """They were made where gradients are wanted."""

    def of(self, layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each 1 G P K, in the number type of `like`."""
        number = int(layer.layer_idx)  # type: ignore[arg-type]
        self.seen.add(number)
        key, value = self.layers[number]
        if self.recorded and key.requires_grad and not torch.is_grad_enabled():
            refuse_reentrant()
        return key[None].to(like.dtype), value[None].to(like.dtype)

    def check_seen(self, name: str) -> None:
        if len(self.seen) != len(self.layers):
            raise UnsupportedModel(
                f"{name} let {len(self.seen)} of {len(self.layers)} layers attend to virtual tokens, so prefixes and prompts "
                "would act in part only. Use a method that changes weights, such as lora."
            )


def refuse_reentrant() -> NoReturn:
    """What reaches attention as a keyword gets no gradient from it, silently, where activations are recomputed the old way."""
    raise UnsupportedModel(
        "Virtual tokens get no gradient through gradient checkpointing of the reentrant kind. Ask for the other: "
        'model.activation_checkpointing_enable({"use_reentrant": False}).'
    )


class Layout(Protocol):
    """How the tokens of one forward pass lie, and what each of them sees."""

    continues: bool
    """The tokens go on from a cache, which has what stands before them already, virtual tokens included."""
    reached: bool
    """A layer has attended by this layout."""

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, rules: Rules, virtual: Sequence[Virtual]
    ) -> Tensor: ...


def causal(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """What the last `queries` of `keys` tokens see; None for plain causality."""
    if queries == keys and (window is None or keys <= window):
        return None
    q = torch.arange(keys - queries, keys, device=device)[:, None]
    k = torch.arange(keys, device=device)
    return k <= q if window is None else (k <= q) & (k > q - window)


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Within the block, attention is computed by flash, memory-efficient or plain kernels; the process's setting stays as it was.

    cuDNN's backward pass gives NaN for some masked rows (pytorch #196678), and torch 2.11 takes it first on H100 and H200.
    """
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, rules: Rules) -> Tensor:
    """Attention as B H T K. `seen` is a mask (bool, or to be added to the scores), or None for plain causality."""
    grouped = query.shape[1] != key.shape[1]
    if rules.softcap is None:
        with without_cudnn():
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=seen, is_causal=seen is None, scale=rules.scale, enable_gqa=grouped
            )
    if grouped:
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * (rules.scale if rules.scale is not None else query.shape[-1] ** -0.5)
    scores = rules.softcap * torch.tanh(scores / rules.softcap)
    if seen is None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else scores + seen
    return scores.softmax(dim=-1) @ value


_HARMLESS = {"position_ids", "cache_position", "position_embeddings", "num_items_in_batch"}
"""Tensors that models hand on to attention functions, of which none needs them; the last one is Trainer's, for the loss."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    own: str,
    layout: Layout | None = None,
    virtual: Sequence[Virtual] = (),
    **asked: Any,
) -> tuple[Tensor, Tensor | None]:
    if layout is None and not virtual:
        return _own_attention(own, module)(module, query, key, value, attention_mask, **asked)
    rules = _rules(module, **asked)
    if layout is not None:
        return layout.attend(module, query, key, value, rules, virtual), None
    return _after_virtual(module, query, key, value, attention_mask, rules, virtual, own), None


def _rules(
    module: nn.Module,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> Rules:
    unknown = [name for name, value in others.items() if isinstance(value, Tensor) and name not in _HARMLESS]
    if unknown or dropout or not getattr(module, "is_causal", True):
        reason = f"the tensor {unknown[0]}" if unknown else "attention dropout" if dropout else "attention to later tokens"
        raise UnsupportedModel(
            f"{type(module).__name__} asks attention for {reason}, which Trimtab's packed attention does not do."
        )
    return Rules(scaling, sliding_window, softcap)


def _own_attention(own: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if own == "eager":  # not registered: each model's file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[own]


def _after_virtual(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    rules: Rules,
    virtual: Sequence[Virtual],
    own: str,
) -> Tensor:
    """Rows as Transformers lays them out, padded and with its cache, after virtual tokens."""
    if own not in ("sdpa", "eager"):
        raise UnsupportedModel(
            f"Virtual tokens cannot be joined to {own} outside Trimtab's own forward pass. "
            'Load the model with attn_implementation="sdpa".'
        )
    for one in virtual:
        k, v = (t.expand(len(key), -1, -1, -1) for t in one.of(module, key))
        key, value = torch.cat([k, key], dim=2), torch.cat([v, value], dim=2)
        mask = None if mask is None else F.pad(mask, (k.shape[2], 0), value=True if mask.dtype == torch.bool else 0.0)
    if rules.window is not None and key.shape[2] > rules.window:
        raise UnsupportedModel(
            f"Rows of {key.shape[2]:,} tokens, virtual ones included, exceed the sliding window of {type(module).__name__} "
            f"({rules.window:,}), which only Trimtab's own forward pass counts rightly: use trimtab.generate and trimtab.fit."
        )
    if mask is None:
        mask = causal(query.shape[2], key.shape[2], None, query.device)
    return attend(query, key, value, mask, rules).transpose(1, 2)


def _mask(*args: Any, own: str, **kwargs: Any) -> Any:
    """A layout says itself what is seen; else the mask that the model's own attention wants."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    if _laid_out.get() or own not in ALL_MASK_ATTENTION_FUNCTIONS:
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[own](*args, **kwargs)


@contextmanager
def holding(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """The context variable has this value within the block, in this thread."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def laid_out() -> AbstractContextManager[None]:
    """The forward pass within the block has a layout, so the model need not build a mask."""
    return holding(_laid_out, True)


def install_hook(model: nn.Module) -> None:
    """Lead every call of this model's attention through here. Nothing changes for calls without a layout or virtual tokens."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    for config in _configs(model):
        own = config._attn_implementation
        if own is None or own.startswith(PREFIX):
            continue
        AttentionInterface.register(PREFIX + own, partial(_attention, own=own))
        AttentionMaskInterface.register(PREFIX + own, partial(_mask, own=own))
        config._attn_implementation = PREFIX + own


def remove_hook(model: nn.Module) -> None:
    """Undo `install_hook`, and take away what stands in for layers' own forward passes."""
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "is_patch", False):
            del module.forward
    for config in _configs(model):
        if (config._attn_implementation or "").startswith(PREFIX):
            config._attn_implementation = config._attn_implementation.removeprefix(PREFIX)


def _configs(model: nn.Module) -> list[Any]:
    if not getattr(model, "_supports_attention_backend", False):
        return []  # its code knows the names of its own implementations alone, and takes another for any that it doesn't
    found: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return [config for config in found.values() if hasattr(config, "_attn_implementation")]
