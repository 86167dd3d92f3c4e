"""BitFit: trains biases and nothing else.

Ben Zaken et al. 2021, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
arXiv:2106.10199.
"""

import copy
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from trimtab.core.errors import NotMergeable
from trimtab.methods import (
    ALL,
    ALL_LINEAR,
    AdapterLayer,
    Method,
    Targets,
    base_modules,
    find_matrices,
    left_frozen,
    matrix_shape,
    select_modules,
    shortest_names,
    to_peft_names,
    trainable_dtype,
    unwrap,
)
from trimtab.methods._layers import Layers
from trimtab.methods._matrices import matrices, refuse_experts
from trimtab.methods._structure import find_norms


class BitFit(Method):
    """Adds a trained vector to the outputs of each targeted matrix, whether or not it has a bias of its own.

    Only what has a bias can be merged. PEFT calls the same, without norms and Conv1D, BEFT.
    """

    peft_type: ClassVar[str | None] = "BEFT"
    peft_names: ClassVar[dict[str, str]] = {"bias": "beft_bias"}
    auto_lr: ClassVar[str] = "1e-2"
    auto_lr_overshoots: ClassVar[bool] = True

    targets: Targets = (ALL,)
    """Which modules: `all` (matrices in the blocks, and norms that have a bias), or names (`q_proj`, `mlp`) or regular expressions of these."""

    layers: Layers = None

    def sizes(self, model: nn.Module) -> dict[str, int]:
        """path -> numbers added, in the model's order. Raises NoSuchModule."""
        own = base_modules(model)
        found = find_matrices(model, [ALL_LINEAR], experts=True, layers=self.layers) if ALL in self.targets else matrices(model)
        if ALL in self.targets:
            refuse_experts(found, f"targets: {ALL}")
        sizes = {path: shape.outputs for path, shape in found.items() if not shape.experts}
        sizes |= {path: bias.numel() for path in find_norms(model) if (bias := _bias(own[path])) is not None}
        selected = select_modules(model, sizes, self.targets, "targets", self.layers)
        return {path: sizes[path] for path in own if path in selected}

    def sites(self, model: nn.Module) -> list[str]:
        return list(self.sizes(model))

    def left_frozen(self, model: nn.Module) -> str:
        return left_frozen(model) if ALL in self.targets else ""

    def layer(self, base: nn.Module, path: str) -> "BiasLayer":
        return BiasLayer(base, path)

    def parameter_count(self, model: nn.Module) -> int:
        """Σ outputs over the targeted matrices, and the sizes of the norms that have a bias."""
        return sum(self.sizes(model).values())

    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        own, sites = base_modules(model), self.sites(model)
        if not all(isinstance(own[path], nn.Linear) for path in sites):
            return self.trimtab_only_config(), to_peft_names(tensors, self.peft_names)
        shaped = {key: bias[None] for key, bias in tensors.items()}
        return self.peft_config(target_modules=shortest_names(model, sites)), to_peft_names(shaped, self.peft_names)

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        renamed, paths = cls.read_peft(config, tensors, ignored={"init_weights"})
        return cls.parse({"targets": paths}), {key: bias.flatten() for key, bias in renamed.items()}


class BiasLayer(AdapterLayer):
    """y = base(x) + bias."""

    def __init__(self, base: nn.Module, path: str) -> None:
        super().__init__(base)
        self.path = path
        shape, bias = matrix_shape(base), _bias(base)
        size = shape[1] if shape is not None else bias.numel() if bias is not None else 0
        self.bias = nn.Parameter(torch.zeros(size, dtype=trainable_dtype(base)))

    def adapt(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.bias.to(y.dtype)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        module = unwrap(self.base)
        own = _bias(module)
        if own is None:
            raise NotMergeable(
                f"{self.path} has no bias in this architecture, so there is nowhere for bitfit's to go. Use the adapter beside its "
                "base model, or name only targets that have a bias."
            )
        merged: Any = copy.deepcopy(module)
        merged.bias = nn.Parameter(own + self.bias, requires_grad=False)
        return merged


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None
