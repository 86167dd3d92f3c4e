"""The packs of each optimizer step of a run, and the plan of the memory that they take."""

import heapq
import itertools
from collections.abc import Mapping, Sequence

from trimtab.base import Base
from trimtab.core.errors import DataError, RecipeError
from trimtab.core.process import never_keep_freed_memory
from trimtab.core.processes import processes
from trimtab.data import Pack, largest_group_tokens, pack_all, plan_steps, row_groups
from trimtab.data.example import TokenRow
from trimtab.engine import FrozenLayerCache, MemoryPlan, Workload, plan_memory
from trimtab.methods import adapters
from trimtab.train.config import TrainConfig
from trimtab.train.optimizer import trained_by
from trimtab.train.schedule import misfit


class TrainingSteps:
    """The packs of each optimizer step, made when it is taken; which rows it has is a function of the seed alone."""

    def __init__(
        self,
        rows: Sequence[TokenRow],
        config: TrainConfig,
        memory: MemoryPlan,
        weights: Mapping[str, float] | None = None,
        seed: int | None = None,
    ) -> None:
        """
        Args:
            weights: Of the rows' sources, if an epoch is a mixture of them.
            seed: Of the order of the rows; that of `config` unless given.

        Raises:
            DataError: There are no rows.
            RecipeError: The schedule does not fit into so few steps.
        """
        if not rows:
            raise DataError("data: there is nothing to train on.")
        self._rows, self.memory, self._share = rows, memory, config.shares_prefixes
        self._indices = _plan(rows, config, weights, seed)
        if problem := misfit(len(self), config.warmup, config.schedule, config.decay):
            raise RecipeError(problem)
        examples = self._examples = len(row_groups(rows))
        self._examples_after: list[int] = []
        self.epochs, self.rows = config.epochs_and_rows(examples)
        if config.max_steps is not None:
            taken = sum(len(row_groups(self._rows[n] for n in step)) for step in self._indices) / examples
            self.epochs = taken if config.epochs == "auto" else min(self.epochs, taken)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, number: int) -> list[Pack]:
        rows, memory = [self._rows[n] for n in self._indices[number]], self.memory
        return pack_all(rows, memory.pack_tokens, share=self._share, processes=memory.processes)

    def epoch_after(self, number: int) -> float:
        """How many epochs of the examples have been trained on after this step, from 1."""
        if not self._examples_after:
            counts = (len(row_groups(self._rows[n] for n in step)) for step in self._indices)
            self._examples_after = list(itertools.accumulate(counts))
        return round(self._examples_after[number - 1] / self._examples, 4)

    @property
    def rows_per_step(self) -> float:
        """On average, where steps are measured in tokens."""
        if self.rows is not None:
            return self.rows
        return sum(len(row_groups(self._rows[n] for n in step)) for step in self._indices) / len(self)


def plan_training_memory(
    base: Base,
    config: TrainConfig,
    rows: Sequence[TokenRow],
    held_out: Sequence[TokenRow] = (),
    weights: Mapping[str, float] | None = None,
    seed: int | None = None,
) -> MemoryPlan:
    """How many tokens a micro-batch has, and which need gradient checkpointing, so that training on these rows fits into memory.

    Args:
        held_out: Validation rows.
        weights: Of the rows' sources, if an epoch is a mixture of them.
        seed: Of the order of the rows, as in `TrainingSteps`.

    Raises:
        RecipeError: It does not fit.
    """
    never_keep_freed_memory()
    matched = [row for row in rows if row.side != "mismatched"]
    targets = sum(len(row.target_indices) for row in matched)
    target_share = targets / sum(len(row.ids) for row in matched) if matched else 1.0

    def fullest(pack_tokens: int) -> list[list[Pack]]:
        lengths = [[len(rows[n].ids) for n in step] for step in steps]
        sizes = [(sum(of_step), max(of_step), step) for of_step, step in zip(lengths, steps, strict=True)]
        chosen = [*heapq.nlargest(FULLEST, sizes), max(sizes, key=lambda size: size[1])]
        return [pack_all([rows[n] for n in step], pack_tokens, share=config.shares_prefixes) for _, _, step in chosen]

    steps = _plan(rows, config, weights, seed) if rows else []
    all_tokens = sum(len(row.ids) for row in rows)
    repeats = config.keeps_frozen_outputs and sum(map(len, steps)) > len(rows)
    frozen_output_bytes = FrozenLayerCache(base.model, 0).bytes_for(all_tokens) if repeats else 0.0
    longest_evaluated = max((len(row.ids) - 1 for row in held_out), default=0)  # nothing is predicted from the last token
    largest = largest_group_tokens(rows, share=config.shares_prefixes)
    work = Workload(largest, target_share, fullest if rows else None, frozen_output_bytes, longest_evaluated)
    return for_processes(
        plan_memory(base.model, work, config.pack_tokens, config.recompute, optimizer_bytes(base, config)), config
    )


def for_processes(plan: MemoryPlan, config: TrainConfig) -> MemoryPlan:
    """The plan, with packs that these processes can divide evenly, unless their size is given: then they are those of one process."""
    return plan._replace(processes=processes.size) if config.pack_tokens == "auto" else plan


def optimizer_bytes(base: Base, config: TrainConfig, *, of_all: bool = False) -> int:
    """What the optimizer of the base's adapters holds beside the parameters and gradients; `of_all` processes that divide it, or this one.

    Raises:
        RecipeError: It does not suit them.
    """
    total = 0
    for adapter in adapters(base.model).values():
        trained = [one for one in trained_by(adapter) if one.parameter.requires_grad]
        config.optimizer.check_suits(trained)
        size = sum(config.optimizer.state_bytes(parameter, is_matrix) for parameter, _, is_matrix in trained)
        total += size if of_all else -(-size // adapter.shares)
    return total


FULLEST = 8
"""How many of the steps with most tokens are packed to find the largest pack."""


def _plan(
    rows: Sequence[TokenRow], config: TrainConfig, weights: Mapping[str, float] | None, seed: int | None
) -> list[list[int]]:
    """The indices of each step's rows."""
    epochs, rows_per_step = config.epochs_and_rows(len(row_groups(rows)))
    return plan_steps(
        rows,
        epochs=None if config.epochs == "auto" and config.max_steps is not None else epochs,
        seed=config.seed if seed is None else seed,
        examples=rows_per_step,
        tokens=config.tokens_per_step,
        most=config.max_steps,
        weights=weights,
    )
