"""Layouts: to which keys each token of a forward pass attends, in packs, in prefill and in decoding from a key-value cache.

Only this file and the back ends know how a tree of segments, or a key-value cache, becomes attention.

Shapes: query 1 H T K, key and value 1 G T K, with H query heads, G key-value heads, K head size; output 1 T H K.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.attention_hook import Rules, Virtual, attend, causal, holding
from trimtab.data.prefix_tree import Segment, Tree, paths_of

_longest_row: ContextVar[int] = ContextVar("longest_row", default=0)


def assume_longest_row(tokens: int) -> AbstractContextManager[None]:
    """Within the block, in this thread, rows exceed a sliding window if a row of so many tokens would, though they are shorter."""
    return holding(_longest_row, tokens)


class PackLayout:
    """A pack: a tree of segments."""

    continues = False

    def __init__(self, segments: tuple[Segment, ...], output_at: Tensor | None = None) -> None:
        """
        Args:
            output_at: The indices of M of the T tokens, whose last hidden states are needed; all of them unless given.
        """
        self.segments = segments
        self.output_at = output_at
        self.narrowed = False
        """The last layer has left out all other tokens after its attention."""
        self.reached = False
        """A layer has attended by this layout."""

    @cached_property
    def lengths(self) -> list[int]:
        return [end - start for start, end, _ in self.segments]

    @cached_property
    def paths(self) -> list[list[int]]:
        return paths_of(self.segments)

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, rules: Rules, virtual: Sequence[Virtual]
    ) -> Tensor:
        self.reached = True
        if rules.window is not None and _longest_row.get() > rules.window:
            rules = rules._replace(window=min(rules.window, -(-key.shape[2] // 2)))
        # split, rather than slicing, so that the backward pass writes each gradient once instead of summing padded ones
        queries = query.split(self.lengths, dim=2)
        # In float32 until they are joined: keys of many segments have as many gradients, which bfloat16 would sum inexactly.
        keys, values = (at_least_float32(t).split(self.lengths, dim=2) for t in (key, value))
        before = self.virtual_before(layer, at_least_float32(key), virtual)
        outputs = []
        for q, path, first in zip(queries, self.paths, before, strict=True):
            parts = ([*(f[n] for f in first), *(t[s] for s in path)] for n, t in enumerate((keys, values)))
            k, v = (_joined(part).to(q.dtype) for part in parts)
            outputs.append(attend(q, k, v, causal(q.shape[2], k.shape[2], rules.window, q.device), rules))
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def virtual_before(self, layer: nn.Module, like: Tensor, virtual: Sequence[Virtual]) -> list[list[tuple[Tensor, Tensor]]]:
        """For each segment, the keys and values of the virtual tokens before its row."""
        pairs = [(tokens.acts_on, tokens.of(layer, like)) for tokens in virtual]
        return [[pair for acts_on, pair in pairs if acts_on is None or acts_on(segment.start)] for segment in self.segments]


def at_least_float32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class Cache:
    """A key-value cache of B sequences, each of its own length, by attention layer."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # each B G capacity K
        self.lengths = torch.empty(0, dtype=torch.long)  # B, virtual tokens included: the next token's position

    def select(self, rows: Tensor) -> None:
        """Drop all sequences but these."""
        self.layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self.layers.items()}
        self.lengths = self.lengths[rows]


class PrefillLayout(PackLayout):
    """Prefill: prompts as a tree, whose keys and values go into the cache, after those of the virtual tokens before each."""

    def __init__(self, tree: Tree, cache: Cache) -> None:
        super().__init__(tree.segments)
        self.leaves = tree.leaves
        self.cache = cache

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, rules: Rules, virtual: Sequence[Virtual]
    ) -> Tensor:
        before, stored = self.virtual_before(layer, key, virtual), []
        for n, t in enumerate((key, value)):
            own = t.split(self.lengths, dim=2)
            rows = [_joined([*(f[n] for f in before[leaf]), *(own[s] for s in self.paths[leaf])]) for leaf in self.leaves]
            padded = nn.utils.rnn.pad_sequence([row[0].transpose(0, 1) for row in rows], batch_first=True)
            stored.append(padded.transpose(1, 2))
        self.cache.layers[id(layer)] = (stored[0], stored[1])
        self.cache.lengths = torch.tensor([row.shape[2] for row in rows], device=key.device)
        return super().attend(layer, query, key, value, rules, virtual)


class DecodeLayout:
    """Decoding: one new token for each of the cache's sequences. The T dimension is B."""

    continues = True
    grow_by = 64

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.reached = False
        self.longest = int(cache.lengths.max()) + 1
        self.row = torch.arange(len(cache.lengths), device=cache.lengths.device)

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, rules: Rules, virtual: Sequence[Virtual]
    ) -> Tensor:
        assert not virtual, "virtual tokens are in the cache already"
        self.reached = True
        keys, values = (self._grown(t) for t in self.cache.layers[id(layer)])
        keys[self.row, :, self.cache.lengths] = key[0].transpose(0, 1)
        values[self.row, :, self.cache.lengths] = value[0].transpose(0, 1)
        self.cache.layers[id(layer)] = (keys, values)
        at = torch.arange(self.longest, device=query.device)
        last = self.cache.lengths[:, None]
        mask = at <= last if rules.window is None else (at <= last) & (at > last - rules.window)
        out = attend(
            query[0].transpose(0, 1)[:, :, None],
            keys[:, :, : self.longest],
            values[:, :, : self.longest],
            mask[:, None, None],
            rules,
        )
        return out[:, :, 0][None]  # 1 B H K

    def _grown(self, stored: Tensor) -> Tensor:
        missing = self.longest - stored.shape[2]
        return F.pad(stored, (0, 0, 0, missing + self.grow_by)) if missing > 0 else stored

    def advance(self) -> None:
        """Count the new tokens, after every layer has stored them."""
        self.cache.lengths = self.cache.lengths + 1
