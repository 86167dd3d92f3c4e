"""LoRA: a trainable low-rank change of a frozen weight matrix.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, equation 3.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from trimtab.core.errors import RecipeError
from trimtab.methods import AdapterLayer, LowRankUpdate, MatrixShape, Method, Sample
from trimtab.methods._lora_init import draw_gaussian, init_from_inputs, principal_factors
from trimtab.methods._lowrank import LowRank, LowRankExperts, LowRankLayer


class LoRA(LowRank):
    """Adds `alpha / rank · B A` to each targeted matrix."""

    init: Literal["default", "gaussian", "pissa", "eva"] = "default"
    """Initial values of A and B: A random and B zero, or from the model's matrices (`pissa`) or the data (`eva`).

    A is uniform within ±1/√inputs by default, and normal with a standard deviation of 1/rank with `gaussian`, as in PEFT.
    PiSSA (Meng et al. 2024, arXiv:2404.02948) trains the principal part of each matrix: A and B start as it, and their
    initial product is subtracted. EVA (Paischer et al. 2024, arXiv:2410.07170) starts A as the principal directions of
    each matrix's inputs on the first training examples, and B as zero; every matrix keeps its rank, where the authors
    also move ranks between them.
    """

    def shapes(self, model: nn.Module) -> dict[str, MatrixShape]:
        """The targeted matrices by path. Raises NoSuchModule, or RecipeError for an `init` that fused experts do not have."""
        shapes = super().shapes(model)
        if self.init in ("pissa", "eva") and (experts := [path for path, shape in shapes.items() if shape.experts]):
            raise RecipeError(
                f"init: {self.init} starts from each matrix by itself, and {experts[0]} holds those of {shapes[experts[0]].experts} experts in "
                "one tensor, which Trimtab does not do. Set init: default or gaussian, or name other targets, such as attention."
            )
        return shapes

    def layer(self, base: nn.Module, path: str) -> AdapterLayer:
        layer = self.experts_layer(base, path, LowRankExperts) or self._layer(base, path)
        if self.init == "gaussian":
            draw_gaussian(layer)
        return layer

    def _layer(self, base: nn.Module, path: str) -> "LoRALayer":
        rank, scale = self.rank_of(path), self.scale_of(path)
        if self.init == "pissa":
            return PiSSALayer(base, rank, scale, self.dropout, path)
        return LoRALayer(base, rank, scale, self.dropout)

    def initialize(self, model: nn.Module, layers: dict[str, AdapterLayer], sample: Sample) -> None:
        if self.init == "eva":
            init_from_inputs(model, layers, sample.rows)

    def to_inference_form(self, layers: dict[str, AdapterLayer]) -> tuple[Method, dict[str, Tensor]]:
        """PiSSA's is a plain LoRA of twice the rank, with the same scale."""
        if self.init != "pissa":
            return super().to_inference_form(layers)
        factor = math.sqrt(2) if self.rank_stabilized else 2.0
        plain = self.plain() | {
            "init": "default",
            "rank": 2 * self.rank,
            "ranks": {pattern: 2 * rank for pattern, rank in self.ranks.items()},
            "alpha": factor * self.alpha,
            "alphas": {pattern: factor * alpha for pattern, alpha in self.alphas.items()},
        }
        factors = {path: layer.factors() for path, layer in layers.items() if isinstance(layer, LoRALayer)}
        return Method.pick(plain), {
            f"{path}.{name}": t for path, pair in factors.items() for name, t in zip("AB", pair, strict=True)
        }


class LoRALayer(LowRankLayer):
    """y = base(x) + scale · drop(x) Aᵀ Bᵀ. Of an embedding: base(token) + scale · A[:, token]ᵀ Bᵀ."""

    def adapt(self, x: Tensor) -> Tensor:
        return self.add(self.base(x), x, *self.factors())

    def low_rank_factors(self) -> LowRankUpdate:
        A, B = self.factors()
        return LowRankUpdate(A, B if self.scale == 1.0 else self.scale * B, self.dropout.p if self.dropout.training else 0.0)


class PiSSALayer(LoRALayer):
    """y = base(x) + scale · drop(x) (B A − B0 A0)ᵀ, where A0 and B0 are the initial A and B: scale · B0 A0 ≈ W."""

    A0: Tensor
    B0: Tensor

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float, path: str) -> None:
        super().__init__(base, rank, scale, dropout)
        A, B = principal_factors(base, rank, scale, path)
        with torch.no_grad():
            self.A.copy_(A)
            self.B.copy_(B)
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    def factors(self) -> tuple[Tensor, Tensor]:
        """B A − B0 A0 = (B − B0) A + B0 (A − A0): exactly zero at the start, and no difference of large products later."""
        return torch.cat([self.A, self.A - self.A0]), torch.cat([self.B - self.B0, self.B0], dim=1)
