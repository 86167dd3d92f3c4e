"""Mismatched rows, each a prompt with the answer to another: KTO's KL estimate is measured on them.

Each answer is used once. Which prompt it follows is a function of the rows and the seed: it is the same in all epochs, whatever
the order of rows or the size of steps, so that the reference model's log-probabilities are computed once.
"""

from collections.abc import Sequence

from trimtab.core.errors import DataError
from trimtab.data.example import TokenRow
from trimtab.data.order import shuffled


def with_mismatched(rows: Sequence[TokenRow], seed: int, max_length: int | None = None) -> list[TokenRow]:
    """The rows, each followed by the mismatched row of its prompt.

    Args:
        max_length: The most tokens of a mismatched row, which is truncated there.

    Raises:
        DataError: More than half of the rows have the same prompt, so some would get an answer to their own.
    """
    prompts = [tuple(row.ids[: row.target_indices[0]]) for row in rows]
    givers = derangement(prompts, seed)
    if givers is None:
        raise DataError(
            f"data: more than half of the {len(rows):,} examples have the same prompt, so kto can't estimate the KL divergence from "
            "the reference model: that takes answers to other prompts. Use more prompts, or pairs with dpo."
        )
    mixed: list[TokenRow] = []
    for row, prompt, giver in zip(rows, prompts, givers, strict=True):
        answer = rows[giver].ids[rows[giver].target_indices[0] :]
        ids = [*prompt, *answer][:max_length]
        mixed += [row, TokenRow(ids, list(range(len(prompt), len(ids))), row.where, len(ids), "mismatched", source=row.source)]
    return mixed


def derangement(prompts: Sequence[tuple[int, ...]], seed: int) -> list[int] | None:
    """For each prompt the index of one that differs from it, each index once; None if that is impossible.

    With equal prompts side by side around a circle, the one that is as many places on as the largest group has prompts differs.
    """
    places: dict[tuple[int, ...], list[int]] = {}
    for number in shuffled(len(prompts), seed, 0):
        places.setdefault(prompts[number], []).append(number)
    circle = [number for group in places.values() for number in group]
    step = max(map(len, places.values()), default=0)
    if 2 * step > len(circle) or not circle:
        return None
    givers = [0] * len(circle)
    for place, number in enumerate(circle):
        givers[number] = circle[(place + step) % len(circle)]
    return givers
