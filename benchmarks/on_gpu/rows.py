"""Rows of random tokens, shaped as those that people train on."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from trimtab.data.example import TokenRow


class Load(NamedTuple):
    """What each step trains on."""

    name: str
    rows: int
    length: int | None = None
    """Of every row, which is then learned whole; chat-like lengths unless given."""


LOADS = (Load("chat, 64 rows", 64), Load("chat, 8 rows", 8), Load("4 rows of 4k", 4, 4096))
TINY = (Load("chat, 8 rows", 8), Load("2 rows of 96", 2, 96))
HEAD = 24
"""Tokens with which all chat-like rows begin."""


def rows(load: Load, vocabulary: int, seed: int, most: int = 600) -> list[TokenRow]:
    """A step's rows: chat-like ones have a median of 160 tokens, begin alike, and three quarters of each are targets."""
    draw, head = random.Random(seed), [token % vocabulary for token in range(HEAD)]
    made = []
    for number in range(load.rows):
        length = load.length or min(most, max(HEAD + 8, round(draw.lognormvariate(5.08, 0.6))))
        ids = [draw.randrange(vocabulary) for _ in range(length)]
        if load.length is None:
            ids[:HEAD] = head
        first = 1 if load.length else max(HEAD, length // 4)
        made.append(TokenRow(ids, list(range(first, length)), f"row {seed}/{number}", length))
    return made


def tokens(steps: Sequence[Sequence[TokenRow]]) -> list[int]:
    """Of each step."""
    return [sum(len(row.ids) for row in step) for step in steps]
