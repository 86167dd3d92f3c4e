"""The packs of a step, made and sent to the device while it computes the step before."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Protocol

import torch

from trimtab.data import Pack


class Steps(Protocol):
    """The packs of each optimizer step; a list of lists will do."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Iterable[Pack]: ...


class SentPacks:
    """The packs of each step on a device. On a CPU, which has nobody to work meanwhile, they are made when they are asked for."""

    def __init__(self, steps: Steps, device: torch.device) -> None:
        self.steps, self.device = steps, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: dict[int, list[Pack]] = {}

    def send_ahead(self, number: int) -> None:
        """Make and send the packs of a step (from 1), if there is one, and they have not been sent."""
        if self.device.type != "cpu" and number <= len(self.steps) and number not in self._ahead:
            with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                self._ahead[number] = [pack.to(self.device) for pack in self.steps[number - 1]]

    def take(self, number: int) -> list[Pack]:
        """The packs of a step, for passes of the current stream."""
        if number not in self._ahead:
            return [pack.to(self.device) for pack in self.steps[number - 1]]
        packs = self._ahead.pop(number)
        if self._stream is not None:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(self._stream)
            for pack in packs:  # the storage of its ids is that of all its tensors, and is not reused before the passes end
                pack.ids.record_stream(computing)
        return packs
