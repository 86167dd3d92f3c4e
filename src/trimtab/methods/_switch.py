"""Which adapters act: everywhere, within a block of one thread, or each on its own rows of a batch.

What holds within a block is kept in a context variable, so that threads and tasks which share a model do not disturb each other.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.core.transfer import to_device


class Switch:
    """Whether an adapter acts. Each adapter has one, which all of its layers share."""

    def __init__(self) -> None:
        self.on = True
        """Where no block says otherwise."""

    @property
    def state(self) -> "bool | Routing":
        """On, off, or on for some of the tokens of this forward pass."""
        activation = _activation.get()
        if isinstance(activation, Routing):
            return activation
        return self is activation.switch if isinstance(activation, _OnlyActive) else activation.get(self, self.on)


class Routing:
    """Which adapter's switch each of T tokens belongs to; None for the base alone."""

    def __init__(self, owners: Sequence[Switch | None]) -> None:
        self.owners = owners
        self._indices: dict[Any, Tensor] = {}  # every layer asks for the same

    def tokens(self, owner: Switch | None, among: set[Switch], device: torch.device) -> Tensor:
        """The indices of an owner's tokens; for None, of those whose owner is not `among` these."""
        key = (owner, device, None if owner else frozenset(among))
        if key not in self._indices:
            indices = [n for n, switch in enumerate(self.owners) if switch is owner or (owner is None and switch not in among)]
            self._indices[key] = to_device(indices, device)
        return self._indices[key]

    def select(self, tokens: Sequence[int]) -> "Routing":
        """The routing of some of the tokens."""
        return Routing([self.owners[n] for n in tokens])


class _OnlyActive(NamedTuple):
    """Every adapter is off but the one of this switch."""

    switch: Switch | None


_activation: ContextVar[Mapping[Switch, bool] | Routing | _OnlyActive] = ContextVar("activation", default={})  # noqa: B039 (never changed)


def switched(states: Mapping[Switch, bool]) -> AbstractContextManager[None]:
    """These adapters are on or off within the block, in this thread; others as they were."""
    before = _activation.get()
    return _activated({**before, **states} if isinstance(before, Mapping) else states)


def routed(routing: Routing | None) -> AbstractContextManager[None]:
    """Within the block, in this thread, each token has the adapter that the routing says, and no other; None: as before."""
    return nullcontext() if routing is None else _activated(routing)


def current_routing() -> Routing | None:
    """The routing of this block and thread, if there is one."""
    activation = _activation.get()
    return activation if isinstance(activation, Routing) else None


def only_active(switch: Switch | None) -> AbstractContextManager[None]:
    """Within the block, in this thread, every adapter is off but the one of this switch."""
    return _activated(_OnlyActive(switch))


@contextmanager
def _activated(activation: Mapping[Switch, bool] | Routing | _OnlyActive) -> Iterator[None]:
    token = _activation.set(activation)
    try:
        yield
    finally:
        _activation.reset(token)
