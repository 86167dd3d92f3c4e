"""Prefix tuning: keys and values before every row, in every layer, made by a small network while they are trained.

Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv:2101.00190, equation 3 and section 4.3.
"""

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from trimtab.methods._base import LearningRateContext
from trimtab.methods._keysvalues import KeysValuesTuning, PrefixLayer
from trimtab.methods._virtual import Shape, attention_shape, number_type


class PrefixTuning(KeysValuesTuning):
    """Trains a network that makes the keys and values of virtual tokens in every layer; what it made is saved."""

    as_folded: ClassVar[dict[str, Any]] = {"width": 0}

    width: Annotated[int, Field(ge=0)] = 512
    """Of the network's hidden layer, and of what it reads. 0 once it has been folded away, as it is when saved."""

    def layer(self, base: nn.Module, path: str) -> PrefixLayer:
        shape = attention_shape(base)
        return MadePrefix(base, self.tokens, shape, self.width) if self.width else FoldedPrefix(base, self.tokens, shape)

    def parameter_count(self, model: nn.Module) -> int:
        """tokens · width + (width + 1) · width + (width + 1) · N with N = layers · 2 · key-value heads · head size; folded, tokens · N."""
        numbers, width = attention_shape(model).numbers, self.width
        return self.tokens * width + (width + 1) * width + (width + 1) * numbers if width else self.tokens * numbers

    def learning_rate(self, at: LearningRateContext) -> tuple[float, str]:
        """1e-3, by a small search: see docs/methods.md."""
        return 1e-3, "1e-3"

    @classmethod
    def reads(cls, config: dict[str, Any]) -> bool:
        """PEFT saves what the network made and not the network, so its prefixes are `ptuning_v2` here."""
        return False


class MadePrefix(PrefixLayer):
    """table = start + tanh(E W₁ᵀ + b₁) W₂ᵀ + b₂. Where it starts as real text, W₂ and b₂ are zero at first."""

    start: Tensor

    def __init__(self, base: nn.Module, count: int, shape: Shape, width: int) -> None:
        super().__init__(base, count, shape)
        kind = number_type(base)
        self.embedded = nn.Parameter(torch.randn(count, width, dtype=kind))
        self.hidden = nn.Linear(width, width, dtype=kind)
        self.out = nn.Linear(width, shape.numbers, dtype=kind)
        self.register_buffer("start", torch.zeros(count, shape.numbers, dtype=kind))

    def table(self) -> Tensor:
        return self.start + self.out(torch.tanh(self.hidden(self.embedded)))

    def start_as(self, table: Tensor) -> None:
        self.start.copy_(table)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)


class FoldedPrefix(PrefixLayer):
    """A table that was made before."""

    def __init__(self, base: nn.Module, count: int, shape: Shape) -> None:
        super().__init__(base, count, shape)
        self.keys_and_values = nn.Parameter(torch.zeros(count, shape.numbers, dtype=number_type(base)))

    def table(self) -> Tensor:
        return self.keys_and_values

    def start_as(self, table: Tensor) -> None:
        self.keys_and_values.copy_(table)
