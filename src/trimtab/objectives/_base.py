"""What an objective is: a loss as a sum over items, how many items that is, and what people read beside it."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

from torch import Tensor

from trimtab.core.config import Choice
from trimtab.data import Kind, Pack
from trimtab.data.example import TokenRow

EVEN = 1e-3
"""Rewards that are no further apart are the same, but for rounding: a model has no preference where it is its own reference."""


def right(margin: Tensor) -> Tensor:
    """1 where a margin is on the right side, 0 where it is on the wrong one, a half where there is none."""
    return (margin > EVEN).to(margin.dtype) + 0.5 * (margin.abs() <= EVEN)


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
    """With a reference model, whose Σ log p each sequence brings along: see `Comparing`. Dropout is refused then."""
    estimates_kl: ClassVar[bool] = False
    """Whether its losses need `kl_estimate`, which is computed on the mismatched answers of the whole step before any of them."""
    lr_multiplier: ClassVar[float] = 1.0
    """The best learning rate, as a multiple of the one for supervised fine-tuning."""

    def settled(self, rows: Sequence[TokenRow]) -> Self:
        """The same objective, with whatever the training rows decide. Raises DataError."""
        return self

    @abstractmethod
    def counts(self, pack: Pack) -> list[int]:
        """How many items each unit has: U."""

    @abstractmethod
    def losses(self, logprobs: Tensor, pack: Pack, kl: float) -> Tensor:
        """The sum over each unit's items, from Σ log p of each of the pack's sequences: S -> U."""

    def measures(self, logprobs: Tensor, pack: Pack, kl: float) -> dict[str, Tensor]:
        """What people read beside the loss: a value for each unit that has one. A step's or a data set's is their mean."""
        return {}

    def kl_estimate(self, log_ratios: Tensor) -> float:
        """The number that is kl, from log p / p_reference of the step's mismatched answers."""
        return 0.0

    def items(self, pack: Pack) -> int:
        """How many terms the pack's loss sums."""
        return sum(self.counts(pack))

    def loss(self, logprobs: Tensor, pack: Pack, kl: float) -> Tensor:
        """The sum of those terms, a scalar, from Σ log p of each of the pack's sequences (S)."""
        return self.losses(logprobs, pack, kl).sum()
