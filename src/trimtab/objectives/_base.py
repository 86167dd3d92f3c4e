"""What an objective is: a loss as a sum over items, how many items that is, and the metrics reported beside it."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

from torch import Tensor

from trimtab.core.config import Choice
from trimtab.data import Kind, Pack
from trimtab.data.example import TokenRow

KL = Tensor | float
"""A divergence. While it is a tensor without dimensions, nobody has to wait for it."""
TIE = 1e-3
"""Rewards this close are equal but for rounding: a model that is its own reference has no preference."""


def correctness(margin: Tensor) -> Tensor:
    """1 where a margin is positive, 0 where it is negative, a half where there is none."""
    return (margin > TIE).to(margin.dtype) + 0.5 * (margin.abs() <= TIE)


class Objective(Choice):
    """A pure function from sequence log-probabilities to a loss. One concrete subclass per file in this folder.

    The loop divides the sum of the losses of a whole optimizer step by the sum of its items, the only division there is;
    so the step does not depend on how its rows were cut into packs.

    Shapes: S sequences of a pack, in U units: a row by itself, or the two answers of a row in which answers are compared.
    """

    family: ClassVar[str] = "trimtab.objectives"
    default: ClassVar[str] = "sft"
    data_kind: ClassVar[Kind] = "answers"
    needs_reference: ClassVar[bool] = False
    """The loss compares with a reference model, whose Σ log p each sequence brings along. Dropout is refused then."""
    estimates_kl: ClassVar[bool] = False
    """Whether its losses need `kl_estimate`, which is computed on the mismatched answers of the whole step before any of them."""
    lr_multiplier: ClassVar[float] = 1.0
    """The best learning rate, as a multiple of the one for supervised fine-tuning."""

    def resolve_auto(self, rows: Sequence[TokenRow]) -> Self:
        """The same objective, with hyperparameters that are `auto` decided by the training rows. Raises DataError."""
        return self

    @abstractmethod
    def counts(self, pack: Pack) -> list[float]:
        """How many items each unit has: U. Target tokens count as much as they weigh."""

    @abstractmethod
    def losses(self, logprobs: Tensor, pack: Pack, kl: KL) -> Tensor:
        """The sum over each unit's items, from Σ log p of each of the pack's sequences: S -> U."""

    def measures(self, logprobs: Tensor, pack: Pack, kl: KL) -> dict[str, Tensor]:
        """Metrics beside the loss: a value for each unit that has one. A step's or a data set's is their mean."""
        return {}

    def kl_estimate(self, log_ratios: Tensor) -> KL:
        """The KL estimate, from log p / p_reference of the step's mismatched answers."""
        return 0.0

    def items(self, pack: Pack) -> float:
        """How many terms the pack's loss sums."""
        return sum(self.counts(pack))

    def loss(self, logprobs: Tensor, pack: Pack, kl: KL) -> Tensor:
        """The sum of those terms, a scalar, from Σ log p of each of the pack's sequences (S)."""
        return self.losses(logprobs, pack, kl).sum()


class ReferenceObjective(Objective):
    """An objective that compares Σ log p of each sequence with a reference model's."""

    needs_reference: ClassVar[bool] = True

    reference: str = "auto"
    """What to compare with: base (adapters off), start (what training starts from), an adapter or run folder, or a model; auto is
    base for a fresh adapter, and start for one that is trained on."""
