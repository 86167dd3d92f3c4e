"""The hook into the attention of Transformers' models.

After `install_hook`, every call of the model's attention comes here. A forward pass with the keyword argument `layout` attends as
that layout says; one with `virtual` has virtual tokens before its rows; any other calls the model's own attention, and gives
bit-identical results.

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
"""Our attention is registered as this and the name of the model's own, which it calls."""

_laid_out: ContextVar[bool] = ContextVar("laid_out", default=False)


class Rules(NamedTuple):
    """How a layer's attention differs from plain causal attention."""

    scale: float | None
    window: int | None
    """A token attends to at most this many tokens, itself included."""
    softcap: float | None
    """Scores s become softcap · tanh(s / softcap) (Gemma 2)."""


@dataclass
class Virtual:
    """Keys and values of P virtual tokens before rows, at positions 0 to P-1."""

    layers: Sequence[tuple[Tensor, Tensor]]
    """By attention layer: each G P K."""
    acts_on: Callable[[int], bool] | None = None
    """Whether the row of a token (by its index in the pack) has them; None for every row."""
    reached: set[int] = field(default_factory=set)
    """Layers that have attended to them: a model that drops keyword arguments would silently ignore them."""
    recorded: bool = field(default_factory=torch.is_grad_enabled)
    """They were made with gradients enabled."""

    def of(self, layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each 1 G P K, in the dtype of `like`."""
        number = int(layer.layer_idx)  # type: ignore[arg-type]
        self.reached.add(number)
        key, value = self.layers[number]
        if self.recorded and key.requires_grad and not torch.is_grad_enabled():
            refuse_reentrant()
        return key[None].to(like.dtype), value[None].to(like.dtype)

    def check_reached(self, name: str) -> None:
        if len(self.reached) != len(self.layers):
            raise UnsupportedModel(
                f"{name} lets {len(self.reached)} of {len(self.layers)} layers attend to virtual tokens, so prefixes and prompts "
                "would act only in part. Use a method that changes weights, such as lora."
            )


def refuse_reentrant() -> NoReturn:
    """Reentrant gradient checkpointing silently gives keyword arguments no gradient."""
    raise UnsupportedModel(
        "Virtual tokens get no gradient through reentrant gradient checkpointing. Use the other kind: "
        'model.activation_checkpointing_enable({"use_reentrant": False}).'
    )


class Layout(Protocol):
    """To which keys each token of one forward pass attends."""

    continues: bool
    """The tokens continue those of a key-value cache, which holds the virtual tokens, too."""
    reached: bool
    """A layer has attended by this layout."""

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, rules: Rules, virtual: Sequence[Virtual]
    ) -> Tensor: ...


def causal(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """The attention mask of the last `queries` of `keys` tokens; None for plain causality."""
    if queries == keys and (window is None or keys <= window):
        return None
    q = torch.arange(keys - queries, keys, device=device)[:, None]
    k = torch.arange(keys, device=device)
    return k <= q if window is None else (k <= q) & (k > q - window)


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Within the block, attention uses flash, memory-efficient or plain kernels; the process's setting is restored after it.

    cuDNN's backward pass gives NaN for some masked rows (pytorch #196678), and torch 2.11 takes it first on H100 and H200.
    """
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rules: Rules) -> Tensor:
    """Attention as B H T K. The mask is boolean, or added to the scores; None for plain causality."""
    grouped = query.shape[1] != key.shape[1]
    if rules.softcap is None:
        with without_cudnn():
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=rules.scale, enable_gqa=grouped
            )
    if grouped:
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * (rules.scale if rules.scale is not None else query.shape[-1] ** -0.5)
    scores = rules.softcap * torch.tanh(scores / rules.softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1) @ value


_HARMLESS = {"position_ids", "cache_position", "position_embeddings", "num_items_in_batch"}
"""Tensors that models pass to attention functions, which do not need them; the last is Trainer's, for the loss."""


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
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    if layout is None and not virtual:
        return _own_attention(own, module)(module, query, key, value, attention_mask, **options)
    rules = _rules(module, **options)
    if layout is not None:
        return layout.attend(module, query, key, value, rules, virtual), None
    return _attend_after_virtual(module, query, key, value, attention_mask, rules, virtual, own), None


def _rules(
    module: nn.Module,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> Rules:
    unknown = [name for name, value in options.items() if isinstance(value, Tensor) and name not in _HARMLESS]
    if unknown or dropout or not getattr(module, "is_causal", True):
        reason = f"the tensor {unknown[0]}" if unknown else "attention dropout" if dropout else "attention to later tokens"
        raise UnsupportedModel(
            f"{type(module).__name__} asks attention for {reason}, which Trimtab's packed attention does not support."
        )
    return Rules(scaling, sliding_window, softcap)


def _own_attention(own: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if own == "eager":  # not registered: each model's file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[own]


def _attend_after_virtual(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    rules: Rules,
    virtual: Sequence[Virtual],
    own: str,
) -> Tensor:
    """Attention of rows as Transformers batches them, padded and with its cache, after virtual tokens."""
    if own not in ("sdpa", "eager"):
        raise UnsupportedModel(
            f"Virtual tokens do not work with {own} outside Trimtab's own forward pass. "
            'Load the model with attn_implementation="sdpa".'
        )
    for tokens in virtual:
        k, v = (t.expand(len(key), -1, -1, -1) for t in tokens.of(module, key))
        key, value = torch.cat([k, key], dim=2), torch.cat([v, value], dim=2)
        mask = None if mask is None else F.pad(mask, (k.shape[2], 0), value=True if mask.dtype == torch.bool else 0.0)
    if rules.window is not None and key.shape[2] > rules.window:
        raise UnsupportedModel(
            f"Rows of {key.shape[2]:,} tokens, virtual ones included, exceed the sliding window of {type(module).__name__} "
            f"({rules.window:,}), which only Trimtab's own forward pass counts correctly: use trimtab.generate and trimtab.fit."
        )
    if mask is None:
        mask = causal(query.shape[2], key.shape[2], None, query.device)
    return attend(query, key, value, mask, rules).transpose(1, 2)


def _mask(*args: Any, own: str, **kwargs: Any) -> Any:
    """The mask of the model's own attention; none where a layout says to which keys tokens attend."""
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
    """The forward pass within the block has a layout, so that the model builds no mask."""
    return holding(_laid_out, True)


def install_hook(model: nn.Module) -> None:
    """Route every call of this model's attention through here. Nothing changes for calls without a layout or virtual tokens."""
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
    """Undo `install_hook`, and remove patched forward passes."""
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "is_patch", False):
            del module.forward
    for config in _configs(model):
        if (config._attn_implementation or "").startswith(PREFIX):
            config._attn_implementation = config._attn_implementation.removeprefix(PREFIX)


def _configs(model: nn.Module) -> list[Any]:
    if not getattr(model, "_supports_attention_backend", False):
        return []  # its code supports only its own implementations, and replaces any other silently
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return [config for config in configs.values() if hasattr(config, "_attn_implementation")]
