"""Prefixes: virtual tokens whose keys and values in every layer are trained. One engine for prefix tuning and P-tuning v2.

Shapes: P virtual tokens, L attention layers, G key-value heads, K head size; a table is P × (L · 2 · G · K), as PEFT saves it.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from trimtab.errors import ArtifactError
from trimtab.methods._base import AdapterLayer, Sample
from trimtab.methods._peft import only_known
from trimtab.methods._virtual import KeysValues, Shape, VirtualLayer, VirtualTokens, attention_shape


class KeysValuesTuning(VirtualTokens):
    """The part that prefix tuning and P-tuning v2 share."""

    peft_type: ClassVar[str | None] = "PREFIX_TUNING"

    def initialize(self, model: nn.Module, layers: dict[str, AdapterLayer], sample: Sample) -> None:
        (layer,) = layers.values()
        assert isinstance(layer, PrefixLayer)
        if self.init == "text":
            ids = torch.tensor(self.text_ids(sample), device=next(layer.base.parameters()).device)
            layer.start_as(layer.table_of(layer.attended(ids)))
        elif self.init == "zero":
            layer.start_as(torch.zeros(layer.count, layer.shape.numbers))

    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        (table,) = tensors.values()
        shape = attention_shape(model)
        config = {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "num_virtual_tokens": self.tokens,
            "token_dim": shape.heads * shape.size,
            "num_attention_heads": shape.heads,
            "num_layers": shape.layers,
            "num_transformer_submodules": 1,
            "encoder_hidden_size": shape.heads * shape.size,
            "prefix_projection": False,
        }
        return config, {"prompt_embeddings": table}

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        only_known(
            config,
            honoured={"num_virtual_tokens"},
            neutral={"num_transformer_submodules": (1,)},
            # Sizes of the base, which the table's shape says again; and how training went.
            ignored={
                "token_dim",
                "num_attention_heads",
                "num_layers",
                "encoder_hidden_size",
                "prefix_projection",
                "init_weights",
            },
        )
        if list(tensors) != ["prompt_embeddings"]:
            raise ArtifactError(
                f"adapter_model.safetensors holds {', '.join(tensors)}, where a prefix is prompt_embeddings alone."
            )
        return cls.parse({"tokens": config.get("num_virtual_tokens")}), {"": tensors["prompt_embeddings"]}


class PrefixLayer(VirtualLayer):
    """A trunk with a prefix before every row; subclasses say what its table is made from."""

    table: Callable[[], Tensor]
    """P × (L · 2 · G · K)."""
    start_as: Callable[[Tensor], None]
    """Make `table` return this."""

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
