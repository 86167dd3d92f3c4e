"""Attention over packs and caches, given to any Transformers model through its attention interface.

The layout of a micro-batch travels through the model's forward as the keyword `layout`; the registered function asks it
to attend. This is the only code that knows how a tree of segments, or a cache of earlier keys, becomes attention.

Shapes: query 1 H T K, key and value 1 G T K, with H query heads, G key-value heads, K head size; output 1 T H K.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from trimtab.data.pack import Segment
from trimtab.errors import UnsupportedModel

NAME = "trimtab"
"""What the attention is registered as."""


class Rules(NamedTuple):
    """What a layer asks of its attention besides causality."""

    scale: float | None
    window: int | None
    """A token sees at most this many tokens, itself among them."""
    softcap: float | None
    """Scores s become softcap · tanh(s / softcap) (Gemma 2)."""


class Layout(Protocol):
    """How the tokens of one forward pass lie, and what each of them sees."""

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor: ...


class PackLayout:
    """A tree of segments."""

    def __init__(self, segments: tuple[Segment, ...]) -> None:
        self.segments = segments

    @cached_property
    def lengths(self) -> list[int]:
        return [end - start for start, end, _ in self.segments]

    @cached_property
    def paths(self) -> list[list[int]]:
        """Each segment's ancestors, from the root, and itself."""
        paths: list[list[int]] = []
        for number, segment in enumerate(self.segments):
            paths.append([*(paths[segment.parent] if segment.parent >= 0 else []), number])
        return paths

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        # split, rather than slicing, so that the backward pass writes each gradient once instead of summing padded ones
        queries, keys, values = (t.split(self.lengths, dim=2) for t in (query, key, value))
        outputs = []
        for q, path in zip(queries, self.paths, strict=True):
            k = keys[path[0]] if len(path) == 1 else torch.cat([keys[s] for s in path], dim=2)
            v = values[path[0]] if len(path) == 1 else torch.cat([values[s] for s in path], dim=2)
            outputs.append(_attend(q, k, v, _causal(q.shape[2], k.shape[2], rules.window, q.device), rules))
        return torch.cat(outputs, dim=2).transpose(1, 2)


class Cache:
    """The keys and values of B sequences, each of its own length, by attention layer."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # each B G capacity K
        self.lengths = torch.empty(0, dtype=torch.long)  # B

    def keep(self, rows: Tensor) -> None:
        """Forget all sequences but these."""
        self.layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self.layers.items()}
        self.lengths = self.lengths[rows]


class PrefillLayout(PackLayout):
    """Prompts side by side, whose keys and values are kept."""

    def __init__(self, segments: tuple[Segment, ...], cache: Cache, device: torch.device) -> None:
        super().__init__(segments)
        self.cache = cache
        cache.lengths = torch.tensor(self.lengths, device=device)

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        padded = [
            nn.utils.rnn.pad_sequence([p[0].transpose(0, 1) for p in t.split(self.lengths, dim=2)], batch_first=True).transpose(
                1, 2
            )
            for t in (key, value)
        ]
        self.cache.layers[id(layer)] = (padded[0], padded[1])
        return super().attend(layer, query, key, value, rules)


class DecodeLayout:
    """One new token for each of the cache's sequences. B stands where T stands elsewhere."""

    grow_by = 64

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.longest = int(cache.lengths.max()) + 1
        self.row = torch.arange(len(cache.lengths), device=cache.lengths.device)

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        keys, values = (self._room(t) for t in self.cache.layers[id(layer)])
        keys[self.row, :, self.cache.lengths] = key[0].transpose(0, 1)
        values[self.row, :, self.cache.lengths] = value[0].transpose(0, 1)
        self.cache.layers[id(layer)] = (keys, values)
        at = torch.arange(self.longest, device=query.device)
        last = self.cache.lengths[:, None]
        seen = at <= last if rules.window is None else (at <= last) & (at > last - rules.window)
        out = _attend(
            query[0].transpose(0, 1)[:, :, None],
            keys[:, :, : self.longest],
            values[:, :, : self.longest],
            seen[:, None, None],
            rules,
        )
        return out[:, :, 0][None]  # 1 B H K

    def _room(self, stored: Tensor) -> Tensor:
        missing = self.longest - stored.shape[2]
        return F.pad(stored, (0, 0, 0, missing + self.grow_by)) if missing > 0 else stored

    def advance(self) -> None:
        """Count the new tokens as seen, after every layer has stored them."""
        self.cache.lengths = self.cache.lengths + 1


def _causal(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """What the last `queries` of `keys` tokens see; None for plain causality."""
    if queries == keys and (window is None or keys <= window):
        return None
    q = torch.arange(keys - queries, keys, device=device)[:, None]
    k = torch.arange(keys, device=device)
    return k <= q if window is None else (k <= q) & (k > q - window)


def _attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, rules: Rules) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    if rules.softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, is_causal=seen is None, scale=rules.scale, enable_gqa=grouped
        )
    if grouped:
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * (rules.scale if rules.scale is not None else query.shape[-1] ** -0.5)
    scores = rules.softcap * torch.tanh(scores / rules.softcap)
    if seen is None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~seen, float("-inf")).softmax(dim=-1) @ value


_HARMLESS = {"position_ids", "cache_position", "position_embeddings"}
"""Tensors that models hand on to attention functions, of which none needs them."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    name = type(module).__name__
    if layout is None:
        raise UnsupportedModel(f"{name} does not hand keywords of forward on to attention, so rows cannot be packed.")
    unknown = [key for key, value in others.items() if isinstance(value, Tensor) and key not in _HARMLESS]
    if unknown or dropout or not getattr(module, "is_causal", True):
        reason = f"the tensor {unknown[0]}" if unknown else "attention dropout" if dropout else "attention to later tokens"
        raise UnsupportedModel(f"{name} asks attention for {reason}, which Trimtab's packed attention does not do.")
    return layout.attend(module, query, key, value, Rules(scaling, sliding_window, softcap)), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The layout says what is seen, so the model need not build a mask."""


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _no_mask)


@contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Use this attention within the block; the model's own is back afterwards."""
    configs: Iterable[Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs]
    try:
        for config, _ in before:
            config._attn_implementation = NAME
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
