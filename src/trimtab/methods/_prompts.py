"""Prompts: virtual tokens whose input embeddings are trained. One engine for prompt tuning and P-tuning.

Shapes: P virtual tokens, d embedding size; a table is P × d, as PEFT saves it.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from trimtab.core.wrapping import unwrap
from trimtab.methods._base import AdapterLayer, Sample
from trimtab.methods._virtual import KeysValues, VirtualLayer, VirtualTokens, number_type


class Prompts(VirtualTokens):
    """The part that prompt tuning and P-tuning share."""

    table_name: ClassVar[str] = "embeddings"

    init: Literal["text", "random"] = "text"
    """What they start as: real text (by far the best), or tokens drawn at random."""

    def initialize(self, model: Any, layers: dict[str, AdapterLayer], sample: Sample) -> None:
        (layer,) = layers.values()
        assert isinstance(layer, PromptLayer)
        embed = model.get_input_embeddings()
        vocabulary = unwrap(embed).num_embeddings
        ids = self.text_ids(sample) if self.init == "text" else torch.randint(vocabulary, (self.tokens,)).tolist()  # type: ignore[call-overload]
        layer.start_as(embed(torch.tensor(ids, device=next(embed.parameters()).device)))


def embedding_size(model: Any) -> int:
    """d."""
    return int(unwrap(model.get_input_embeddings()).embedding_dim)  # type: ignore[arg-type]


class PromptLayer(VirtualLayer):
    """A trunk that runs on virtual embeddings before every row; subclasses say what these, P × d, are made from."""

    def __init__(self, base: nn.Module, count: int) -> None:
        super().__init__(base)
        self.count = count

    def keys_values(self) -> KeysValues:
        return self.attended(embeddings=self.table())


class DirectPrompt(PromptLayer):
    """Embeddings that are trained themselves."""

    def __init__(self, base: nn.Module, count: int) -> None:
        super().__init__(base, count)
        self.embeddings = nn.Parameter(torch.zeros(count, embedding_size(base), dtype=number_type(base)))

    def table(self) -> Tensor:
        return self.embeddings

    def start_as(self, table: Tensor) -> None:
        self.embeddings.copy_(table)
