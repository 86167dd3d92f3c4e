"""What a pack takes in memory, measured on three short rows of made-up tokens, whose tensors are counted as they are made and freed.

A row of n tokens takes c + a·n + b·n² bytes: a for each token, b where attention keeps a number for each pair of them, c for
copies of weights. Three rows determine a, b and c.
"""

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

from trimtab.core.process import collector_paused
from trimtab.core.randomness import seeded
from trimtab.data.example import TokenRow
from trimtab.data.pack import Pack, pack_flat
from trimtab.engine import head
from trimtab.engine.arena import free_scratch
from trimtab.engine.forward import one_thread, states_at
from trimtab.engine.layouts import standing_for
from trimtab.engine.patching import gradient_checkpointing
from trimtab.methods import adapters

LENGTHS = {"cpu": (8, 16, 32)}
LONGER = (32, 64, 128)
"""On an accelerator, where attention fills rows up to multiples of 32."""


class Cost(NamedTuple):
    """Bytes that a pack takes: of a row of n tokens, n² pairs."""

    fixed: float
    per_token: float
    per_pair: float = 0.0

    def of(self, tokens: float, pairs: float) -> float:
        return self.fixed + self.per_token * tokens + self.per_pair * pairs

    def plus(self, other: "Cost") -> "Cost":
        return Cost(*(one + two for one, two in zip(self, other, strict=True)))


class Costs(NamedTuple):
    """What a pack takes, from the start of its forward pass to the end of its backward pass."""

    kept: Cost
    """What the forward pass keeps for the backward pass."""
    moments: NDArray[np.float64]
    """All that is held, each time that a tensor is made or freed: a line each, as in `Cost`."""

    def most(self, tokens: float, pairs: float) -> Cost:
        """What a pack takes at the moment at which one of this size takes most."""
        held = self.moments @ np.array([1.0, tokens, pairs])
        return Cost(*map(float, self.moments[held.argmax()]))


def training_costs(model: Any, longest: int, learned: float, *, recompute: bool = False) -> Costs:
    """What packs take in training.

    Args:
        model: With what is trained on it.
        longest: Tokens of the longest row that there will be: beyond a sliding window, attention needs more.
        learned: The share of tokens that are trained on.
        recompute: Their layers are computed again in the backward pass.
    """
    device = next(model.parameters()).device
    lengths = LENGTHS.get(device.type, LONGER)
    with _as_in_training(model, device), standing_for(longest):
        layers = [_layers(model, _made_up(model, length, learned), recompute, device) for length in lengths]
        of_head = [Cost(one.fixed, learned * one.per_token) for one in _head(model, device)]
    kept = Cost(*map(float, _fitted(lengths, [[one] for one, _ in layers])[0]))
    kept_by_all = kept.plus(of_head[0])
    of_head_moments = np.array([kept.plus(of_head[1]), kept_by_all.plus(of_head[2])])
    return Costs(kept_by_all, np.vstack([_fitted(lengths, [levels for _, levels in layers]), of_head_moments]))


def measuring_costs(model: Any, longest: int, learned: float) -> Costs:
    """What packs take that have no backward pass."""
    device = next(model.parameters()).device
    lengths = LENGTHS.get(device.type, LONGER)
    with _as_in_training(model, device), standing_for(longest), torch.no_grad():
        layers = [_layers(model, _made_up(model, length, learned), False, device) for length in lengths]
    return Costs(Cost(0.0, 0.0), _fitted(lengths, [levels for _, levels in layers]))


@contextmanager
def _as_in_training(model: Any, device: torch.device) -> Iterator[None]:
    """Within the block, dropout acts, and there are gradients already, as in training: they are counted apart."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.grad for parameter in trained]
    acting = [adapter for adapter in adapters(model).values() if adapter.enabled]
    with ExitStack() as held:
        held.enter_context(seeded(0, device))
        held.enter_context(collector_paused())  # what it would free, and when, differs from row to row
        if device.type == "cpu":
            held.enter_context(one_thread())
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        for adapter in acting:
            adapter.train()
        try:
            yield
        finally:
            for adapter in acting:
                adapter.train(False)
            for parameter, gradient in zip(trained, before, strict=True):
                parameter.grad = gradient


def _made_up(model: Any, length: int, learned: float) -> Pack:
    draw, vocabulary = random.Random(0), model.config.get_text_config().vocab_size
    first = length + 1 - max(1, round(learned * length))
    row = TokenRow([draw.randrange(vocabulary) for _ in range(length + 1)], list(range(first, length + 1)), "made up")
    return pack_flat([row])


def _layers(model: Any, pack: Pack, recompute: bool, device: torch.device) -> tuple[float, list[float]]:
    """Bytes that the layers keep for the backward pass; and all that is held, each time that it changes, in both passes."""
    pack = pack.to(device)
    at = pack.target_at.unique()
    free_scratch()  # so that each pass makes the same, one after the other
    with gradient_checkpointing(recompute), Meter() as meter:
        total = states_at(model, pack, at).sum()
        kept = meter.now
        if total.requires_grad:
            total.backward()
        return kept, [*meter.levels]  # what is freed after the passes does not count


def _head(model: Any, device: torch.device) -> list[Cost]:
    """The head's, by the number of target tokens: what it keeps, the most in the forward and in the backward pass.

    It is measured on so many tokens that it takes them in several tiles.
    """
    one = head.head_of(model)
    few = max(head.ROWS if one.adapted is not None else 1, head.TILE // len(one.weight) + 1)
    found = []
    for count in (2 * few, 3 * few):
        hidden = torch.zeros(count, one.weight.shape[1], dtype=one.weight.dtype, device=device).requires_grad_()
        at = torch.arange(count, device=device)
        token, sequence = at % len(one.weight), torch.zeros_like(at)
        with Meter() as meter:
            total = head.sequence_logprobs(hidden, at, one, token, sequence, 1)
            kept, before = meter.now, len(meter.levels)
            total.sum().backward()
            found.append((kept, max(meter.levels[:before]), max(meter.levels[before:])))
    slopes = [((second - first) / few, first) for first, second in zip(*found, strict=True)]
    return [Cost(max(0.0, first - slope * 2 * few), slope) for slope, first in slopes]


def _fitted(lengths: Sequence[int], levels: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """The parabola through three points, for each of many: three lines of numbers -> a line of three each, as in `Cost`."""
    if len({len(some) for some in levels}) > 1:  # longer rows go another way; then only the most can be compared
        levels = [[max(some)] for some in levels]
    (n1, n2, n3), (y1, y2, y3) = lengths, np.array(levels, dtype=np.float64)
    lower, upper = (y2 - y1) / (n2 - n1), (y3 - y2) / (n3 - n2)
    per_pair = (upper - lower) / (n3 - n1)
    per_token = upper - per_pair * (n2 + n3)
    return np.stack([y3 - per_token * n3 - per_pair * n3**2, per_token, per_pair], axis=1)


class Meter(TorchDispatchMode):
    """Counts the bytes of tensors that are made within the block and not yet freed, by what each operation returns."""

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

    def _count(self, storage: Any, given: Iterable[Any]) -> None:
        if id(storage) in self.held:
            return
        if any(one.untyped_storage() is storage for one in _tensors(given)):
            return  # something older, in place or another view of it
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
