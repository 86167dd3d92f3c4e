"""DoRA: LoRA changes the direction of each output's weights, and a trained magnitude sets their norm.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, equation 5.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.methods import unwrap, weight_matrix, with_weight
from trimtab.methods._lowrank import LowRank, LowRankLayer


class DoRA(LowRank):
    """Replaces each targeted matrix W by m · (W + alpha / rank · B A) / ‖W + alpha / rank · B A‖, norms by output."""

    peft_names: ClassVar[dict[str, str]] = {**LowRank.peft_names, "magnitude": "lora_magnitude_vector"}
    peft_variant: ClassVar[dict[str, Any]] = {"use_dora": True}
    exact_gradient: ClassVar[bool] = False

    def layer(self, base: nn.Module, path: str) -> "DoRALayer":
        return DoRALayer(base, self.rank_of(path), self.scale_of(path), self.dropout)

    def parameter_count(self, model: nn.Module) -> int:
        """Σ rank · (inputs + outputs) + outputs over the targeted matrices."""
        return super().parameter_count(model) + sum(outputs for _, outputs in self.shapes(model).values())


class DoRALayer(LowRankLayer):
    """y = b + g (W x + scale · B A drop(x)), with the gain g = m / ‖W + scale · B A‖ of each output; m starts as ‖W‖.

    The norm counts as constant in the backward pass (the paper's section 4.3), which saves most of the memory. The norms
    are one per output, as in the authors' code and in PEFT, where the paper says columns. An output whose weights are all zero
    has no direction that could be turned, and stays as it is (in the authors' code, and in PEFT, it is 0/0).
    """

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__(base, rank, scale, dropout)
        self.magnitude = nn.Parameter(weight_matrix(base).square().sum(dim=1).sqrt().detach())

    def gain(self) -> Tensor:
        """g, one number an output: exactly 1 at the start, or 0 where W is."""
        with torch.no_grad():  # ‖w + s B a‖² = ‖w‖² + 2 s w·(B a) + s² ‖B a‖², without ever holding B A
            weight, A, B = weight_matrix(self.base), self.A, self.scale * self.B
            squared = weight.square().sum(dim=1) + (2 * (weight @ A.T) * B).sum(dim=1) + (B @ (A @ A.T) * B).sum(dim=1)
            norm = squared.clamp(min=0).sqrt()
        return self.magnitude / torch.where(norm == 0, 1.0, norm)

    def adapt(self, x: Tensor) -> Tensor:
        y, gain = self.base(x), self.gain()
        bias = getattr(unwrap(self.base), "bias", None)
        straight = y if bias is None else y - bias
        # y + (g − 1) · straight, rather than g · straight, is y itself where g is 1
        return self.add(y + (gain - 1).to(y.dtype) * straight, x, self.A, gain[:, None] * self.B)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        return with_weight(self.base, lambda weight: self.gain()[:, None] * (weight + self.change()))
