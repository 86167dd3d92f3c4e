"""How long token rows may be, and what becomes of longer ones."""

from dataclasses import replace
from typing import NamedTuple

from trimtab.data.example import InvalidExample, Overlong, TokenRow, TooLong

_interned: dict[int, int] = {}
"""Every token id once, however many rows have it: a new int of Python's takes four times a reference's memory."""


class LengthLimit(NamedTuple):
    """How long token rows may be, and what becomes of longer ones."""

    tokens: int | None = None
    overlong: Overlong = "refuse"
    """What becomes of longer rows. One that is truncated and has no target before the limit is rejected all the same."""
    name: str = ""
    """What messages call it; `max_length` with its number unless given."""

    def __str__(self) -> str:
        return self.name or f"max_length {self.tokens or 0:,}"


NO_LIMIT = LengthLimit()


def limit_length(rows: list[TokenRow], limit: LengthLimit) -> list[TokenRow]:
    """The rows of one example up to their last target, within the limit. Raises InvalidExample."""
    needed = max((row.target_indices[-1] + 1 for row in rows if row.target_indices), default=0)
    if limit.tokens is not None and needed > limit.tokens:
        if limit.overlong != "truncate":
            whole = "; only plain texts can be split, so truncate or drop it" if limit.overlong == "split" else ""
            kind = TooLong if limit.overlong == "drop" else InvalidExample
            raise kind(f"has {needed:,} tokens up to the end of its last answer, more than {limit}{whole}")
        rows = [_truncated(row, limit.tokens) for row in rows]
    limited = [
        replace(row, ids=interned(row.ids[: row.target_indices[-1] + 1]), target_indices=interned(row.target_indices))
        for row in rows
        if row.target_indices
    ]
    if not limited:
        raise InvalidExample("has no token to train on" + (f" within {limit}" if needed else ""))
    return limited


def _truncated(row: TokenRow, tokens: int) -> TokenRow:
    """The row with the targets among its first so many tokens."""
    kept = sum(t < tokens for t in row.target_indices)
    return replace(row, target_indices=row.target_indices[:kept], weights=row.weights and row.weights[:kept])


def split_text(ids: list[int], first: int, most: int, where: str) -> list[TokenRow]:
    """The blocks of a text, of at most so many tokens. Each begins with the last one of the block before, so every target is one once.

    Args:
        first: The index of the first target.
    """
    start, targets = 0, interned(list(range(first, most)))
    after_first = interned(list(range(1, most)))  # one list, which all blocks share
    rows: list[TokenRow] = []
    while start < len(ids) - 1:
        block = interned(ids[start : start + most])
        rows.append(TokenRow(block, targets if len(block) == most else targets[: len(block) - most], where, len(block)))
        start, targets = start + most - 1, after_first
    return rows


def interned(numbers: list[int]) -> list[int]:
    """The same numbers, as objects that all rows share."""
    return [_interned.setdefault(n, n) for n in numbers]
