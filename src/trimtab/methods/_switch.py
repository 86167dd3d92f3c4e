"""Which adapters act where: for everybody, within a block of one thread, or on the rows of a batch, each row having its own.

What holds within a block is kept in a context variable, so that threads and tasks which share a model do not disturb each other.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Switch:
    """Whether an adapter acts. Each adapter has one, which all of its layers share."""

    def __init__(self) -> None:
        self.on = True
        """Where no block says otherwise."""

    @property
    def state(self) -> "bool | Routing":
        """On, off, or on for some of the tokens of this forward pass."""
        here = _here.get()
        if isinstance(here, Routing):
            return here
        return self is here.owner if isinstance(here, _Only) else here.get(self, self.on)


class Routing:
    """Which adapter's switch each of T tokens belongs to; None for the base alone."""

    def __init__(self, owners: Sequence[Switch | None]) -> None:
        self.owners = owners
        self._found: dict[Any, Tensor] = {}  # every layer asks the same

    def tokens(self, owner: Switch | None, among: set[Switch], device: torch.device) -> Tensor:
        """The numbers of an owner's tokens; for None, of those whose owner is not `among` these."""
        asked = (owner, device, None if owner else frozenset(among))
        if asked not in self._found:
            chosen = [n for n, one in enumerate(self.owners) if one is owner or (owner is None and one not in among)]
            self._found[asked] = torch.tensor(chosen, dtype=torch.long, device=device)
        return self._found[asked]

    def select(self, tokens: Sequence[int]) -> "Routing":
        """The same for some of the tokens."""
        return Routing([self.owners[n] for n in tokens])


class _Only(NamedTuple):
    """Every adapter is off but one."""

    owner: Switch | None


_here: ContextVar[Mapping[Switch, bool] | Routing | _Only] = ContextVar("here", default={})  # noqa: B039 (never changed)


def switched(states: Mapping[Switch, bool]) -> AbstractContextManager[None]:
    """These adapters are on or off within the block, in this thread; others as they were."""
    before = _here.get()
    return _within({**before, **states} if isinstance(before, Mapping) else states)


def routed(routing: Routing | None) -> AbstractContextManager[None]:
    """Within the block, in this thread, each token has the adapter that the routing says, and no other; None: as it was."""
    return nullcontext() if routing is None else _within(routing)


def current_routing() -> Routing | None:
    """The routing of this block and thread, if there is one."""
    here = _here.get()
    return here if isinstance(here, Routing) else None


def only(owner: Switch | None) -> AbstractContextManager[None]:
    """Within the block, in this thread, every adapter is off but this one."""
    return _within(_Only(owner))


@contextmanager
def _within(value: Mapping[Switch, bool] | Routing | _Only) -> Iterator[None]:
    token = _here.set(value)
    try:
        yield
    finally:
        _here.reset(token)
