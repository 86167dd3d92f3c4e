"""BitFit: biases are trained, and nothing else.

Ben Zaken et al. 2021, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
arXiv:2106.10199.
"""

import copy
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from trimtab.core.errors import NotMergeable
from trimtab.core.wrapping import modules, unwrap
from trimtab.methods._base import AdapterLayer, LearningRateContext, Method, matrix_shape, wide
from trimtab.methods._peft import SELECTING, from_names, not_pefts, only_known, shortest_names, to_names
from trimtab.methods._targets import ALL_LINEAR, Targets, matrices
from trimtab.methods._weight_copies import ALL, norms, within

NAMES = {"bias": "beft_bias"}
"""PEFT's name of ours."""


class BitFit(Method):
    """Adds a vector to what each targeted matrix gives, whether or not it has a bias of its own.

    Only what has a bias can be merged. PEFT calls the same, without norms and Conv1D, BEFT.
    """

    peft_type: ClassVar[str | None] = "BEFT"

    targets: Targets = (ALL,)
    """Where: `all` (matrices in the blocks, and norms that have a bias), or names (`q_proj`, `mlp`) or regular expressions of these."""

    def sizes(self, model: nn.Module) -> dict[str, int]:
        """path -> numbers added, in the model's order. Raises NoSuchModule."""
        everything = modules(model)
        of_blocks = matrices(model, [ALL_LINEAR if ALL in self.targets else ".+"])
        sizes = {path: outputs for path, (_, outputs) in of_blocks.items()}
        sizes |= {path: bias.numel() for path in norms(model) if (bias := _bias(everything[path])) is not None}
        chosen = within(model, sizes, self.targets, "targets")
        return {path: sizes[path] for path in everything if path in chosen}

    def sites(self, model: nn.Module) -> list[str]:
        return list(self.sizes(model))

    def layer(self, base: nn.Module, path: str) -> "BiasLayer":
        return BiasLayer(base, path)

    def parameter_count(self, model: nn.Module) -> int:
        """Σ outputs over the targeted matrices, and the sizes of the norms that have a bias."""
        return sum(self.sizes(model).values())

    def learning_rate(self, at: LearningRateContext) -> tuple[float, str]:
        """1e-2, by a small search: see docs/methods.md."""
        return 1e-2, "1e-2"

    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        everything, sites = modules(model), self.sites(model)
        if not all(isinstance(everything[path], nn.Linear) for path in sites):
            return not_pefts(self.name), to_names(tensors, NAMES)
        config = {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "target_modules": shortest_names(sites, list(everything)),
        }
        return config, to_names({key: bias[None] for key, bias in tensors.items()}, NAMES)

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        only_known(config, honoured=set(), neutral={}, ignored={"init_weights", *SELECTING})
        renamed, paths = from_names(tensors, NAMES, "BitFit")
        return cls.parse({"targets": paths}), {key: bias.flatten() for key, bias in renamed.items()}


class BiasLayer(AdapterLayer):
    """y = base(x) + bias."""

    def __init__(self, base: nn.Module, path: str) -> None:
        super().__init__(base)
        self.path = path
        shape, own = matrix_shape(base), _bias(base)
        size = shape[1] if shape is not None else own.numel() if own is not None else 0
        self.bias = nn.Parameter(torch.zeros(size, dtype=wide(next(base.parameters()))))

    def adapt(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.bias.to(y.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        module = unwrap(self.base)
        own = _bias(module)
        if own is None:
            raise NotMergeable(
                f"{self.path} has no bias in this architecture, so there is nowhere for bitfit's to go. Use the adapter beside its "
                "base model, or name only targets that have a bias."
            )
        made: Any = copy.deepcopy(module)
        made.bias = nn.Parameter(own + self.bias, requires_grad=False)
        return made


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None
