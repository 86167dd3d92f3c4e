"""The engine that suits the base model and the devices."""

from trimtab.base import ModelConfig, resolve_device, resolve_dtype, skeleton, weight_bytes
from trimtab.core.processes import processes
from trimtab.distributed import Engine
from trimtab.engine import free_memory
from trimtab.methods import Method

SHARE = 0.7
"""Of a device's free memory, what the base model may take with all of it on each: the rest is for activations, and the adapter's optimizer."""


class Auto(Engine):
    """`ddp` if the base model fits on every device, else `fsdp`."""

    def choose(self, model: ModelConfig, method: Method) -> Engine:
        ddp = Engine.member("ddp")()
        if processes.size == 1 or model.quantize != "none":
            return ddp
        if all(processes.tell(_fits(model))):
            return ddp
        return Engine.member("fsdp")()


def _fits(model: ModelConfig) -> bool:
    """Whether this process's device has memory for all of the model."""
    device = resolve_device(model)
    return weight_bytes(skeleton(model.name), resolve_dtype(model, device)) <= SHARE * free_memory(device)
