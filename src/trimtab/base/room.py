"""Whether a device has memory for a base model: asked before its weights are read, for then it is too late to say what would do."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.base.available_memory import free_memory
from trimtab.base.config import ModelConfig, resolve_device, resolve_dtype
from trimtab.base.loading import read_skeleton
from trimtab.base.locate import loadable_place
from trimtab.base.quantized import Quantize
from trimtab.base.stored_quantization import held_quantization
from trimtab.core.errors import RecipeError
from trimtab.core.processes import processes

SHARE = 0.9
"""Of a device's free memory, what weights may take; the rest is for passes."""
QUANTIZED = {"nf4": 0.52, "int8": 1.01}
"""Bytes of a weight with its scales, by how it is quantized."""
CPU = torch.device("cpu")


def weight_bytes(skeleton: Any, dtype: torch.dtype, quantize: Quantize = "none") -> float:
    """What the weights of a model take in a dtype, by their shapes."""
    count = sum(p.numel() for p in skeleton.parameters())
    head = skeleton.get_output_embeddings()
    matrices = [module.weight for module in skeleton.modules() if isinstance(module, nn.Linear) and module is not head]
    small = sum(matrix.numel() for matrix in matrices) if quantize != "none" else 0
    return (count - small) * dtype.itemsize + small * QUANTIZED.get(quantize, 0.0)


def find_room(
    config: ModelConfig, place: Path | str, dtype: torch.dtype, device: torch.device, *, moves: bool, copies: int = 0
) -> tuple[torch.device, str | None]:
    """The device, if it has memory for a base model; else the CPU and a note that says why, if it may be moved there.

    Args:
        place: The folder or name on the hub that its name stands for.
        copies: How many copies of it in float32 will be made.

    Raises:
        RecipeError: It does not fit, and must not be moved, or does not fit there either; the message says what would do.
    """
    weights, copy, held = 0.0, 0.0, config.quantize
    with suppress(Exception):  # which reading it raises, with the reason
        skeleton, held = read_skeleton(place), held_quantization(place, config.quantize)
        weights, copy = weight_bytes(skeleton, dtype, held), weight_bytes(skeleton, torch.float32)
    host = free_memory(CPU) * processes.local_size  # they share what they map from files
    on_host = weights + max(copies - 1, 0) * copy  # the last copy is such a file
    on_cpu = device.type == "cpu"
    size, free = (on_host, host) if on_cpu else (weights + copies * copy, free_memory(device))
    if size <= (1.0 if on_cpu else SHARE) * free:
        return device, None
    also, name = f" and {copies} copies in float32" if copies else "", str(dtype).removeprefix("torch.")
    said = f"its weights{also} take {_gb(size)} in {name}, and {device} has {_gb(free)} free"
    if moves and not on_cpu:
        if on_host <= host:
            return CPU, f"{said}: it is loaded on the CPU, which is slow"
        said += f", the CPU {_gb(host)}"
    ways = ["Use a device or machine with more memory"]
    if held == "none":
        ways.append("or a quarter of it (model: {quantize: nf4})")
    if not (moves or on_cpu):
        if held == "none":  # others have no shares
            ways.append("or divide the model among several (devices: N, distributed: {engine: fsdp})")
        ways.append("or compute on the CPU, slowly (device: cpu)")
    raise RecipeError(f"model: {config.name}: {said}. {'; '.join(ways)}.")


def room_to_use(config: ModelConfig) -> str | None:
    """A note if one device of this machine has no memory for a base, so that using it takes the CPU. Raises RecipeError: it has none, either."""
    device = resolve_device(config)
    return find_room(config, loadable_place(config.name), resolve_dtype(config, device), device, moves=True)[1]


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
