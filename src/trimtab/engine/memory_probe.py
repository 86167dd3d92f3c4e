"""The memory that a pack takes, measured on three short rows of random tokens, whose tensors are counted as they are made and freed.

So it is on a CPU, whose malloc tells no peak, and on accelerators that don't either; on others see `memory_trial`.

A row of n tokens takes c + a·n + b·n² bytes: a for each token, b where attention saves a number for each pair of them, c for
copies of weights. Three rows determine a, b and c.
"""

import math
import random
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.core.process import gc_paused
from trimtab.core.processes import processes
from trimtab.core.randomness import seeded
from trimtab.core.wrapping import is_divided, whole_shape
from trimtab.data.example import TokenRow
from trimtab.data.pack import Pack, pack_flat
from trimtab.engine import head
from trimtab.engine.arena import free_scratch
from trimtab.engine.forward import one_thread, prepare, states_at
from trimtab.engine.layouts import assume_longest_row
from trimtab.engine.patching import layers_of
from trimtab.engine.recompute import Level, recomputing
from trimtab.methods import adapters

GATHERED = 3
"""Layers that are held whole at a time where processes share them: the one that computes, and its neighbours."""
LENGTHS = {"cpu": (8, 16, 32)}
LONGER = (32, 64, 128)
"""On an accelerator, where attention pads rows to multiples of 32."""


class MemoryCost(NamedTuple):
    """Bytes that a pack takes, as a function of its size."""

    fixed: float
    per_token: float
    per_pair: float = 0.0
    """Of a token and one that it attends to: a row of n tokens has n²."""

    def bytes_of(self, tokens: float, pairs: float) -> float:
        return self.fixed + self.per_token * tokens + self.per_pair * pairs

    def plus(self, other: "MemoryCost") -> "MemoryCost":
        return MemoryCost(*(a + b for a, b in zip(self, other, strict=True)))


class MemoryProfile(NamedTuple):
    """The memory of a pack, from the start of its forward pass to the end of its backward pass."""

    activations: MemoryCost
    """Saved in the forward pass for the backward pass."""
    moments: NDArray[np.float64]
    """All that is held, at each moment at which a tensor is made or freed: a line each, as in `MemoryCost`."""

    def peak_cost(self, tokens: float, pairs: float) -> MemoryCost:
        """At the moment at which a pack of this size takes most."""
        held = self.moments @ np.array([1.0, tokens, pairs])
        return MemoryCost(*map(float, self.moments[held.argmax()]))

    def peak_bytes(self, tokens: float, pairs: float) -> float:
        return self.peak_cost(tokens, pairs).bytes_of(tokens, pairs)


def left_beside_gathered(model: Any, free: float) -> float:
    """Of the free memory, what training may take: the same in all processes that share layers, which hold a few of those whole at a time."""
    if not processes.equal_passes:
        return free
    sizes = (
        sum(
            math.prod(whole_shape(p)) * p.itemsize
            for p in layer.parameters()
            if p.requires_grad is trained and (not trained or is_divided(p))
        )
        for layer in layers_of(model)
        for trained in (False, True)
    )
    return float(min(processes.tell(free))) - GATHERED * max(sizes, default=0.0)


class CountedPacks(NamedTuple):
    """The measure of the devices whose tensors are counted (see `memory_plan.Measure`)."""

    model: Any
    share: float = 0.9

    @property
    def most(self) -> int:
        return 1024 if next(self.model.parameters()).is_cpu else 4096  # a CPU's: see docs/performance.md

    def enough(self) -> int:
        return 16

    def profile(self, longest: int, target_share: float, *, recompute: Level = "none", backward: bool = True) -> MemoryProfile:
        return profile_packs(self.model, longest, target_share, recompute=recompute, backward=backward)

    def confirm(self, pack: Pack, recompute: Level) -> float | None:
        return None


def profile_packs(
    model: Any, longest: int, target_share: float, *, recompute: Level = "none", backward: bool = True
) -> MemoryProfile:
    """Measure the memory of packs in training, or of those without a backward pass.

    Args:
        model: With its adapter.
        longest: Tokens of the longest row that there will be: beyond a sliding window, attention needs more.
        target_share: The share of tokens that are trained on.
        recompute: How much is computed again.
    """
    device = next(model.parameters()).device
    lengths = LENGTHS.get(device.type, LONGER)
    prepare(model)
    with training_conditions(model, device), assume_longest_row(longest), torch.set_grad_enabled(backward):
        if processes.equal_passes:  # what layers are gathered into is made in the first pass, and stays
            _layers(model, random_pack(model, [lengths[0]], target_share), recompute, device)
        layers = [_layers(model, random_pack(model, [length], target_share), recompute, device) for length in lengths]
        of_head = [cost._replace(per_token=target_share * cost.per_token) for cost in _head(model, device)] if backward else []
    moments = _fit_parabolas(lengths, [levels for _, levels in layers])
    if not backward:
        return MemoryProfile(MemoryCost(0.0, 0.0), moments)
    saved = MemoryCost(*map(float, _fit_parabolas(lengths, [[activations] for activations, _ in layers])[0]))
    saved_by_all = saved.plus(of_head[0])
    of_head_moments = np.array([saved.plus(of_head[1]), saved_by_all.plus(of_head[2])])
    return MemoryProfile(saved_by_all, np.vstack([moments, of_head_moments]))


