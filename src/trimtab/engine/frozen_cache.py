"""A cache of the outputs of the frozen layers below the lowest trained one, from one epoch to the next."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.core.transfer import to_device
from trimtab.data.example import TokenRow
from trimtab.data.pack import Pack
from trimtab.engine.patching import FrozenLayers, layers_of, use_frozen_layers


class FrozenLayerCache:
    """Hidden states at the input of the lowest trained layer, of rows that have been processed before.

    They do not change while an adapter is trained: the layers below are frozen, and depend on the row alone.
    """

    def __init__(self, model: Any, capacity: float) -> None:
        """
        Args:
            model: With its adapter.
            capacity: Bytes that hidden states may take.
        """
        self.model, self.free = model, capacity
        self.lowest = _lowest_trained(model)
        """The lowest trained layer; None where there is nothing to keep."""
        self.rows: dict[int, tuple[TokenRow, Tensor]] = {}
        """By a row's identity: the row, held so that no other gets its identity, and its hidden states, one a token."""

    def bytes_for(self, tokens: int) -> float:
        """Bytes that so many tokens would take: none without frozen layers below the lowest trained one."""
        config = self.model.config.get_text_config()
        return tokens * config.hidden_size * next(self.model.parameters()).element_size() if self.lowest is not None else 0.0

    @contextmanager
    def serve(self, pack: Pack) -> Iterator[None]:
        """A forward pass of this pack within the block takes its hidden states from the cache if it has all rows, or adds them."""
        if self.lowest is None:
            yield
            return
        cached = all(id(row) in self.rows for row in pack.rows)
        frozen = FrozenLayers(self.lowest, self._gathered(pack) if cached else None)
        with use_frozen_layers(frozen):
            yield
        if not frozen.alone:
            self.lowest = None
        elif frozen.recorded is not None:
            self._add(pack, frozen.recorded)

    def _gathered(self, pack: Pack) -> Tensor:
        source, end = np.empty(len(pack.ids), dtype=np.int64), 0
        for number in range(len(pack.rows)):  # a token that several rows share is taken from the last of them
            indices = pack.token_indices(number)
            start, end = end, end + len(indices)
            source[indices] = np.arange(start, end)
        hidden = torch.cat([self.rows[id(row)][1] for row in pack.rows])
        return hidden.index_select(0, to_device(torch.from_numpy(source), hidden.device))

    def _add(self, pack: Pack, hidden: Tensor) -> None:
        added: list[tuple[TokenRow, Tensor]] = []
        for number, row in enumerate(pack.rows):
            indices = pack.token_indices(number)
            size = len(indices) * hidden[0].nbytes
            if id(row) not in self.rows and size <= self.free:
                added.append((row, indices))
                self.free -= size
        if added:
            at = to_device(torch.cat([indices for _, indices in added]), hidden.device)
            states = hidden.index_select(0, at).split([len(indices) for _, indices in added])
            self.rows |= {id(row): (row, of_row) for (row, _), of_row in zip(added, states, strict=True)}


def _lowest_trained(model: Any) -> nn.Module | None:
    """The lowest layer with trained parameters; None if it is the first, or if what is below it is trained or has active dropout."""
    layers = layers_of(model)
    inside = {id(p): number for number, layer in enumerate(layers) for p in layer.parameters() if p.requires_grad}
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    if not trained or any(parameter not in inside for parameter in trained):  # before the layers, perhaps
        return None
    lowest = min(inside.values())
    drops = any(module.training for layer in layers[:lowest] for module in layer.modules())
    return None if drops or not lowest else layers[lowest]
