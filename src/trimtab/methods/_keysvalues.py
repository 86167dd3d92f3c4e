"""Prefixes: virtual tokens whose keys and values in every layer are trained. One engine for prefix tuning and P-tuning v2.

Shapes: P virtual tokens, L attention layers, G key-value heads, K head size; a table is P × (L · 2 · G · K), as PEFT saves it.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.methods._base import AdapterLayer, Sample
from trimtab.methods._virtual import KeysValues, Shape, VirtualLayer, VirtualTokens


class KeysValuesTuning(VirtualTokens):
    """The part that prefix tuning and P-tuning v2 share."""

    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    table_name: ClassVar[str] = "keys_and_values"
    of_peft: ClassVar[dict[str, Any]] = {"prefix_projection": False, "encoder_hidden_size": None, "init_weights": None}

    def initialize(self, model: nn.Module, layers: dict[str, AdapterLayer], sample: Sample) -> None:
        (layer,) = layers.values()
        assert isinstance(layer, PrefixLayer)
        if self.init == "text":
            ids = torch.tensor(self.text_ids(sample), device=next(layer.base.parameters()).device)
            layer.start_as(layer.table_of(layer.attended(ids)))
        elif self.init == "zero":
            layer.start_as(torch.zeros(layer.count, layer.shape.numbers))


class PrefixLayer(VirtualLayer):
    """A trunk with a prefix before every row; subclasses say what its table, P × (L · 2 · G · K), is made from."""

    def __init__(self, base: nn.Module, count: int, shape: Shape) -> None:
        super().__init__(base)
        self.count = count
        self.shape = shape

    def keys_values(self) -> KeysValues:
        layers, heads, size = self.shape
        split = self.table().view(self.count, layers, 2, heads, size).permute(1, 2, 3, 0, 4)  # L 2 G P K
        return [(layer[0], layer[1]) for layer in split.unbind(0)]

    def table_of(self, kept: KeysValues) -> Tensor:
        """The reverse of `keys_values`."""
        both = torch.stack([torch.stack(pair) for pair in kept])  # L 2 G P K
        return both.permute(3, 0, 1, 2, 4).reshape(self.count, -1)
