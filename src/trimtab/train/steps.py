"""The packs of each optimizer step of a run, made when it is taken."""

from collections.abc import Sequence as SequenceOf

from trimtab.data import Pack, pack_all, plan_steps, units
from trimtab.data.example import Sequence as Row
from trimtab.engine import Memory
from trimtab.errors import DataError
from trimtab.train.config import TrainConfig


class PlannedSteps:
    """The packs of each optimizer step, made when it is taken: which rows that learns is a function of the seed alone."""

    def __init__(self, rows: SequenceOf[Row], config: TrainConfig, memory: Memory) -> None:
        if not rows:
            raise DataError("data: there is nothing to learn from.")
        self._rows, self.memory = rows, memory
        self.epochs, self.rows = config.of(len(units(rows)))
        self._plan = plan_steps(rows, epochs=self.epochs, seed=config.seed, rows=self.rows, tokens=config.tokens_per_step)

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, number: int) -> list[Pack]:
        return pack_all([self._rows[n] for n in self._plan[number]], self.memory.pack_tokens)

    @property
    def rows_per_step(self) -> float:
        """On average, if it is measured in tokens."""
        if self.rows is not None:
            return self.rows
        return sum(len(units(self._rows[n] for n in step)) for step in self._plan) / len(self._plan)
