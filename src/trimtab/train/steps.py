"""The packs of each optimizer step of a run, made when it is taken; and how large they are, by the memory that is free."""

import heapq
from collections.abc import Sequence

from trimtab.base import Base
from trimtab.core.errors import DataError
from trimtab.core.process import never_keep_freed_memory
from trimtab.data import Pack, largest_group_tokens, pack_all, plan_steps, row_groups
from trimtab.data.example import TokenRow
from trimtab.engine import FrozenLayerCache, Memory, Work, plan_memory
from trimtab.train.config import TrainConfig


class PlannedSteps:
    """The packs of each optimizer step, made when it is taken: which rows that learns is a function of the seed alone."""

    def __init__(self, rows: Sequence[TokenRow], config: TrainConfig, memory: Memory) -> None:
        if not rows:
            raise DataError("data: there is nothing to learn from.")
        self._rows, self.memory = rows, memory
        self.epochs, self.rows = config.epochs_and_rows(len(row_groups(rows)))
        self._plan = _plan(rows, config)

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, number: int) -> list[Pack]:
        return pack_all([self._rows[n] for n in self._plan[number]], self.memory.pack_tokens)

    @property
    def rows_per_step(self) -> float:
        """On average, if it is measured in tokens."""
        if self.rows is not None:
            return self.rows
        return sum(len(row_groups(self._rows[n] for n in step)) for step in self._plan) / len(self._plan)


def planned_memory(base: Base, config: TrainConfig, rows: Sequence[TokenRow], held_out: Sequence[TokenRow] = ()) -> Memory:
    """How many tokens are computed at a time, and which packs twice, so that training on these rows fits into memory.

    Args:
        held_out: Rows that are evaluated on meanwhile.

    Raises:
        RecipeError: It does not fit.
    """
    never_keep_freed_memory()
    answers = [row for row in rows if row.side != "mismatched"]
    learned, shown = (
        (sum(map(len, of)) for of in zip(*((row.target_indices, row.ids) for row in answers), strict=True))
        if answers
        else (1, 1)
    )

    def fullest(tokens: int) -> list[list[Pack]]:
        sizes = [
            (sum(len(rows[n].ids) for n in step), max(len(rows[n].ids) for n in step), step) for step in _plan(rows, config)
        ]
        chosen = [*heapq.nlargest(FULLEST, sizes), max(sizes, key=lambda size: size[1])]
        return [pack_all([rows[n] for n in step], tokens) for _, _, step in chosen]

    below = FrozenLayerCache(base.model, 0)
    from_frozen = below.size(sum(len(row.ids) for row in rows)) if config.repeats else 0.0
    evaluated = max((len(row.ids) - 1 for row in held_out), default=0)  # nothing is predicted from the last one
    work = Work(largest_group_tokens(rows), learned / shown, fullest if rows else None, from_frozen, evaluated)
    return plan_memory(base.model, work, config.pack_tokens, config.recompute)


FULLEST = 8
"""How many of the steps with most tokens are packed to find the largest pack."""


def _plan(rows: Sequence[TokenRow], config: TrainConfig) -> list[list[int]]:
    """The numbers of the rows of each step."""
    epochs, a_step = config.epochs_and_rows(len(row_groups(rows)))
    return plan_steps(rows, epochs=epochs, seed=config.seed, examples=a_step, tokens=config.tokens_per_step)
