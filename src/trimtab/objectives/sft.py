"""Supervised fine-tuning: make the target tokens likely."""

from torch import Tensor

from trimtab.data.pack import Pack
from trimtab.objectives._base import KL, Objective


class SFT(Objective):
    """loss = −Σ log p(token) / number of target tokens, over the whole optimizer step."""

    def counts(self, pack: Pack) -> list[int]:
        return [len(row.target_indices) for row in pack.rows]

    def losses(self, logprobs: Tensor, pack: Pack, kl: KL) -> Tensor:
        return -logprobs
