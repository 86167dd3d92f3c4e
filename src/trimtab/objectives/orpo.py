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
    log p = log π(y)/tokens (Hong, Lee, Thorne 2024, arXiv:2403.07691, eq. 6 and 7); 1 − p is taken as at least 2⁻²⁴.
    """

    lr_multiplier: ClassVar[float] = 0.5

    weight: Annotated[float, Field(gt=0)] = 0.1
    """Of the odds ratio beside the likelihood; the paper's λ."""

    def pair_losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        return -chosen.mean - self.weight * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))

    def reward(self, answers: Answers) -> Tensor:
        return self.weight * answers.mean


LEAST = 2.0**-24
"""Of 1 − p: what float32 still tells from 0. Nearer to certainty, rounding is all there is, and it would be divided by 1 − p."""


def _log_odds(answers: Answers) -> Tensor:
    """U. An answer that is certain has odds, and they have a slope, so it does not break the step of the others."""
    logp = answers.mean
    logp = logp - (logp + LEAST).clamp(min=0).detach()  # detached, so that the slope is the one at LEAST, not 0
    return logp - torch.log(-torch.expm1(logp))
