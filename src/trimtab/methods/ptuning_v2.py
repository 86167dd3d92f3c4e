"""P-tuning v2: keys and values before every row, in every layer, trained directly.

Liu et al. 2021, "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks",
arXiv:2110.07602, section 3.
"""

import torch
from torch import Tensor, nn

from trimtab.methods._base import LearningRateContext
from trimtab.methods._keysvalues import KeysValuesTuning, PrefixLayer
from trimtab.methods._virtual import Shape, attention_shape, number_type


class PTuningV2(KeysValuesTuning):
    """Trains the keys and values of virtual tokens in every layer."""

    def layer(self, base: nn.Module, path: str) -> "DirectPrefix":
        return DirectPrefix(base, self.tokens, attention_shape(base))

    def parameter_count(self, model: nn.Module) -> int:
        """tokens · layers · 2 · key-value heads · head size."""
        return self.tokens * attention_shape(model).numbers

    def learning_rate(self, at: LearningRateContext) -> tuple[float, str]:
        """3e-2, by a small search: see docs/methods.md."""
        return 3e-2, "3e-2"


class DirectPrefix(PrefixLayer):
    """softmax(q [K_prefix; K]ᵀ) [V_prefix; V], in each layer."""

    def __init__(self, base: nn.Module, count: int, shape: Shape) -> None:
        super().__init__(base, count, shape)
        self.keys_and_values = nn.Parameter(0.02 * torch.randn(count, shape.numbers, dtype=number_type(base)))

    def table(self) -> Tensor:
        return self.keys_and_values

    def start_as(self, table: Tensor) -> None:
        self.keys_and_values.copy_(table)
