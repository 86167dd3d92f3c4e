"""Odds ratio preference optimization: train on chosen answers, and make their odds larger than those of rejected ones; no reference model."""

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from trimtab.objectives._pairs import Answers, Pairwise


class ORPO(Pairwise):
    """Of two answers, train on the chosen one, and make its odds larger than those of the rejected one; without a reference model.

    −log π(chosen)/tokens − weight · log σ(o(chosen) − o(rejected)), over pairs, where o(y) = log(p / (1 − p)) with
    log p = log π(y)/tokens (Hong, Lee, Thorne 2024, arXiv:2403.07691, eq. 6 and 7); 1 − p is taken as at least 2⁻²⁴.
    """

    lr_multiplier: ClassVar[float] = 0.5

    weight: Annotated[float, Field(gt=0)] = 0.1
    """Weight of the odds ratio beside the likelihood; the paper's λ."""

    def pair_losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        return -chosen.mean - self.weight * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))

    def reward(self, answers: Answers) -> Tensor:
        return self.weight * answers.mean


MIN_COMPLEMENT = 2.0**-24
"""The least 1 − p that float32 tells from 0. Below it there is only rounding error, which would be divided by 1 − p."""


def _log_odds(answers: Answers) -> Tensor:
    """U. The odds and their slope are finite even of a certain answer, so that it does not break the step of the others."""
    logp = answers.mean
    logp = (
        logp - (logp + MIN_COMPLEMENT).clamp(min=0).detach()
    )  # detached, so that the slope is the one at MIN_COMPLEMENT, not 0
    return logp - torch.log(-torch.expm1(logp))
