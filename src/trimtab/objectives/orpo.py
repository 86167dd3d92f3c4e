"""Odds ratio preference optimization: learn chosen answers, and make their odds larger than those of rejected ones, without a reference."""

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from trimtab.objectives._pairs import Answers, Pairwise


class ORPO(Pairwise):
    """Of two answers, learn the chosen one, and make its odds larger than those of the rejected one; without a reference.

    −log π(chosen)/tokens − weight · log σ(o(chosen) − o(rejected)), over pairs, where o(y) = log(p / (1 − p)) with
    log p = log π(y)/tokens (Hong, Lee, Thorne 2024, arXiv:2403.07691, eq. 6 and 7).
    """

    relative_rate: ClassVar[float] = 0.5

    weight: Annotated[float, Field(gt=0)] = 0.1
    """Of the odds ratio beside the likelihood; the paper's λ."""

    def pair_losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        return -chosen.mean - self.weight * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))

    def reward(self, answers: Answers) -> Tensor:
        return self.weight * answers.mean


def _log_odds(answers: Answers) -> Tensor:
    return answers.mean - torch.log(-torch.expm1(answers.mean))
