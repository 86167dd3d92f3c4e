"""Simple preference optimization: make chosen answers more likely per token than rejected ones; no reference model."""

from typing import Annotated, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from trimtab.objectives._pairs import Answers, Pairwise


class SimPO(Pairwise):
    """Of two answers, make the chosen one more likely per token than the rejected one; without a reference model.

    −log σ(β (log π(chosen)/tokens − log π(rejected)/tokens) − γ), over pairs (Meng, Xia, Chen 2024, arXiv:2405.14734, eq. 6).
    """

    lr_multiplier: ClassVar[float] = 0.1

    beta: Annotated[float, Field(gt=0)] = 2.0
    """Scale of the reward."""
    gamma: Annotated[float, Field(ge=0)] = 1.0
    """The margin by which the reward of a chosen answer is to be larger."""

    def pair_losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        return -F.logsigmoid(self.reward(chosen) - self.reward(rejected) - self.gamma)

    def reward(self, answers: Answers) -> Tensor:
        return self.beta * answers.mean
