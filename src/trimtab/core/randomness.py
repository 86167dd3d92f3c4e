"""Random numbers that a seed alone decides, while the process's own generators stay as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

CPU = torch.device("cpu")


@contextmanager
def seeded(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """What is drawn within the block, on the CPU and this device, depends on the seed alone; all generators go on where they were.

    torch.manual_seed would seed those of every device, and for good.
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
    """What an accelerator draws from where nobody says otherwise."""
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    module = torch.get_device_module(device)
    return module.default_generators[module.current_device() if device.index is None else device.index]
