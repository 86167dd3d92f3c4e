"""What an engine of a recipe's `distributed` is: how several processes hold the base model, and what makes updates of their gradients.

An adapter is whole on every process, and its gradients are summed once a step, by the loop. Engines differ in the rest; and one divides what
`full` trains, which is as much as the base.
"""

from typing import ClassVar

from trimtab.base import Base, ModelConfig
from trimtab.core.config import Choice
from trimtab.methods import Attached, Method
from trimtab.objectives import Objective
from trimtab.train import Optimizer, TrainConfig


class Engine(Choice):
    """How several processes train together. One concrete subclass per file in this folder; with one process, they are all alike."""

    family: ClassVar[str] = "trimtab.distributed"
    default: ClassVar[str] = "auto"
    key: ClassVar[str] = "engine"

    shards_base: ClassVar[bool] = False
    """Whether each process holds a share of the base model alone, so that all must make the same passes."""

    def absolute(self) -> "Engine":
        """The same engine with every local path absolute."""
        return self

    def choose(self, model: ModelConfig, method: Method) -> "Engine":
        """The engine that this one means here: itself, but for `auto`. The same in all processes, which call it together.

        Raises:
            RecipeError, UnsupportedModel: There is no such model.
        """
        return self

    def check(self, model: ModelConfig, method: Method, objective: Objective, train: TrainConfig) -> None:
        """Raise RecipeError, before anything is read, for what it cannot train, saying what can."""

    def check_base(self, base: Base) -> None:
        """The same of what a loaded base alone shows. Raises RecipeError."""

    def place(self, model: ModelConfig) -> ModelConfig:
        """Where the base is loaded first: on its device, unless it need not fit there."""
        return model

    def prepare(self, base: Base, adapter: Attached, model: ModelConfig) -> None:
        """Make the base ready for passes of all processes together. Afterwards nobody reads its weights outside of passes.

        Args:
            base: Placed as `place` says, with its fingerprint, its layers checked.
            adapter: With its first values, and the same ones in all processes.
            model: The recipe's.

        Raises:
            RecipeError: Its layers cannot be shared out.
        """

    def optimizer(self, adapter: Attached, train: TrainConfig) -> Optimizer:
        """The optimizer of the adapter's parameters, whose gradients are the sums over all processes when it steps."""
        return Optimizer(adapter, train.weight_decay, train.optimizer)
