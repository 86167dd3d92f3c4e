"""LayerNorm tuning: the scales and shifts of a model's norms are trained, and nothing else.

Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", arXiv:2312.11420.
"""

from typing import Any, ClassVar, Self

from torch import Tensor, nn

from trimtab.core.wrapping import modules
from trimtab.methods._base import LearningRateContext, Method
from trimtab.methods._peft import SELECTING, from_names, only_known, shortest_names, to_names
from trimtab.methods._targets import Targets
from trimtab.methods._weight_copies import ALL, CopyLayer, count, norms, within

NAMES = {"weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"}
"""PEFT's names of ours."""


class LayerNormTuning(Method):
    """Trains copies of the weights of the model's norms: LayerNorm, RMSNorm and their like, those of queries and keys too."""

    peft_type: ClassVar[str | None] = "LN_TUNING"

    targets: Targets = (ALL,)
    """Which norms: `all`, or names (`input_layernorm`, `layers.0`) or regular expressions of norms or of modules that they are in."""

    def sites(self, model: nn.Module) -> list[str]:
        found = norms(model)
        chosen = within(model, found, self.targets, "targets")
        return [path for path in found if path in chosen]

    def layer(self, base: nn.Module, path: str) -> CopyLayer:
        return CopyLayer(base, path)

    def parameter_count(self, model: nn.Module) -> int:
        """Σ size of the norm, twice that if it has a bias."""
        return count(model, self.sites(model))

    def learning_rate(self, at: LearningRateContext) -> tuple[float, str]:
        """3e-3, by a small search: see docs/methods.md."""
        return 3e-3, "3e-3"

    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "target_modules": shortest_names(self.sites(model), list(modules(model))),
        }
        return config, to_names(tensors, NAMES)

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        only_known(config, honoured=set(), neutral={}, ignored=SELECTING)
        renamed, paths = from_names(tensors, NAMES, "LayerNorm tuning")
        return cls.parse({"targets": paths}), renamed
