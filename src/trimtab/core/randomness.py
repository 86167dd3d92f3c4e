"""Random numbers determined by a seed alone, without changing the process's generators."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

CPU = torch.device("cpu")


@contextmanager
def seeded(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """Within the block, random numbers on the CPU and this device depend on the seed alone; afterwards, generators are restored.

    torch.manual_seed would seed the generators of every device, permanently.
    """
    generators = [torch.default_generator] if device.type == "cpu" else [torch.default_generator, _generator(device)]
    before = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


def _generator(device: torch.device) -> torch.Generator:
    """An accelerator's default generator."""
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    module = torch.get_device_module(device)
    return module.default_generators[module.current_device() if device.index is None else device.index]
