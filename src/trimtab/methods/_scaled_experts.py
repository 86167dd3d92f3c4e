"""(IA)³ on fused experts: trained vectors that scale the outputs or inputs of each expert's matrix."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trimtab.methods import MatrixShape, trainable_dtype
from trimtab.methods._experts_layer import ExpertMatrices, ExpertPart


class ScaledExperts(ExpertPart):
    """y = scale ⊙ base(x), or base(scale ⊙ x), for a matrix of each expert; scale (experts, outputs or inputs) starts as ones."""

    def __init__(self, base: nn.Module, shape: MatrixShape, on_inputs: bool) -> None:
        super().__init__()
        self.on_inputs = on_inputs
        size = shape.inputs if on_inputs else shape.outputs
        self.scale = nn.Parameter(torch.ones(shape.experts, size, dtype=trainable_dtype(base)))

    def adapt(self, base: Callable[[Tensor], Tensor], at: ExpertMatrices, x: Tensor) -> Tensor:
        scale = at.rows.of(self.scale)
        return base((x * scale).to(x.dtype)) if self.on_inputs else (base(x) * scale).to(x.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        return weight * (self.scale[:, None] if self.on_inputs else self.scale[:, :, None])

    def merged_bias(self, bias: Tensor) -> Tensor:
        return bias if self.on_inputs else bias * self.scale
