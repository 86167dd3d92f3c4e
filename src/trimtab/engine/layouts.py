"""How tokens lie in a forward pass, and what each sees: packs of rows, prompts being kept, tokens that go on from a cache.

This is the only code that knows how a tree of segments, or a cache of earlier keys, becomes attention.

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

_longest: ContextVar[int] = ContextVar("longest", default=0)


def standing_for(longest: int) -> AbstractContextManager[None]:
    """Short rows within the block, in this thread, stand for rows of up to so many tokens: if those exceed a window, so do these."""
    return holding(_longest, longest)


class PackLayout:
    """A tree of segments."""

    continues = False

    def __init__(self, segments: tuple[Segment, ...], output_at: Tensor | None = None) -> None:
        """
        Args:
            output_at: M of the T tokens, whose last hidden states are needed; all of them unless given.
        """
        self.segments = segments
        self.output_at = output_at
        self.narrowed = False
        """The last layer has gone on with those alone, after its attention."""
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
        if rules.window is not None and _longest.get() > rules.window:
            rules = rules._replace(window=min(rules.window, -(-key.shape[2] // 2)))
        # split, rather than slicing, so that the backward pass writes each gradient once instead of summing padded ones
        queries = query.split(self.lengths, dim=2)
        # In float32 until they are joined: what many segments see has as many gradients, which bfloat16 would add up wrongly.
        keys, values = (_wide(t).split(self.lengths, dim=2) for t in (key, value))
        before = self.before(layer, _wide(key), virtual)
        outputs = []
        for q, path, first in zip(queries, self.paths, before, strict=True):
            parts = ([*(f[n] for f in first), *(t[s] for s in path)] for n, t in enumerate((keys, values)))
            k, v = (_joined(some).to(q.dtype) for some in parts)
            outputs.append(attend(q, k, v, causal(q.shape[2], k.shape[2], rules.window, q.device), rules))
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def before(self, layer: nn.Module, like: Tensor, virtual: Sequence[Virtual]) -> list[list[tuple[Tensor, Tensor]]]:
        """For each segment, the keys and values of the virtual tokens before its row."""
        found = [(one, one.of(layer, like)) for one in virtual]
        return [[both for one, both in found if one.acts_on is None or one.acts_on(segment.start)] for segment in self.segments]


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class Cache:
    """The keys and values of B sequences, each of its own length, by attention layer."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # each B G capacity K
        self.lengths = torch.empty(0, dtype=torch.long)  # B, virtual tokens included: a next token's position

    def keep(self, rows: Tensor) -> None:
        """Forget all sequences but these."""
        self.layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self.layers.items()}
        self.lengths = self.lengths[rows]


class PrefillLayout(PackLayout):
    """Prompts as a tree, whose keys and values are kept for each, with those of the virtual tokens before it."""

    def __init__(self, tree: Tree, cache: Cache) -> None:
        super().__init__(tree.segments)
        self.leaves = tree.leaves
        self.cache = cache

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, rules: Rules, virtual: Sequence[Virtual]
    ) -> Tensor:
        before, kept = self.before(layer, key, virtual), []
        for n, t in enumerate((key, value)):
            own = t.split(self.lengths, dim=2)
            rows = [_joined([*(f[n] for f in before[leaf]), *(own[s] for s in self.paths[leaf])]) for leaf in self.leaves]
            padded = nn.utils.rnn.pad_sequence([row[0].transpose(0, 1) for row in rows], batch_first=True)
            kept.append(padded.transpose(1, 2))
        self.cache.layers[id(layer)] = (kept[0], kept[1])
        self.cache.lengths = torch.tensor([row.shape[2] for row in rows], device=key.device)
        return super().attend(layer, query, key, value, rules, virtual)


class DecodeLayout:
    """One new token for each of the cache's sequences. B stands where T stands elsewhere."""

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
        keys, values = (self._room(t) for t in self.cache.layers[id(layer)])
        keys[self.row, :, self.cache.lengths] = key[0].transpose(0, 1)
        values[self.row, :, self.cache.lengths] = value[0].transpose(0, 1)
        self.cache.layers[id(layer)] = (keys, values)
        at = torch.arange(self.longest, device=query.device)
        last = self.cache.lengths[:, None]
        seen = at <= last if rules.window is None else (at <= last) & (at > last - rules.window)
        out = attend(
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
