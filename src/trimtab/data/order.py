"""The order of training: a pure function of (seed, epoch), so nothing needs to be stored to resume."""

import hashlib
import heapq
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeVar

from trimtab.data.example import TokenRow, row_groups

Value = TypeVar("Value")


def shuffled(count: int, seed: int | str, epoch: int) -> list[int]:
    """The order of `count` rows in an epoch (0-based). The same on every machine and every version of torch."""
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def split(count: int, held_out: int, seed: int | str) -> tuple[list[int], list[int]]:
    """Indices of (training, validation), each increasing."""
    chosen = validation(count, held_out, seed)
    return sorted(set(range(count)).difference(chosen)), chosen


def validation(count: int, held_out: int, seed: int | str) -> list[int]:
    """Indices of validation examples, increasing."""
    return sorted(random.Random(f"{seed}/split").sample(range(count), held_out))


def sampled(values: Iterable[Value], count: int, seed: int) -> list[Value]:
    """So many of the values at random, in their order. They are read once, and no more are kept than are returned."""
    draw = random.Random(f"{seed}/sample").random
    chosen = heapq.nsmallest(count, ((draw(), number, value) for number, value in enumerate(values)))
    return [value for _, _, value in sorted(chosen, key=lambda one: one[1])]


def apportion(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """A whole number divided by shares, by the largest remainders: each part is within 1 of its exact value."""
    whole = math.fsum(shares.values())
    exact = {name: total * share / whole for name, share in shares.items()}
    parts = {name: math.floor(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: parts[name] - exact[name])[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


def plan_steps(
    rows: Sequence[TokenRow],
    *,
    epochs: float | None,
    seed: int,
    examples: int | None = None,
    tokens: int | None = None,
    most: int | None = None,
    weights: Mapping[str, float] | None = None,
) -> list[list[int]]:
    """The indices of the rows of each optimizer step. The rows of an example stay together and count once.

    The epochs' orders follow each other without a break, so that every step but the last is full: it has so many `examples`, or
    as many as fit into `tokens` (a longer one has a step of its own).

    Args:
        epochs: None for as many as `most` steps need.
        most: The most steps.
        weights: Of each source, by name; without any, an epoch has every example once.
    """
    all_groups = row_groups(rows)
    total = None if epochs is None else math.ceil(round(epochs * len(all_groups), 9))  # 0.07 epochs of 100 rows are 7, not 8
    by_source: dict[str, list[list[int]]] = {}
    for group in all_groups:
        by_source.setdefault(rows[group[0]].source if weights else "", []).append(group)
    stream = _mixed(by_source, seed, weights) if weights else _in_epochs(all_groups, seed)
    size = examples if examples is not None else tokens
    assert size is not None, "a step is measured in examples or in tokens"
    assert total or most, "there is a last step"
    steps: list[list[int]] = []
    room = 0
    for group in islice(stream, total):
        length = 1 if examples is not None else sum(len(rows[number].ids) for number in group)
        if not steps or length > room:
            if len(steps) == most:
                break
            steps.append([])
            room = size
        steps[-1] += group
        room -= length
    return steps


def _in_epochs(groups: Sequence[Value], seed: int | str) -> Iterator[Value]:
    """All groups in the order of the first epoch, then in that of the second, and so on."""
    epoch = 0
    while groups:
        yield from (groups[n] for n in shuffled(len(groups), seed, epoch))
        epoch += 1


def _mixed(by_source: Mapping[str, Sequence[Value]], seed: int, weights: Mapping[str, float]) -> Iterator[Value]:
    """Epochs of as many groups as all sources have, to which each source contributes its share.

    A source is gone through again and again, each time in another order, from where the epoch before stopped.
    """
    endless = {name: _in_epochs(groups, f"{seed}/{name}") for name, groups in by_source.items()}
    parts = apportion(sum(map(len, by_source.values())), weights)
    places = [name for name, part in parts.items() for _ in range(part)]
    yield from (next(endless[name]) for name in _in_epochs(places, seed))


class Permutation:
    """An order of so many numbers by the seed: of each place its number, without a list of them.

    A Feistel network permutes the numbers below a power of four; a result that is too large is permuted again until it is not, which
    takes fewer than four rounds on average.
    """

    ROUNDS = 6

    def __init__(self, count: int, seed: str) -> None:
        self.count, self._bits = count, max(1, ((count - 1).bit_length() + 1) // 2)
        digests = (hashlib.sha256(f"{seed}/{number}".encode()).digest() for number in range(self.ROUNDS))
        self._keys = [int.from_bytes(digest[:8], "big") for digest in digests]

    def __getitem__(self, place: int) -> int:
        """The number at a place, both from 0 and below `count`."""
        number, mask = place, (1 << self._bits) - 1
        while True:
            left, right = number >> self._bits, number & mask
            for key in self._keys:
                left, right = right, left ^ (_mixed_bits(right + key) & mask)
            number = left << self._bits | right
            if number < self.count:
                return number


def _mixed_bits(value: int) -> int:
    """64 bits, each of which depends on all of the value's: the finalizer of SplitMix64."""
    value = value * 0x9E3779B97F4A7C15 & _64_BITS
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _64_BITS
    return value ^ value >> 31


_64_BITS = (1 << 64) - 1
