"""Supervised fine-tuning: make the target tokens likely."""

from torch import Tensor

from trimtab.data.pack import Pack
from trimtab.objectives._base import KL, Objective


class SFT(Objective):
    """loss = −Σ w log p(token) / Σ w over the target tokens of the whole optimizer step, with w = 1 but where messages have weights."""

    def counts(self, pack: Pack) -> list[float]:
        return [row.total_weight for row in pack.rows]

    def losses(self, logprobs: Tensor, pack: Pack, kl: KL) -> Tensor:
        return -logprobs
