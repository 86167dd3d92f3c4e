"""The memory that a pack takes on an accelerator: its allocator's peaks while packs of random tokens run there, their gradients thrown away.

Peaks hold what counting tensors misses: what attention, matrix products and kernels take for a moment, and what the allocator
rounds up. A pass has three of them, each along a line of its own: the forward pass through the layers, the head, and the
backward pass through the layers. The trial also compiles kernels and warms libraries up before the first step is timed.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from trimtab.core.wrapping import trunk_of
from trimtab.data.pack import Pack
from trimtab.engine.forward import pack_logprobs, prepare
from trimtab.engine.layouts import assume_longest_row
from trimtab.engine.memory_probe import MemoryCost, MemoryProfile, random_pack, training_conditions
from trimtab.engine.recompute import Level

TOKENS = (512, 1024, 2048)
"""Of the packs that are tried."""
LONG = 1024
"""Tokens of a row from which its square may matter, two of `TOKENS` at least; packs of shorter ones grow along a line."""
A_SCORE = 8.0
"""Bytes a pair of tokens below which there are no scores, of several heads or in several layers: the rest is rounding."""
SECONDS = 0.1
"""Of a pack from which a device computes longer than the host launches."""
FEWEST, MOST = (2048, 4096), 32768
"""Tokens of a pack, where that is reached with fewer or more; and the most."""


class DeviceMemory(Protocol):
    """What an allocator says of a device's memory, in bytes."""

    def holds(self) -> float:
        """By tensors, now."""

    def restart(self) -> None:
        """Forget the peak."""

    def peak(self) -> float:
        """The most that was held since."""

    def wait(self) -> None:
        """Until all that was launched is computed."""


class AllocatorMemory(NamedTuple):
    """By the module of a kind of device: torch.cuda, torch.xpu."""

    module: Any
    device: torch.device

    def holds(self) -> float:
        return float(self.module.memory_allocated(self.device))

    def restart(self) -> None:
        self.module.reset_peak_memory_stats(self.device)

    def peak(self) -> float:
        return float(self.module.max_memory_allocated(self.device))

    def wait(self) -> None:
        self.module.synchronize(self.device)


def device_memory(device: torch.device) -> DeviceMemory | None:
    """None if the device's allocator tells no peaks."""
    module = getattr(torch, device.type, None)
    known = all(hasattr(module, name) for name in ("memory_allocated", "reset_peak_memory_stats", "max_memory_allocated"))
    return AllocatorMemory(module, device) if known and device.type != "cpu" else None


class TriedPacks:
    """The measure of devices whose allocator tells its peak (see `memory_plan.Measure`)."""

    share, most = 0.92, MOST

    def __init__(self, model: Any, memory: DeviceMemory) -> None:
        self.model, self.memory = model, memory
        self.rate = math.inf
        """Tokens a second, of the last pack that was timed."""
        self.known: dict[tuple[Any, ...], MemoryProfile] = {}

    def enough(self) -> int:
        return int(min(max(SECONDS * self.rate, FEWEST[0]), FEWEST[1]))

    def profile(self, longest: int, target_share: float, *, recompute: Level = "none", backward: bool = True) -> MemoryProfile:
        asked = longest, target_share, recompute, backward
        if asked not in self.known:
            self.known[asked] = self._profile(*asked)
        return self.known[asked]

    def _profile(self, longest: int, target_share: float, recompute: Level, backward: bool) -> MemoryProfile:
        prepare(self.model)
        sizes, peaks = list[tuple[int, int]](), list[list[float]]()
        with training_conditions(self.model, self._device), assume_longest_row(longest), torch.set_grad_enabled(backward):
            for tokens in TOKENS:
                row = longest if longest < LONG else max(n for n in TOKENS if n <= min(longest, tokens))
                pack = random_pack(self.model, [row] * -(-tokens // row), target_share)
                if (found := self._run(pack, recompute)) is None:
                    return MemoryProfile(MemoryCost(0.0, 0.0), np.array([[math.inf, 0.0, 0.0]]))
                sizes.append((len(pack.ids), sum(pack.pairs)))
                peaks.append(found)
            self._time(pack, recompute)
        return MemoryProfile(MemoryCost(0.0, 0.0), _growth(sizes, peaks, square=longest >= LONG))

    def confirm(self, pack: Pack, recompute: Level) -> float | None:
        with training_conditions(self.model, self._device):
            found = self._run(pack, recompute)
        return math.inf if found is None else max(found)

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def _run(self, pack: Pack, recompute: Level) -> list[float] | None:
        """The most that is held beside what was: in the layers' forward pass, in the head, in their backward pass. None: too much."""
        pack, peaks = pack.to(self._device), list[float]()
        before = self.memory.holds()
        self.memory.restart()

        def mark(*_: Any) -> None:
            peaks.append(self.memory.peak() - before)
            self.memory.restart()

        try:
            with _marked(self.model, mark):
                total = pack_logprobs(self.model, pack, recompute=recompute).sum()
                if total.requires_grad:
                    total.backward()
                mark()
        except torch.OutOfMemoryError:
            return None
        return peaks

    def _time(self, pack: Pack, recompute: Level) -> None:
        """Of a pack like one that has run, so that nothing is compiled meanwhile."""
        self.memory.wait()
        started = time.perf_counter()
        self._run(pack, recompute)
        self.memory.wait()
        self.rate = len(pack.ids) / (time.perf_counter() - started)


@contextmanager
def _marked(model: Any, mark: Any) -> Iterator[None]:
    """Within the block, `mark` is called where the head's passes begin, and where they end if there is a backward pass."""

    def reached(module: Any, given: Any, out: Any) -> None:
        mark()
        if out.last_hidden_state.requires_grad:
            out.last_hidden_state.register_hook(mark)

    handle = trunk_of(model).register_forward_hook(reached)
    try:
        yield
    finally:
        handle.remove()


def _growth(sizes: Sequence[tuple[int, int]], peaks: Sequence[Sequence[float]], square: bool) -> NDArray[np.float64]:
    """Each peak of packs of so many tokens and pairs as fixed bytes, bytes a token and bytes a pair, as in MemoryCost."""
    ((n1, _), (n2, _)), (y1, y2) = sizes[-2:], np.array(peaks[-2:], dtype=np.float64)
    per_token = np.maximum(0.0, (y2 - y1) / (n2 - n1))
    lines = np.stack([np.maximum(0.0, y2 - per_token * n2), per_token, np.zeros_like(per_token)], axis=1)
    if not square:
        return lines
    terms = np.array([[1.0, tokens, pairs] for tokens, pairs in sizes])
    with_pairs = np.linalg.solve(terms, np.array(peaks, dtype=np.float64)).T
    return np.where(with_pairs[:, 2:] > A_SCORE, with_pairs, lines)
