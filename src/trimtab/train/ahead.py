"""The packs of a step, made and sent to the device while it computes the step before."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from trimtab.core.processes import processes
from trimtab.data import Pack
from trimtab.data.example import TokenRow


class Steps(Protocol):
    """The packs of each optimizer step; a list of lists will do."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Iterable[Pack]: ...


class Turn(NamedTuple):
    """A pass of this process in a step."""

    part: int
    """The number of the pack in the step, from 0."""
    pack: Pack
    """On the device."""
    is_own: bool
    """Whether its result counts: see `Processes.turns`."""


@dataclass(frozen=True)
class StepPacks:
    """The packs of a step."""

    all: list[Pack]
    """On the host, the same in every process."""
    own: list[Turn]

    @property
    def rows(self) -> list[TokenRow]:
        """Those that have a loss."""
        return [row for pack in self.all if not pack.mismatched for row in pack.rows]

    @property
    def tokens(self) -> int:
        """Tokens of these rows before any were cut or shared."""
        return sum(row.full_length for row in self.rows)

    @property
    def computed(self) -> int:
        """Tokens of all packs."""
        return sum(len(pack.ids) for pack in self.all)

    @property
    def mismatched(self) -> list[int]:
        """The numbers of the packs of mismatched answers."""
        return [part for part, pack in enumerate(self.all) if pack.mismatched]

    def turns(self, *, mismatched: bool) -> list[Turn]:
        """This process's passes over packs of mismatched answers, or over the others."""
        return [turn for turn in self.own if turn.pack.mismatched is mismatched]


class SentPacks:
    """The packs of each step, with those of this process on its device. On a CPU, which has nobody to work meanwhile, they are made when they
    are asked for."""

    def __init__(self, steps: Steps, device: torch.device, cost: Callable[[Pack], float] = lambda pack: len(pack.ids)) -> None:
        """
        Args:
            cost: Of a pack, by which processes divide them.
        """
        self.steps, self.device, self.cost = steps, device, cost
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: dict[int, StepPacks] = {}

    def send_ahead(self, number: int) -> None:
        """Make and send the packs of a step (from 1), if there is one, and they have not been sent."""
        if self.device.type != "cpu" and number <= len(self.steps) and number not in self._ahead:
            with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                self._ahead[number] = self._send(number)

    def take(self, number: int) -> StepPacks:
        """The packs of a step, for passes of the current stream."""
        if number not in self._ahead:
            return self._send(number)
        packs = self._ahead.pop(number)
        if self._stream is not None:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(self._stream)
            for turn in packs.own:  # the storage of its ids is that of all its tensors, and is not reused before the passes end
                turn.pack.ids.record_stream(computing)
        return packs

    def _send(self, number: int) -> StepPacks:
        packs = list(self.steps[number - 1])
        own = []
        for mismatched in (True, False):  # these come first: every loss of the step depends on them
            parts = [part for part, pack in enumerate(packs) if pack.mismatched is mismatched]
            turns = processes.turns([self.cost(packs[part]) for part in parts]) if parts else []
            own += [Turn(parts[turn], packs[parts[turn]].to(self.device), is_own) for turn, is_own in turns]
        return StepPacks(packs, own)
