"""In which order rows are learned: a pure function of (seed, epoch), so nothing needs to be remembered to continue."""

import math
import random
from collections.abc import Sequence

from trimtab.data.example import TokenRow, units


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` rows in an epoch (0-based). The same on every machine and every version of torch."""
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def split(count: int, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """(training, evaluation) row numbers, each increasing."""
    order = random.Random(f"{seed}/split").sample(range(count), held_out)
    chosen = set(order)
    return [n for n in range(count) if n not in chosen], sorted(chosen)


def plan_steps(
    sequences: Sequence[TokenRow], *, epochs: float, seed: int, rows: int | None = None, tokens: int | None = None
) -> list[list[int]]:
    """Which sequences each optimizer step learns, by their numbers. What belongs together stays together and counts once.

    The epochs' orders follow on each other without a seam, so that every step but the last is full: `rows` sequences, or
    as many as fit into `tokens` (one that is longer has a step of its own).
    """
    whole = units(sequences)
    total = math.ceil(round(epochs * len(whole), 9))  # 0.07 epochs of 100 rows are 7, not 7.000000000000001
    stream = [whole[n] for epoch in range(math.ceil(epochs)) for n in shuffled(len(whole), seed, epoch)][:total]
    if rows is not None:
        return [[n for unit in stream[i : i + rows] for n in unit] for i in range(0, total, rows)]
    assert tokens is not None, "a step is measured in rows or in tokens"
    steps: list[list[int]] = []
    room = 0
    for unit in stream:
        length = sum(len(sequences[number].ids) for number in unit)
        if not steps or length > room:
            steps.append([])
            room = tokens
        steps[-1] += unit
        room -= length
    return steps
