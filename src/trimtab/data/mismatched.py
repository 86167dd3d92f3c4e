"""Every row's prompt with another row's answer: what KTO estimates the divergence from its reference on.

The answers are passed on around a circle of all rows, so each is used once, and which comes after which prompt is a function
of the rows and the seed: it stays the same in all epochs, whatever the order of rows or the size of steps, and what the
reference makes of it is computed once.
"""

from collections.abc import Sequence

from trimtab.core.errors import DataError
from trimtab.data.example import TokenRow
from trimtab.data.order import shuffled


def with_mismatched(rows: Sequence[TokenRow], seed: int, max_length: int | None = None) -> list[TokenRow]:
    """The rows, each followed by its prompt with an answer to another prompt.

    Args:
        max_length: The most tokens that a prompt and its answer may have together; the answer is cut there.

    Raises:
        DataError: More than half of the rows share a prompt, so some would get an answer to their own.
    """
    prompts = [tuple(row.ids[: row.target_indices[0]]) for row in rows]
    givers = derangement(prompts, seed)
    if givers is None:
        raise DataError(
            f"data: more than half of the {len(rows):,} rows have the same prompt, so kto can't estimate how far the model has moved: "
            "that takes answers to other prompts. Use more prompts, or pairs with dpo."
        )
    made: list[TokenRow] = []
    for row, prompt, giver in zip(rows, prompts, givers, strict=True):
        answer = rows[giver].ids[rows[giver].target_indices[0] :]
        ids = [*prompt, *answer][:max_length]
        made += [row, TokenRow(ids, list(range(len(prompt), len(ids))), row.where, len(ids), "mismatched")]
    return made


def derangement(prompts: Sequence[tuple[int, ...]], seed: int) -> list[int] | None:
    """For each prompt the number of another that is not equal to it, each number once; None if that can't be.

    With equal prompts beside each other around a circle, whoever is as far on as the largest group is long has another prompt.
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
