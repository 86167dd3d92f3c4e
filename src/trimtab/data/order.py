"""The order of training: a pure function of (seed, epoch), so nothing needs to be stored to resume."""

import math
import random
from collections.abc import Sequence

from trimtab.data.example import TokenRow, row_groups


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` rows in an epoch (0-based). The same on every machine and every version of torch."""
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def split(count: int, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of (training, validation), each increasing."""
    order = random.Random(f"{seed}/split").sample(range(count), held_out)
    chosen = set(order)
    return [n for n in range(count) if n not in chosen], sorted(chosen)


def plan_steps(
    rows: Sequence[TokenRow], *, epochs: float, seed: int, examples: int | None = None, tokens: int | None = None
) -> list[list[int]]:
    """The indices of the rows of each optimizer step. The rows of an example stay together and count once.

    The epochs' orders follow each other without a break, so that every step but the last is full: it has so many `examples`, or
    as many as fit into `tokens` (a longer one has a step of its own).
    """
    all_groups = row_groups(rows)
    total = math.ceil(round(epochs * len(all_groups), 9))  # 0.07 epochs of 100 rows are 7, not 7.000000000000001
    stream = [all_groups[n] for epoch in range(math.ceil(epochs)) for n in shuffled(len(all_groups), seed, epoch)][:total]
    if examples is not None:
        return [[n for group in stream[i : i + examples] for n in group] for i in range(0, total, examples)]
    assert tokens is not None, "a step is measured in examples or in tokens"
    steps: list[list[int]] = []
    room = 0
    for group in stream:
        length = sum(len(rows[number].ids) for number in group)
        if not steps or length > room:
            steps.append([])
            room = tokens
        steps[-1] += group
        room -= length
    return steps
