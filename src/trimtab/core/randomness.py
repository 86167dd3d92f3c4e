"""Random numbers determined by a seed alone, without changing the process's generators."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

CPU = torch.device("cpu")


@contextmanager
def seeded(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """Within the block, random numbers on the CPU and this device depend on the seed alone; afterwards, generators are restored.

    torch.manual_seed would seed the generators of every device, permanently.
    """
    generators = _generators(device)
    with _restored(generators):
        for generator in generators:
            generator.manual_seed(seed)
        yield


def replay_from_here(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """A block in which the random numbers on the CPU and this device are those that are drawn after this call, as often as it is entered."""
    generators = _generators(device)
    states = [generator.get_state() for generator in generators]

    @contextmanager
    def replayed() -> Iterator[None]:
        with _restored(generators):
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            yield

    return replayed


@contextmanager
def _restored(generators: Sequence[torch.Generator]) -> Iterator[None]:
    before = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


def _generators(device: torch.device) -> list[torch.Generator]:
    """The default ones of the CPU and of an accelerator; `meta` has none."""
    return [torch.default_generator] if device.type in ("cpu", "meta") else [torch.default_generator, _generator(device)]


def _generator(device: torch.device) -> torch.Generator:
    """An accelerator's default generator."""
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    module = torch.get_device_module(device)
    return module.default_generators[module.current_device() if device.index is None else device.index]