@contextmanager
def training_conditions(model: Any, device: torch.device) -> Iterator[None]:
    """Within the block, dropout is on, and there are gradients already, as in training: their memory is counted apart."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.grad for parameter in trained]
    enabled = [adapter for adapter in adapters(model).values() if adapter.enabled]
    with ExitStack() as stack:
        stack.enter_context(seeded(0, device))
        stack.enter_context(gc_paused())  # what it would free, and when, differs from row to row
        if device.type == "cpu":
            stack.enter_context(one_thread())
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        for adapter in enabled:
            adapter.train()
        try:
            yield
        finally:
            for adapter in enabled:
                adapter.train(False)
            for parameter, gradient in zip(trained, before, strict=True):
                parameter.grad = gradient


def random_pack(model: Any, lengths: Sequence[int], target_share: float) -> Pack:
    """Rows of so many random tokens, of which this share are trained on."""
    draw, vocabulary = random.Random(0), model.config.get_text_config().vocab_size
    rows = []
    for length in lengths:
        targets = range(length + 1 - max(1, round(target_share * length)), length + 1)
        rows.append(TokenRow([draw.randrange(vocabulary) for _ in range(length + 1)], list(targets), "random tokens"))
    return pack_flat(rows)


def _layers(model: Any, pack: Pack, recompute: Level, device: torch.device) -> tuple[float, list[float]]:
    """Bytes that the layers save for the backward pass; and all that is held, each time that it changes, in both passes."""
    pack = pack.to(device)
    free_scratch()  # so that each pass makes the same tensors in the same order
    with recomputing(recompute), Meter() as meter:
        total = states_at(model, pack, pack.predicts).sum()
        activations = meter.now
        if total.requires_grad:
            total.backward()
        return activations, [*meter.levels]  # what is freed after the passes does not count


def _head(model: Any, device: torch.device) -> list[MemoryCost]:
    """Of the head, by target tokens: what it saves, and the most in the forward and in the backward pass.

    It is measured on so many tokens that it needs several tiles.
    """
    own = head.head_of(model)
    few = max(head.ROWS if own.adapted is not None else 1, head.TILE // len(own.weight) + 1)
    measured = []
    for count in (2 * few, 3 * few):
        hidden = torch.zeros(count, own.weight.shape[1], dtype=own.weight.dtype, device=device).requires_grad_()
        at = torch.arange(count)
        targets = head.Targets(at, at % len(own.weight), torch.zeros_like(at), 1).to(device)
        with Meter() as meter:
            total = head.sequence_logprobs(hidden, own, targets)
            saved, before = meter.now, len(meter.levels)
            total.sum().backward()
            measured.append((saved, max(meter.levels[:before]), max(meter.levels[before:])))
    slopes = [((second - first) / few, first) for first, second in zip(*measured, strict=True)]
    return [MemoryCost(max(0.0, first - slope * 2 * few), slope) for slope, first in slopes]


def _fit_parabolas(lengths: Sequence[int], levels: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """The parabola through three points, for each of many: three lines of numbers -> a line of three each, as in `MemoryCost`."""
    if len({len(moments) for moments in levels}) > 1:  # longer rows run other code; then only the peaks can be compared
        levels = [[max(moments)] for moments in levels]
    (n1, n2, n3), (y1, y2, y3) = lengths, np.array(levels, dtype=np.float64)
    lower, upper = (y2 - y1) / (n2 - n1), (y3 - y2) / (n3 - n2)
    per_pair = (upper - lower) / (n3 - n1)
    per_token = upper - per_pair * (n2 + n3)
    return np.stack([y3 - per_token * n3 - per_pair * n3**2, per_token, per_pair], axis=1)


class Meter(TorchDispatchMode):
    """Counts the bytes of tensors that were made within the block and are not yet freed, by what each operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.levels: list[float] = []
        """`now`, each time that it changed."""
        self.held: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors((out,)):
            self._count(tensor.untyped_storage(), (*args, *(kwargs or {}).values()))
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and to look for that takes a third of the time

    def _count(self, storage: Any, arguments: Iterable[Any]) -> None:
        if id(storage) in self.held:
            return
        if any(tensor.untyped_storage() is storage for tensor in _tensors(arguments)):
            return  # an older tensor, changed in place or viewed
        self.held[id(storage)] = storage.nbytes()
        self._change(storage.nbytes())
        weakref.finalize(storage, self._gone, id(storage)).atexit = False

    def _gone(self, storage: int) -> None:
        self._change(-self.held.pop(storage))

    def _change(self, size: float) -> None:
        self.now += size
        self.levels.append(self.now)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among an operation's arguments or results, in lists too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
