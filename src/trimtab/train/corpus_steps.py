"""The optimizer steps of a corpus, made from their numbers alone, and the plan of the memory that they take."""

import math
from collections.abc import Sequence

from trimtab.base import Base
from trimtab.core.errors import RecipeError
from trimtab.core.process import never_keep_freed_memory
from trimtab.data import Corpus, LoadedData, Pack, pack_all
from trimtab.data.example import TokenRow
from trimtab.engine import MemoryPlan, Workload, plan_memory
from trimtab.train.config import TrainConfig
from trimtab.train.schedule import misfit
from trimtab.train.steps import TrainingSteps, for_processes, optimizer_bytes, plan_training_memory


class CorpusSteps:
    """The packs of each optimizer step of a corpus, as `TrainingSteps` has them of rows. Nothing is planned ahead or remembered."""

    def __init__(self, corpus: Corpus, config: TrainConfig, memory: MemoryPlan) -> None:
        """
        Raises:
            RecipeError: The schedule does not fit into so few steps.
        """
        self.corpus, self.memory = corpus, memory
        epochs, _ = config.epochs_and_rows(len(corpus))
        self.rows = blocks_per_step(corpus, config)
        self._blocks: float = math.ceil(round(epochs * len(corpus), 9))
        if config.max_steps is not None:
            limit = config.max_steps * self.rows
            self._blocks = limit if config.epochs == "auto" else min(self._blocks, limit)
            epochs = self._blocks / len(corpus)
        self.epochs = epochs
        if problem := misfit(len(self), config.warmup, config.schedule, config.decay):
            raise RecipeError(problem)

    def __len__(self) -> int:
        return math.ceil(self._blocks / self.rows)

    def __getitem__(self, number: int) -> list[Pack]:
        last = min((number + 1) * self.rows, int(self._blocks))
        rows = [row for block in range(number * self.rows, last) for row in self.corpus.rows(block)]
        return pack_all(rows, self.memory.pack_tokens, share=False, processes=self.memory.processes)

    def epoch_after(self, number: int) -> float:
        """How many epochs of the blocks have been trained on after this step, from 1."""
        return round(min(number * self.rows, self._blocks) / len(self.corpus), 4)

    @property
    def rows_per_step(self) -> float:
        """Blocks."""
        return self.rows


def blocks_per_step(corpus: Corpus, config: TrainConfig) -> int:
    """As many as a step is asked to have, or as fit into its tokens."""
    _, blocks = config.epochs_and_rows(len(corpus))
    return blocks or max(1, (config.tokens_per_step or 0) // corpus.length)


def plan_corpus_memory(base: Base, config: TrainConfig, corpus: Corpus, held_out: Sequence[TokenRow] = ()) -> MemoryPlan:
    """As `plan_training_memory`, for a corpus: all steps have as many tokens, and none takes more than one whose blocks are a document each.

    Raises:
        RecipeError: It does not fit.
    """
    never_keep_freed_memory()
    whole = TokenRow([0] * corpus.length, list(range(1, corpus.length)), "")
    blocks = blocks_per_step(corpus, config)

    def fullest(pack_tokens: int) -> list[list[Pack]]:
        return [pack_all([whole] * blocks, pack_tokens, share=False)]

    longest_evaluated = max((len(row.ids) - 1 for row in held_out), default=0)
    work = Workload(corpus.length - 1, corpus.targets / corpus.tokens, fullest, 0.0, longest_evaluated)
    return for_processes(
        plan_memory(base.model, work, config.pack_tokens, config.recompute, optimizer_bytes(base, config)), config
    )


def steps_of(data: LoadedData, config: TrainConfig, memory: MemoryPlan) -> TrainingSteps | CorpusSteps:
    """The steps of a run. Raises DataError or RecipeError, as their classes do."""
    if data.corpus is not None:
        return CorpusSteps(data.corpus, config, memory)
    return TrainingSteps(data.train, config, memory, data.weights, data.seed)


def memory_of(base: Base, config: TrainConfig, data: LoadedData) -> MemoryPlan:
    """The plan of the memory of a run. Raises RecipeError if it does not fit."""
    if data.corpus is not None:
        return plan_corpus_memory(base, config, data.corpus, data.eval)
    return plan_training_memory(base, config, data.train, data.eval, data.weights, data.seed)
