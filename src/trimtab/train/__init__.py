"""The training loop: what to do in each step, and with how much memory."""

from trimtab.train.config import TrainConfig
from trimtab.train.corpus_steps import CorpusSteps, memory_of, steps_of
from trimtab.train.loop import Step, peak_learning_rate, train
from trimtab.train.loss_scale import LossScale
from trimtab.train.neftune import noise_problem
from trimtab.train.optimizer import Optimizer
from trimtab.train.optimizers import UpdateRule
from trimtab.train.schedule import learning_rate
from trimtab.train.steps import TrainingSteps, optimizer_bytes, plan_training_memory

__all__ = [
    "CorpusSteps", "LossScale", "Optimizer", "Step", "TrainConfig", "TrainingSteps", "UpdateRule", "learning_rate", "memory_of",
    "noise_problem", "optimizer_bytes", "peak_learning_rate", "plan_training_memory", "steps_of", "train",
]  # fmt: skip
