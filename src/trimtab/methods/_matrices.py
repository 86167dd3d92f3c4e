"""What the methods that adapt whole matrices of the blocks, in a PEFT format of their own, have in common: targets and that format."""

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from trimtab.core.wrapping import modules
from trimtab.methods._base import Method
from trimtab.methods._peft import not_pefts, shortest_names, to_names
from trimtab.methods._targets import ALL_LINEAR, Targets, matrices


class OfMatrices(Method):
    """The part of the hyperparameters that they share."""

    peft_names: ClassVar[dict[str, str]]
    """PEFT's names of ours."""

    targets: Targets = (ALL_LINEAR,)
    """Which matrices: `all-linear`, `attention`, names such as `q_proj`, or regular expressions, such as `[qv]_proj`."""

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """The targeted matrices: path -> (inputs, outputs). Raises NoSuchModule; RecipeError where a method does not fit one."""
        return matrices(model, self.targets)

    def sites(self, model: nn.Module) -> list[str]:
        return list(self.shapes(model))

    @abstractmethod
    def peft_settings(self) -> dict[str, Any]:
        """The method's own keys in PEFT's configuration."""

    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT has these methods for nn.Linear alone."""
        everything, sites = modules(model), self.sites(model)
        config = {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "target_modules": shortest_names(sites, list(everything)),
            "bias": "none",
            **self.peft_settings(),
        }
        linear = all(isinstance(everything[path], nn.Linear) for path in sites)
        return config if linear else not_pefts(self.name), to_names(tensors, self.peft_names)
