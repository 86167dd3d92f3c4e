"""DoRA: LoRA changes the direction of each output's weights, and a trained magnitude sets their norm.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, equation 5.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.methods import AdapterLayer, unwrap, weight_matrix, with_weight
from trimtab.methods._experts import as_matrices
from trimtab.methods._experts_layer import ExpertMatrices
from trimtab.methods._lowrank import LowRank, LowRankExperts, LowRankLayer


class DoRA(LowRank):
    """Replaces each targeted matrix W by m · (W + alpha / rank · B A) / ‖W + alpha / rank · B A‖, norms by output."""

    peft_names: ClassVar[dict[str, str]] = {**LowRank.peft_names, "magnitude": "lora_magnitude_vector"}
    peft_variant: ClassVar[dict[str, Any]] = {"use_dora": True}
    exact_gradient: ClassVar[bool] = False

    def layer(self, base: nn.Module, path: str) -> AdapterLayer:
        if (experts := self.experts_layer(base, path, DoRAExperts)) is not None:
            return experts
        return DoRALayer(base, self.rank_of(path), self.scale_of(path), self.dropout)

    def parameter_count(self, model: nn.Module) -> int:
        """Σ rank · (inputs + outputs) + outputs over the targeted matrices, each expert's counted."""
        return super().parameter_count(model) + sum(at.outputs * at.copies for at in self.shapes(model).values())


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
        """g, one number an output."""
        return _gain(self.magnitude, weight_matrix(self.base), self.A, self.scale * self.B)

    def adapt(self, x: Tensor) -> Tensor:
        y, gain = self.base(x), self.gain()
        bias = getattr(unwrap(self.base), "bias", None)
        straight = y if bias is None else y - bias
        # y + (g − 1) · straight, rather than g · straight, is y itself where g is 1
        return self.add(y + (gain - 1).to(y.dtype) * straight, x, self.A, gain[:, None] * self.B)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        return with_weight(self.base, lambda weight: self.gain()[:, None] * (weight + self.change()))


class DoRAExperts(LowRankExperts):
    """The same for a matrix of each expert, with a magnitude for each output of each."""

    def __init__(self, base: nn.Module, name: str, rank: int, scale: float, dropout: float) -> None:
        super().__init__(base, name, rank, scale, dropout)
        weight = as_matrices(base, getattr(base, name))
        self.magnitude = nn.Parameter(weight.to(self.A.dtype).square().sum(dim=2).sqrt().detach())

    def gain(self, weight: Tensor) -> Tensor:
        """g, experts outputs."""
        return _gain(self.magnitude, weight.to(self.A.dtype), self.A, self.scale * self.B)

    def adapt(self, base: Callable[[Tensor], Tensor], at: ExpertMatrices, x: Tensor) -> Tensor:
        y, gain = base(x), self.gain(at.weight)
        straight = y if at.bias is None else y - at.rows.of(at.bias)
        return self.add(y + at.rows.of(gain - 1).to(y.dtype) * straight, x, at, gain[:, :, None] * self.B)

    def merged(self, weight: Tensor) -> Tensor:
        return self.gain(weight)[:, :, None] * super().merged(weight)


def _gain(magnitude: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """m / ‖W + B A‖ of each output, the norm as a constant: exactly 1 at the start, or 0 where W is."""
    with torch.no_grad():  # ‖w + b A‖² = ‖w‖² + 2 w·(b A) + ‖b A‖², without ever holding B A
        squared = weight.square().sum(dim=-1) + (2 * (weight @ A.mT) * B).sum(dim=-1) + (B @ (A @ A.mT) * B).sum(dim=-1)
        norm = squared.clamp(min=0).sqrt()
    return magnitude / torch.where(norm == 0, 1.0, norm)
