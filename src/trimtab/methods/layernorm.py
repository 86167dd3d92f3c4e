"""LayerNorm tuning: trains the scales and shifts of a model's norms and nothing else.

Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", arXiv:2312.11420.
"""

from typing import Any, ClassVar, Self

from torch import Tensor, nn

from trimtab.methods import ALL, Method, Targets, select_modules, shortest_names, to_peft_names
from trimtab.methods._layers import Layers
from trimtab.methods._structure import find_norms
from trimtab.methods._weight_copies import WeightCopyLayer, count_parameters


class LayerNormTuning(Method):
    """Trains copies of the weights of the model's norms: LayerNorm, RMSNorm and their like, including those of queries and keys."""

    peft_type: ClassVar[str | None] = "LN_TUNING"
    peft_names: ClassVar[dict[str, str]] = {name: f"ln_tuning_layers.{name}" for name in ("weight", "bias")}
    auto_lr: ClassVar[str] = "3e-3"

    targets: Targets = (ALL,)
    """Which norms: `all`, or names (`input_layernorm`, `layers.0`) or regular expressions of norms or of modules that contain them."""

    layers: Layers = None

    def sites(self, model: nn.Module) -> list[str]:
        norms = find_norms(model)
        selected = select_modules(model, norms, self.targets, "targets", self.layers)
        return [path for path in norms if path in selected]

    def layer(self, base: nn.Module, path: str) -> WeightCopyLayer:
        return WeightCopyLayer(base, path)

    def parameter_count(self, model: nn.Module) -> int:
        """Σ size of the norm, twice that if it has a bias."""
        return count_parameters(model, self.sites(model))

    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = self.peft_config(target_modules=shortest_names(model, self.sites(model)))
        return config, to_peft_names(tensors, self.peft_names)

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        renamed, paths = cls.read_peft(config, tensors)
        return cls.parse({"targets": paths}), renamed
