"""What a pack costs to compute, so that processes can divide packs evenly."""

import math
from typing import Any, cast

from torch import nn

from trimtab.core.wrapping import whole_shape
from trimtab.data import Pack
from trimtab.methods import base_modules, unwrap


class PackCost:
    """Floating-point operations of a pack's forward and backward pass through a frozen model, but for an adapter's share.

    A token takes two for each weight of its layers in the forward pass, and two in the backward pass; a target three times as many of the head
    (see `engine/head.py`); a pair of tokens in attention 14 for each of the hidden size's channels and each layer (a forward pass of two
    products, a backward pass of five).
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        embeddings, head = (
            cast(nn.Linear, unwrap(end)) for end in (model.get_input_embeddings(), model.get_output_embeddings())
        )
        ends = {id(embeddings.weight), id(head.weight)}
        own = {
            id(p): math.prod(whole_shape(p))
            for module in base_modules(model).values()
            for p in module.parameters(recurse=False)
        }
        layers, hidden = getattr(config, "num_hidden_layers", 1), config.hidden_size
        self.token = 4.0 * sum(count for key, count in own.items() if key not in ends)
        self.target = 6.0 * hidden * len(head.weight)
        self.pair = 14.0 * layers * hidden

    def __call__(self, pack: Pack) -> float:
        return self.token * len(pack.ids) + self.target * len(pack.host.predicts) + self.pair * sum(pack.pairs)
