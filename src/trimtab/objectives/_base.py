"""What an objective is: a loss as a sum over items, and how many items that is."""

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from trimtab.config import Choice
from trimtab.data.pack import Pack


class Objective(Choice):
    """A pure function from sequence log-probabilities to a loss. One concrete subclass per file in this folder.

    The loop divides the sum of the losses of a whole optimizer step by the sum of its items, the only division there is;
    so the step does not depend on how its rows were cut into packs.
    """

    family: ClassVar[str] = "trimtab.objectives"
    default: ClassVar[str] = "sft"

    @abstractmethod
    def items(self, pack: Pack) -> int:
        """How many terms the pack's loss sums."""

    @abstractmethod
    def loss(self, logprobs: Tensor, pack: Pack) -> Tensor:
        """The sum of those terms, a scalar, from Σ log p of each of the pack's sequences (S)."""
