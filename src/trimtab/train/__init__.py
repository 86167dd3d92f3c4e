"""The training loop: what to do in each step, and with how much memory."""

from trimtab.train.config import TrainConfig, learning_rate
from trimtab.train.loop import Step, peak_learning_rate, train
from trimtab.train.loss_scale import LossScale
from trimtab.train.optimizer import Optimizer
from trimtab.train.steps import TrainingSteps, plan_training_memory

__all__ = [
    "LossScale", "Optimizer", "Step", "TrainConfig", "TrainingSteps", "learning_rate", "peak_learning_rate", "plan_training_memory", "train",
]  # fmt: skip
