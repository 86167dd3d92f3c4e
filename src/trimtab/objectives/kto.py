"""Kahneman-Tversky optimization: make good answers likelier and bad ones less likely, from answers judged one by one."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from trimtab.core.errors import DataError
from trimtab.core.transfer import numbers_like, to_device
from trimtab.data import Kind, Pack
from trimtab.data.example import TokenRow
from trimtab.objectives._base import KL, ReferenceObjective, correctness

Weight = Literal["auto"] | Annotated[float, Field(gt=0)]


class KTO(ReferenceObjective):
    """Make good answers likelier and bad ones less likely, measured by a reference model.

    With r(y) = log π(y) / π_reference(y), over answers (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8):

    desirable · (1 − σ(β (r − z))) for a good one, undesirable · (1 − σ(β (z − r))) for a bad one, where z = max(0, mean of r
    over the step's mismatched answers), through which no gradient goes.
    """

    data_kind: ClassVar[Kind] = "judged"
    estimates_kl: ClassVar[bool] = True
    lr_multiplier: ClassVar[float] = 0.1

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How dearly the model pays for leaving the reference."""
    desirable: Weight = "auto"
    """Weight of good answers; auto makes those of all good and of all bad answers together the same, and none smaller than 1."""
    undesirable: Weight = "auto"
    """Weight of bad answers."""

    def resolve_auto(self, rows: Sequence[TokenRow]) -> Self:
        good, bad = (sum(row.side == side for row in rows) for side in ("good", "bad"))
        if not good or not bad:
            raise DataError(f"data: kto trains on good and bad answers, and there are {good:,} good and {bad:,} bad ones.")
        balanced = {"desirable": max(1.0, bad / good), "undesirable": max(1.0, good / bad)}
        return self.model_copy(update={key: value for key, value in balanced.items() if getattr(self, key) == "auto"})

    def counts(self, pack: Pack) -> list[float]:
        return [1] * len(pack.rows)

    def losses(self, logprobs: Tensor, pack: Pack, kl: KL) -> Tensor:
        sign, weight = self._of_sides(pack, logprobs)
        margin = sign * self.beta * (_ratio(logprobs, pack) - kl)
        return weight * F.logsigmoid(-margin).exp()  # 1 − σ(margin), where that and its slope would round to 0 and 1, too

    def measures(self, logprobs: Tensor, pack: Pack, kl: KL) -> dict[str, Tensor]:
        sign, _ = self._of_sides(pack, logprobs)
        reward = self.beta * _ratio(logprobs, pack)
        places = {side: [n for n, row in enumerate(pack.rows) if row.side == side] for side in ("good", "bad")}
        sides = {
            f"{side}_{what}": value.index_select(0, to_device(numbers, value.device))
            for side, numbers in places.items()
            for what, value in (("reward", reward), ("logp", logprobs))
        }
        return {"accuracy": correctness(sign * (reward - self.beta * kl)), "kl": torch.zeros_like(reward) + kl, **sides}

    def kl_estimate(self, log_ratios: Tensor) -> KL:
        return log_ratios.mean().clamp(min=0) if len(log_ratios) else 0.0

    def _of_sides(self, pack: Pack, like: Tensor) -> tuple[Tensor, Tensor]:
        """Of each answer, 1 if it is good and −1 if it is bad; and its weight."""
        assert self.desirable != "auto", "resolve_auto was not called"
        assert self.undesirable != "auto", "resolve_auto was not called"
        known = {"good": (1.0, self.desirable), "bad": (-1.0, self.undesirable)}
        sign, weight = zip(*(known[row.side or ""] for row in pack.rows), strict=True)
        return numbers_like(sign, like), numbers_like(weight, like)


def _ratio(logprobs: Tensor, pack: Pack) -> Tensor:
    """log π / π_reference of each answer."""
    return logprobs - numbers_like([row.reference for row in pack.rows], logprobs)
