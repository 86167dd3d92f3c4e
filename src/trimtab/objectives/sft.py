"""Supervised fine-tuning: make the learned tokens likely."""

from torch import Tensor

from trimtab.data.pack import Pack
from trimtab.objectives._base import Objective


class SFT(Objective):
    """loss = −Σ log p(token) / number of learned tokens, over the whole optimizer step."""

    def items(self, pack: Pack) -> int:
        return pack.targets

    def loss(self, logprobs: Tensor, pack: Pack) -> Tensor:
        return -logprobs.sum()
