"""LoRA: a trainable low-rank change of a frozen weight matrix.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, equation 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.methods._lowrank import LowRank, LowRankLayer


class LoRA(LowRank):
    """Adds `alpha / rank · B A` to each targeted matrix."""

    def layer(self, base: nn.Module, path: str) -> "LoRALayer":
        return LoRALayer(base, self.rank_of(path), self.scale_of(path), self.dropout)


class LoRALayer(LowRankLayer):
    """y = base(x) + scale · drop(x) Aᵀ Bᵀ. Of an embedding: base(token) + scale · A[:, token]ᵀ Bᵀ."""

    def adapt(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not x.is_floating_point():  # tokens of an embedding
            return y + (self.scale * F.embedding(x, self.A.T) @ self.B.T).to(y.dtype)
        update = F.linear(self.dropout(x), self.A.to(x.dtype))
        expand = (self.scale * self.B).to(x.dtype).T
        return torch.addmm(y.flatten(0, -2), update.flatten(0, -2), expand).view_as(y)  # one pass over y, not three
