"""The loop and its schedule."""

from trimtab.train.config import TrainConfig, learning_rate
from trimtab.train.loop import Step, peak_learning_rate, planned_memory, train
from trimtab.train.optimizer import Optimizer

__all__ = ["Optimizer", "Step", "TrainConfig", "learning_rate", "peak_learning_rate", "planned_memory", "train"]
