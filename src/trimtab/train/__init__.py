"""The loop and its schedule."""

from trimtab.train.config import TrainConfig, learning_rate
from trimtab.train.loop import Step, peak_learning_rate, planned_memory, train

__all__ = ["Step", "TrainConfig", "learning_rate", "peak_learning_rate", "planned_memory", "train"]
