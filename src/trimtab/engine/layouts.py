"""Layouts: to which keys each token of a forward pass attends, in packs, in prefill and in decoding from a key-value cache.

Only this file and the back ends know how a tree of segments, or a key-value cache, becomes attention.

Shapes: query 1 H T K, key 1 G T K, value 1 G T V, with H query heads, G key-value heads, K head size (V of values); output 1 T H V.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.attention import AttentionCall, Rules, Virtual, at_least_float32, attend, causal, is_seen
from trimtab.core.attention_hook import holding
from trimtab.core.errors import UnsupportedModel
from trimtab.core.transfer import to_device
from trimtab.data.prefix_tree import Segment, Tree, paths_of, token_indices
from trimtab.engine import tree_attention
from trimtab.engine.backends import AttentionInputs, AttentionPlan, Heads

_longest_row: ContextVar[int] = ContextVar("longest_row", default=0)


def assume_longest_row(tokens: int) -> AbstractContextManager[None]:
    """Within the block, in this thread, rows exceed a sliding window if a row of so many tokens would, though they are shorter."""
    return holding(_longest_row, tokens)


class PackLayout:
    """A pack: a tree of segments."""

    continues = False

    def __init__(self, segments: tuple[Segment, ...], output_at: Tensor | None = None, largest_id: int | None = None) -> None:
        """
        Args:
            output_at: The indices of M of the T tokens, whose last hidden states are needed; all of them unless given.
            largest_id: Of the tokens, if known.
        """
        self.segments = segments
        self.output_at, self.largest_id = output_at, largest_id
        self.narrowed = False
        """The last layer has left out all other tokens after its attention."""
        self.reached = False
        """A layer has attended by this layout."""
        self.materialized = False
        """The model computes with its masks, so it gets them as tensors."""
        self.batches: list[Any] | None = None
        """Segments that layers which carry state go through together."""
        self._sent: dict[tuple[str, torch.device], Tensor] = {}

    @cached_property
    def lengths(self) -> list[int]:
        return [end - start for start, end, _ in self.segments]

    @cached_property
    def paths(self) -> list[list[int]]:
        return paths_of(self.segments)

    def attend(self, call: AttentionCall) -> Tensor:
        layer, query, key, value, rules, virtual, mask = call
        self.reached = True
        if mask is not None:
            if virtual:
                raise UnsupportedModel(
                    f"{type(layer).__name__} computes with its mask, which has no place for virtual tokens. "
                    "Use a method that changes weights, such as lora."
                )
            return attend(query, key, value, mask, rules).transpose(1, 2).contiguous()
        half = -(-key.shape[2] // 2)
        for name in ("window", "chunk"):
            if (size := getattr(rules, name)) is not None and _longest_row.get() > size:
                rules = rules._replace(**{name: min(size, half)})
        if not query.is_cpu and all(tokens.acts_on is None for tokens in virtual):
            return self.attend_at_once(call._replace(rules=rules))
        # split, rather than slicing, so that the backward pass writes each gradient once instead of summing padded ones
        queries = query.split(self.lengths, dim=2)
        # In float32 until they are joined: keys of many segments have as many gradients, which bfloat16 would sum inexactly.
        keys, values = (at_least_float32(t).split(self.lengths, dim=2) for t in (key, value))
        before = self.virtual_before(layer, at_least_float32(key), virtual)
        outputs = []
        for q, path, first in zip(queries, self.paths, before, strict=True):
            parts = ([*(f[n] for f in first), *(t[s] for s in path)] for n, t in enumerate((keys, values)))
            k, v = (_joined(part).to(q.dtype) for part in parts)
            outputs.append(attend(q, k, v, causal(q.shape[2], k.shape[2], rules, q.device), rules))
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()  # models may `view` it

    def attend_at_once(self, call: AttentionCall) -> Tensor:
        """By the device's own attention over trees, in few calls; values of another size than keys get zeros, which change nothing."""
        layer, query, key, value, rules, virtual, _ = call
        (H, K), (G, V) = query.shape[1::2], value.shape[1::2]
        size = -(-max(K, V) // 8) * 8  # as flash attention asks
        q, k, v = (_widened(t[0], size).transpose(0, 1).flatten(1) for t in (query, key, value))
        firsts = zip(*(tokens.of(layer, key) for tokens in virtual), strict=True)
        first_k, first_v = (_widened(_joined(list(parts))[0], size) for parts in firsts) if virtual else (None, None)
        count, scale = 0 if first_k is None else first_k.shape[1], K**-0.5 if rules.scale is None else rules.scale
        plan = AttentionPlan(
            self.segments, Heads(G, H // G, size), scale, rules.window, count, rules.chunk, softcap=rules.softcap
        )
        none = q.new_empty(len(q), 0)  # queries and keys are rotated already
        out = tree_attention.attend(AttentionInputs(q, k, v, none, none, first_k, first_v, rules.sinks), plan)
        return out.view(1, len(q), H, size)[..., :V].contiguous()

    def mask(self, rules: Rules, device: torch.device) -> Tensor:
        """Which tokens each token attends to: 1 1 T T. It takes T² memory, so only models that compute with their masks get it."""
        segment = torch.arange(len(self.segments)).repeat_interleave(torch.tensor(self.lengths))
        visible = torch.zeros(len(self.segments), len(self.segments), dtype=torch.bool)
        for number, path in enumerate(self.paths):
            visible[number, path] = True
        seen = visible[segment[:, None], segment] & is_seen(self.positions[:, None], self.positions, rules)
        return to_device(seen[None, None], device)

    @cached_property
    def positions(self) -> Tensor:
        """Of each token in its row: T."""
        starts = [sum(self.lengths[ancestor] for ancestor in path[:-1]) for path in self.paths]
        return torch.cat([torch.arange(start, start + n) for start, n in zip(starts, self.lengths, strict=True)])

    def sent(self, name: Literal["positions", "before"], device: torch.device) -> Tensor:
        """A number of each token on the device, to which it is sent once: T."""
        if (name, device) not in self._sent:
            self._sent[name, device] = to_device(getattr(self, name), device)
        return self._sent[name, device]

    @cached_property
    def ends(self) -> list[int]:
        """The segments without children: those in which rows end."""
        return sorted(set(range(len(self.segments))) - {parent for _, _, parent in self.segments})

    def row(self, end: int) -> Tensor:
        """The indices of the tokens from a row's first up to those of this segment."""
        return torch.from_numpy(token_indices(self.segments, end))

    @cached_property
    def before(self) -> Tensor:
        """The index of the token before each in its row; -1 for a row's first: T."""
        index = torch.arange(-1, sum(self.lengths) - 1)
        for start, _, parent in self.segments:
            index[start] = self.segments[parent].end - 1 if parent >= 0 else -1
        return index

    def virtual_before(self, layer: nn.Module, like: Tensor, virtual: Sequence[Virtual]) -> list[list[tuple[Tensor, Tensor]]]:
        """For each segment, the keys and values of the virtual tokens before its row."""
        pairs = [(tokens.acts_on, tokens.of(layer, like)) for tokens in virtual]
        return [[pair for acts_on, pair in pairs if acts_on is None or acts_on(segment.start)] for segment in self.segments]


def _widened(t: Tensor, size: int) -> Tensor:
    """With zeros up to this many numbers in the last dimension."""
    return t if t.shape[-1] == size else F.pad(t, (0, size - t.shape[-1]))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class LayerState:
    """What a layer that carries state keeps of B sequences, by the number of the state: what Transformers' cache would hold."""

    def __init__(self, conv: dict[int, Tensor], recurrent: dict[int, Tensor]) -> None:
        self.conv, self.recurrent = conv, recurrent

    def select(self, rows: Tensor) -> "LayerState":
        return LayerState(*({n: t[rows] for n, t in states.items()} for states in (self.conv, self.recurrent)))


class Cache:
    """A cache of B sequences, each of its own length: keys and values, and the states of layers that carry one."""

    def __init__(self) -> None:
        self.layers: dict[Any, tuple[Tensor, Tensor]] = {}  # B G capacity K and B G capacity V, by layer and call in a pass
        self.states: dict[int, LayerState] = {}  # of layers that carry state
        self.counts: list[int] = []  # B, virtual tokens included, on the host: no step asks the device for them
        self.lengths = torch.empty(0, dtype=torch.long)  # the same on the device: the next token's position
        self.token_counts = self.lengths  # B, without virtual tokens

    def set_counts(self, counts: list[int], device: torch.device) -> None:
        if counts != self.counts:
            self.counts, self.lengths = counts, to_device(counts, device)

    def select(self, rows: list[int]) -> Tensor:
        """Drop all sequences but these; returns `rows` on the device."""
        index = to_device(rows, self.lengths.device)
        self.layers = {layer: (k[index], v[index]) for layer, (k, v) in self.layers.items()}
        self.states = {layer: state.select(index) for layer, state in self.states.items()}
        self.counts = [self.counts[row] for row in rows]
        self.lengths, self.token_counts = self.lengths[index], self.token_counts[index]
        return index


class PrefillLayout(PackLayout):
    """Prefill: prompts as a tree, whose keys and values go into the cache, after those of the virtual tokens before each."""

    def __init__(self, tree: Tree, cache: Cache, device: torch.device) -> None:
        super().__init__(tree.segments)
        self.leaves = tree.leaves
        self.cache = cache
        cache.set_counts([len(self.row(leaf)) for leaf in tree.leaves], device)
        cache.token_counts = cache.lengths
        self.calls = Calls()

    def attend(self, call: AttentionCall) -> Tensor:
        before, stored = self.virtual_before(call.layer, call.key, call.virtual), []
        for n, t in enumerate((call.key, call.value)):
            own = t.split(self.lengths, dim=2)
            rows = [_joined([*(f[n] for f in before[leaf]), *(own[s] for s in self.paths[leaf])]) for leaf in self.leaves]
            padded = nn.utils.rnn.pad_sequence([row[0].transpose(0, 1) for row in rows], batch_first=True)
            stored.append(padded.transpose(1, 2))
        self.cache.layers[self.calls.count(call.layer)] = (stored[0], stored[1])
        self.cache.set_counts([row.shape[2] for row in rows], call.key.device)
        return super().attend(call)


class Calls:
    """Counts the calls of each layer's attention in a pass: some attend twice (DiffLlama), or run several times (HRM)."""

    def __init__(self) -> None:
        self.made: Counter[int] = Counter()

    def count(self, layer: nn.Module) -> tuple[int, int]:
        """What identifies this call, in every pass alike."""
        self.made[id(layer)] += 1
        return id(layer), self.made[id(layer)]


class DecodeLayout:
    """Decoding: one new token for each of the cache's sequences. The T dimension is B.

    Nothing here waits for the device. What the layers share of a step is made once: a mask for each kind of layer.
    """

    continues = True
    grow_by = 64

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.calls = Calls()
        self.reached = self.materialized = False
        self.longest = max(cache.counts) + 1
        self.row = torch.arange(len(cache.counts), device=cache.lengths.device)
        self.seen: dict[tuple[int | None, int | None], Tensor] = {}

    @cached_property
    def on_host(self) -> bool:
        return self.cache.lengths.is_cpu

    @cached_property
    def keys(self) -> int:
        """So many are read, of which some may be masked: an accelerator's kernels want multiples, and sizes that stay."""
        return self.longest if self.on_host else -(-self.longest // self.grow_by) * self.grow_by

    def attend(self, call: AttentionCall) -> Tensor:
        layer, query, key, value, rules, virtual, _ = call
        assert not virtual, "virtual tokens are in the cache already"
        self.reached = True
        which = self.calls.count(layer)
        keys, values = (self._grown(t) for t in self.cache.layers[which])
        keys[self.row, :, self.cache.lengths] = key[0].transpose(0, 1)
        values[self.row, :, self.cache.lengths] = value[0].transpose(0, 1)
        self.cache.layers[which] = (keys, values)
        one, keys, values = query[0].transpose(0, 1), keys[:, :, : self.keys], values[:, :, : self.keys]  # B H K, B G L K
        if rules.sinks is None and not self.on_host:
            # The heads of a group are queries that see the same keys, so that these are read once, and not copied for each.
            out = attend(one.unflatten(1, (keys.shape[1], -1)), keys, values, self._seen(rules), rules).flatten(1, 2)
        else:
            out = attend(one[:, :, None], keys, values, self._seen(rules), rules)[:, :, 0]
        return out[None]  # 1 B H V

    def mask(self, rules: Rules, device: torch.device) -> Tensor:
        raise UnsupportedModel("This model computes with its masks, so it cannot continue from a key-value cache.")

    def _seen(self, rules: Rules) -> Tensor:
        """Which keys each new token attends to: B 1 1 L."""
        if (size := (rules.window, rules.chunk)) not in self.seen:
            places = torch.arange(self.keys, device=self.cache.lengths.device)
            self.seen[size] = is_seen(self.cache.lengths[:, None], places, rules)[:, None, None]
        return self.seen[size]

    def _grown(self, stored: Tensor) -> Tensor:
        missing = self.keys - stored.shape[2]
        return F.pad(stored, (0, 0, 0, missing + self.grow_by)) if missing > 0 else stored

    def advance(self) -> None:
        """Count the new tokens, after every layer has stored them."""
        self.cache.counts = [count + 1 for count in self.cache.counts]
        self.cache.lengths, self.cache.token_counts = self.cache.lengths + 1, self.cache.token_counts + 1
