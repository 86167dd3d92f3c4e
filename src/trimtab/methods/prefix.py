"""Prefix tuning: keys and values before every example, in every layer, made by a small network while they are trained.

Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv:2101.00190, equation 3 and section 4.3.
"""

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from trimtab.methods._virtual_tokens import DirectPrefix, NetworkTable, Prefixes, PrefixLayer


class PrefixTuning(Prefixes):
    """Trains a network that makes the keys and values of virtual tokens in every layer; what it made is saved."""

    auto_lr: ClassVar[str] = "1e-3"
    auto_lr_overshoots: ClassVar[bool] = True
    inference_settings: ClassVar[dict[str, Any]] = {"width": 0}

    width: Annotated[int, Field(ge=0)] = 512
    """Width of the network's hidden layer and of its inputs. 0 in a saved adapter, which holds what the network made."""

    def layer(self, base: nn.Module, path: str) -> PrefixLayer:
        return NetworkPrefix(base, self.tokens, self.width) if self.width else DirectPrefix(base, self.tokens)

    def parameter_count(self, model: nn.Module) -> int:
        """tokens · width + (width + 1) · width + (width + 1) · N with N = layers · 2 · key-value heads · head size; saved, tokens · N."""
        numbers, width = self.numbers(model), self.width
        return self.tokens * width + (width + 1) * width + (width + 1) * numbers if width else self.tokens * numbers

    @classmethod
    def recognizes(cls, config: dict[str, Any]) -> bool:
        """PEFT saves what the network made and not the network, so its prefixes are `ptuning_v2` here."""
        return False


class NetworkPrefix(NetworkTable, PrefixLayer):
    """Keys and values from a network with a tanh."""

    def __init__(self, base: nn.Module, count: int, width: int) -> None:
        super().__init__(base, count)
        self.add_network(width, torch.tanh)
