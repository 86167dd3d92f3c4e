"""Contrastive preference optimization: make chosen answers more likely than rejected ones, and train on them; no reference model."""

from typing import Annotated, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from trimtab.objectives._pairs import Answers, Pairwise


class CPO(Pairwise):
    """Of two answers, train on the chosen one, and make it more likely than the rejected one; without a reference model.

    −log σ(β (log π(chosen) − log π(rejected))) − sft · log π(chosen)/tokens, over pairs (Xu et al. 2024, arXiv:2401.08417,
    eq. 4 and 5).
    """

    lr_multiplier: ClassVar[float] = 0.1

    beta: Annotated[float, Field(gt=0)] = 0.1
    """Scale of the reward."""
    sft: Annotated[float, Field(ge=0)] = 1.0
    """Weight of supervised fine-tuning on the chosen answers beside that."""

    def pair_losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        return -F.logsigmoid(self.reward(chosen) - self.reward(rejected)) - self.sft * chosen.mean

    def reward(self, answers: Answers) -> Tensor:
        return self.beta * answers.logp
