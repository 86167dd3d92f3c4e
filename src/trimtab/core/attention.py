"""Attention: the rules by which a layer's differs from plain causal attention, virtual tokens, and attention by these rules.

Shapes: query B H T K, key B G T K, value B G T V, with H query heads, G key-value heads, K head size (V of values); output B H T V.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.errors import UnsupportedModel


@dataclass(frozen=True)
class LocalMask:
    """What a layer gets as its mask in a pass with a layout, if the mask would be local: the size says all of it."""

    window: int | None = None
    """See `Rules`."""
    chunk: int | None = None

    def __getitem__(self, index: tuple[slice, ...]) -> "LocalMask":
        """All of it: some models index their masks, to leave out tokens in passes that need only the last ones."""
        if all(isinstance(part, slice) and not part.start and part.stop is None for part in index):
            return self
        raise UnsupportedModel("The model cuts its masks, which a pass with a layout has none of.")


class Rules(NamedTuple):
    """How a layer's attention differs from plain causal attention."""

    scale: float | None
    window: int | None = None
    """A token attends to at most this many tokens, itself included."""
    softcap: float | None = None
    """Scores s become softcap · tanh(s / softcap) (Gemma 2)."""
    chunk: int | None = None
    """A row is cut into chunks of this many tokens, and a token attends to its own alone (Llama 4)."""
    sinks: Tensor | None = None
    """H logits that take part in each softmax, and that no value belongs to (GPT-OSS)."""


@dataclass
class Virtual:
    """Keys and values of P virtual tokens before rows, at positions 0 to P-1."""

    layers: Mapping[int, tuple[Tensor, Tensor]]
    """By the number of the layer: G P K and G P V."""
    acts_on: Callable[[int], bool] | None = None
    """Whether the row of a token (by its index in the pack) has them; None for every row."""
    reached: set[int] = field(default_factory=set)
    """Layers that have attended to them: a model that drops keyword arguments would silently ignore them."""
    recorded: bool = field(default_factory=torch.is_grad_enabled)
    """They were made with gradients enabled."""

    def of(self, layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, 1 G P K and 1 G P V, in the dtype of `like`."""
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


class AttentionCall(NamedTuple):
    """One call of a layer's attention in a pass with a layout."""

    layer: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    rules: Rules
    virtual: Sequence[Virtual] = ()
    mask: Tensor | None = None
    """What the model made of the mask that it got from the layout: it says all, the virtual tokens aside."""


class Layout(Protocol):
    """To which keys each token of one forward pass attends."""

    continues: bool
    """The tokens continue those of a key-value cache, which holds the virtual tokens, too."""
    reached: bool
    """A layer has attended by this layout."""
    materialized: bool
    """The model computes with its masks, so it gets them as tensors."""

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention as B T H V."""

    def mask(self, rules: Rules, device: torch.device) -> Tensor:
        """Which tokens each token attends to: 1 1 T T."""


def causal(queries: int, keys: int, rules: Rules, device: torch.device) -> Tensor | None:
    """The attention mask of the last `queries` of `keys` tokens; None for plain causality."""
    local = [size for size in (rules.window, rules.chunk) if size is not None]
    if queries == keys and all(keys <= size for size in local):
        return None
    q = torch.arange(keys - queries, keys, device=device)[:, None]
    return is_seen(q, torch.arange(keys, device=device), rules)


def is_seen(q: Tensor, k: Tensor, rules: Rules) -> Tensor:
    """Whether the token at position q of a row attends to the one at position k."""
    seen = k <= q
    if rules.window is not None:
        seen &= k > q - rules.window
    if rules.chunk is not None:
        seen &= k // rules.chunk == q // rules.chunk
    return seen


def at_least_float32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


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
    grouped, plain = query.shape[1] != key.shape[1], rules.softcap is None and rules.sinks is None
    if grouped and not (plain and query.is_cpu):  # elsewhere, few kernels take groups, and the others keep all scores
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
        grouped = False
    if plain:
        with without_cudnn():
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=rules.scale, enable_gqa=grouped
            )
    scores = at_least_float32(query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if rules.scale is None else rules.scale)
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if rules.sinks is None:
        return scores.softmax(dim=-1).to(value.dtype) @ value
    sinks = rules.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1].to(value.dtype) @ value
