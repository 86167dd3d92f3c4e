"""MiSS: every r-th input of a matrix shares its change of weights.

Kang & Yin 2024, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure" (formerly Bone),
arXiv:2409.15371. As in PEFT's MISS with its default `init_weights`; its `bat` and `mini` are other methods.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from trimtab.core.errors import RecipeError
from trimtab.methods import (
    AdapterLayer,
    MatrixMethod,
    MatrixShape,
    require_matrix_shape,
    targeted_experts,
    trainable_dtype,
    with_weight,
)
from trimtab.methods._experts_layer import ExpertMatrices, ExpertPart, ExpertsLayer


class MiSS(MatrixMethod):
    """Adds rank × outputs trained numbers to each targeted matrix, repeated along its inputs."""

    peft_type: ClassVar[str | None] = "MISS"
    auto_lr: ClassVar[str] = "3e-4"
    peft_names: ClassVar[dict[str, str]] = {"D": "miss_block"}
    adapts_experts: ClassVar[bool] = True

    rank: Annotated[int, Field(ge=1)] = 64
    """How many consecutive inputs have changes of their own; the following inputs repeat them."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which an input of the change is dropped in training."""

    def shapes(self, model: nn.Module) -> dict[str, MatrixShape]:
        """The targeted matrices by path. Raises NoSuchModule, or RecipeError for too large a rank."""
        shapes = super().shapes(model)
        for path, (inputs, *_) in shapes.items():
            if self.rank > inputs:
                raise RecipeError(f"rank: {self.rank} is more than the {inputs} inputs of {path}; it can be {inputs} at most.")
        return shapes

    def layer(self, base: nn.Module, path: str) -> AdapterLayer:
        experts = targeted_experts(path, base, self.targets)
        parts = {at.rpartition(".")[2]: MiSSExperts(base, shape, self.rank, self.dropout) for at, shape in experts.items()}
        return ExpertsLayer(base, parts) if parts else MiSSLayer(base, self.rank, self.dropout)

    def parameter_count(self, model: nn.Module) -> int:
        """Σ rank · outputs over the targeted matrices, each expert's counted."""
        return sum(self.rank * at.outputs * at.copies for at in self.shapes(model).values())

    def peft_settings(self) -> dict[str, Any]:
        return {"r": self.rank, "miss_dropout": self.dropout, "init_weights": True}

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        renamed, paths = cls.read_peft(
            config,
            tensors,
            honoured={"r", "miss_dropout"},
            neutral={"bias": ("none",), "init_weights": (True,)},
            ignored={"mini_r"},  # mini_r is read with init_weights "mini" alone
        )
        return cls.parse({"rank": config.get("r", 64), "dropout": config.get("miss_dropout", 0.0), "targets": paths}), renamed


class MiSSLayer(AdapterLayer):
    """y = base(x) + s D, where s (rank) is the sum of drop(x)'s shards of `rank` numbers each, the last filled up with zeros.

    So W[o, i] changes by D[i mod rank, o]. D (rank, outputs) starts as zero.
    """

    def __init__(self, base: nn.Module, rank: int, dropout: float) -> None:
        super().__init__(base)
        self.dropout = nn.Dropout(dropout)
        self.inputs, outputs = require_matrix_shape(base)
        self.D = nn.Parameter(torch.zeros(rank, outputs, dtype=trainable_dtype(base)))

    def adapt(self, x: Tensor) -> Tensor:
        y, summed = self.base(x), _shard_sums(self.dropout(x), len(self.D))
        return torch.addmm(y.flatten(0, -2), summed.flatten(0, -2), self.D.to(y.dtype)).view_as(y)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        return with_weight(self.base, lambda weight: weight + _repeated(self.D, self.inputs))


class MiSSExperts(ExpertPart):
    """The same for a matrix of each expert: D (experts, rank, outputs)."""

    def __init__(self, base: nn.Module, shape: MatrixShape, rank: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.D = nn.Parameter(torch.zeros(shape.experts, rank, shape.outputs, dtype=trainable_dtype(base)))

    def adapt(self, base: Callable[[Tensor], Tensor], at: ExpertMatrices, x: Tensor) -> Tensor:
        return base(x) + at.rows.times(_shard_sums(self.dropout(x), self.D.shape[1]), self.D.mT.to(x.dtype))

    def merged(self, weight: Tensor) -> Tensor:
        return weight + _repeated(self.D, weight.shape[2])


def _shard_sums(x: Tensor, rank: int) -> Tensor:
    """The sum of x's shards of `rank` numbers each."""
    return F.pad(x, (0, -x.shape[-1] % rank)).unflatten(-1, (-1, rank)).sum(dim=-2)


def _repeated(D: Tensor, inputs: int) -> Tensor:
    """The change of the matrix, outputs inputs."""
    return D.mT[..., torch.arange(inputs, device=D.device) % D.shape[-2]]
