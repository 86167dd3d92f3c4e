"""The engine that suits the base model and the devices."""

from trimtab.base import ModelConfig, quantization_when_loaded, resolve_device, resolve_dtype, skeleton, weight_bytes
from trimtab.core.processes import processes
from trimtab.distributed import Engine
from trimtab.distributed._full_shares import FULL
from trimtab.engine import free_memory
from trimtab.methods import Method

SHARE = 0.7
"""Of a device's free memory, what the base model may take with all of it on each: the rest is for activations, and the adapter's optimizer."""
TRAINED = 16
"""Bytes of a trained number in float32: its value, its gradient, and two averages of AdamW."""


class Auto(Engine):
    """`ddp` if the base model, with what `full` trains beside it, fits on every device, else `fsdp`."""

    def choose(self, model: ModelConfig, method: Method) -> Engine:
        ddp = Engine.member("ddp")()
        if processes.size == 1 or quantization_when_loaded(model.name, model.quantize) != "none":
            return ddp
        if all(processes.tell(_fits(model, TRAINED if method.name == FULL else 0))):
            return ddp
        return Engine.member("fsdp")()


def _fits(model: ModelConfig, trained: int) -> bool:
    """Whether this process's device has memory for all of the model, and for so many bytes beside each number of it."""
    device = resolve_device(model)
    weights = skeleton(model.name)
    size = weight_bytes(weights, resolve_dtype(model, device)) + trained * sum(p.numel() for p in weights.parameters())
    return size <= SHARE * free_memory(device)
