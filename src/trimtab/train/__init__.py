"""The loop and its schedule."""

from trimtab.train.config import TrainConfig, learning_rate
from trimtab.train.loop import Step, peak_learning_rate, train
from trimtab.train.optimizer import Optimizer
from trimtab.train.steps import PlannedSteps, planned_memory

__all__ = ["Optimizer", "PlannedSteps", "Step", "TrainConfig", "learning_rate", "peak_learning_rate", "planned_memory", "train"]
