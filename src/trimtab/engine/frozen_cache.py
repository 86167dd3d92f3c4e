"""What frozen layers below the lowest trained one make of a row: kept from one epoch to the next, and not computed again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from trimtab.data.example import TokenRow
from trimtab.data.pack import Pack
from trimtab.engine.patching import FrozenLayers, layers_of, use_frozen_layers


class FrozenLayerCache:
    """The hidden states that enter the lowest trained layer, of rows that have been computed before.

    They do not change while an adapter is trained: what makes them is frozen, and looks at nothing but the row.
    """

    def __init__(self, model: Any, room: float) -> None:
        """
        Args:
            model: With what is trained on it.
            room: Bytes that rows may take.
        """
        self.model, self.lowest, self.room = model, _lowest_trained(model), room
        self.rows: dict[int, tuple[TokenRow, Tensor]] = {}
        """By a row's identity: the row, held so that no other takes its place, and its hidden states, a line a token."""

    def size(self, tokens: int) -> float:
        """Bytes that so many tokens would take here: none where nothing is frozen below the lowest trained layer."""
        config = self.model.config.get_text_config()
        return tokens * config.hidden_size * next(self.model.parameters()).element_size() if self.lowest else 0.0

    @contextmanager
    def of(self, pack: Pack) -> Iterator[None]:
        """A pass of this pack within the block takes the hidden states from here if all its rows are known, or leaves them here."""
        if not self.lowest:
            yield
            return
        known = all(id(row) in self.rows for row in pack.sequences)
        frozen = FrozenLayers(self.lowest, self._gathered(pack) if known else None)
        with use_frozen_layers(frozen):
            yield
        if frozen.recorded is not None:
            self._keep(pack, frozen.recorded)

    def _gathered(self, pack: Pack) -> Tensor:
        first = self.rows[id(pack.sequences[0])][1]
        hidden = first.new_empty(len(pack.ids), first.shape[1])
        for number, row in enumerate(pack.sequences):
            hidden[pack.places(number)] = self.rows[id(row)][1]
        return hidden

    def _keep(self, pack: Pack, hidden: Tensor) -> None:
        for number, row in enumerate(pack.sequences):
            places = pack.places(number)
            size = len(places) * hidden[0].nbytes
            if id(row) not in self.rows and size <= self.room:
                self.rows[id(row)] = row, hidden[places]
                self.room -= size


def _lowest_trained(model: Any) -> int:
    """The number of the lowest layer in which something is trained; 0 where there is nothing frozen, and still, below it."""
    layers = layers_of(model)
    inside = {id(p): number for number, layer in enumerate(layers) for p in layer.parameters() if p.requires_grad}
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    if not trained or any(one not in inside for one in trained):  # before the layers, perhaps
        return 0
    lowest = min(inside.values())
    drops = any(module.training for layer in layers[:lowest] for module in layer.modules())
    return 0 if drops else lowest
