"""Fully sharded data parallelism: the devices of a machine share the base model's layers, each gathered whole while it computes.

FSDP2 of torch gathers a layer before its forward and its backward pass, and frees it afterwards. The base is frozen, so that is all its
traffic: no gradients, and none between machines, each of which holds the whole base. What is outside of layers (embeddings, head, last
norm) and the adapter are whole on every device.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import nn

from trimtab.base import Base, ModelConfig, resolve_device, resolve_dtype
from trimtab.core.errors import RecipeError
from trimtab.core.processes import processes
from trimtab.core.wrapping import trunk_of, unwrap
from trimtab.distributed import Engine
from trimtab.engine.patching import layers_of
from trimtab.methods import AdapterLayer, Attached, Method
from trimtab.objectives import Objective, ReferenceObjective
from trimtab.train import TrainConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

INSTEAD = "Use distributed.engine=ddp"
_PROMPT = (
    "the keys of its virtual tokens leave a layer beside its output, where no gradient gathers the layer again. Use prefix or ptuning_v2, "
    "or distributed.engine=ddp."
)
REFUSED = {
    "full": "it trains copies of all weights, which every device would hold whole, in more memory than the base that is divided. Use "
    "zero2, which divides what their optimizer holds, or ddp; or a method that trains less, such as lora with a high rank.",
    "prompt": _PROMPT,
    "ptuning": _PROMPT,
}
"""Methods that are refused, and why."""


class FSDP(Engine):
    """The devices of a machine share the base model's layers: for a base that does not fit on one of them. Gathering takes time, hidden
    behind computing in micro-batches of some 1,000 tokens or more."""

    shards_base: ClassVar[bool] = True

    def check(self, model: ModelConfig, method: Method, objective: Objective, train: TrainConfig) -> None:
        if model.quantize != "none":
            raise RecipeError(_quantized(model.quantize))
        if (reason := REFUSED.get(method.name)) is not None:
            raise RecipeError(f"distributed.engine: fsdp cannot train {method.name}: {reason}")
        if isinstance(objective, ReferenceObjective) and objective.reference not in ("auto", "base", "start"):
            raise RecipeError(
                f"objective.reference: {objective.reference} would be loaded whole beside the shares of the base. {INSTEAD}, or leave the "
                "reference out: the base, or the adapter that training starts from."
            )

    def check_base(self, base: Base) -> None:
        if base.quantization != "none":
            raise RecipeError(_quantized(base.quantization))

    def place(self, model: ModelConfig) -> ModelConfig:
        device = resolve_device(model)
        if processes.size == 1 or device.type == "cpu":
            return model
        dtype = str(resolve_dtype(model, device)).removeprefix("torch.")
        return model.model_copy(update={"device": "cpu", "dtype": dtype})

    def prepare(self, base: Base, adapter: Attached, model: ModelConfig) -> None:
        if processes.size == 1:
            return
        device = resolve_device(model)
        shard(base, device)
        base.requested_device = model.device
        processes.equal_passes = True


def _quantized(kind: str) -> str:
    return (
        f"model.quantize: {kind}, and fsdp divides matrices of plain numbers alone: a share of quantized ones has lost its scales. "
        f"{INSTEAD}: quantized, the base takes a quarter or half of the memory on every device."
    )


def shard(base: Base, device: torch.device) -> None:
    """Divide the base's layers among the devices of each machine, and move the rest to this process's device.

    Raises:
        RecipeError: The model has no layers that could be divided.
    """
    from torch.distributed.fsdp import fully_shard

    layers, trunk = _outermost(layers_of(base.model)), unwrap(trunk_of(base.model))
    if not layers:
        raise RecipeError(f"distributed.engine: fsdp finds no decoder layers in {type(base.model).__name__}. {INSTEAD}.")
    whole, mesh = _kept_whole(base.model, layers), _mesh(device)
    places = [(id(p), module, name) for module, name, p in _parameters(layers) if p not in whole]
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    shares = {before: cast("DTensor", module._parameters[name]).to_local() for before, module, name in places}
    base.hold_shares(shares)
    # A root around the layers, without weights of its own, gathers each while the one before it computes.
    fully_shard(trunk, mesh=mesh, reshard_after_forward=False, ignored_params={p for p in trunk.parameters()})
    for tensor in (*whole, *base.model.buffers()):
        tensor.data = tensor.data.to(device)


def _outermost(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of the layers that are in no other of them."""
    layers = list(layers)
    inner = {id(module) for layer in layers for module in layer.modules() if module is not layer}
    return [layer for layer in layers if id(layer) not in inner]


def _parameters(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The parameters in modules: each module that has it, and its name there."""
    for module in {id(inner): inner for outer in modules for inner in outer.modules()}.values():
        for name, parameter in module.named_parameters(recurse=False):
            yield module, name, parameter


def _kept_whole(model: nn.Module, layers: list[nn.Module]) -> set[nn.Parameter]:
    """What every device holds: what is trained, what is in no layer or in several, and what has nothing that could be divided."""
    of_layers = Counter(p for layer in layers for p in set(layer.parameters()))
    inside = {id(module) for layer in layers for module in layer.modules()}
    outside = {p for module in model.modules() if id(module) not in inside for p in module.parameters(recurse=False)}
    own = {p for module in model.modules() if isinstance(module, AdapterLayer) for p in module.own_parameters().values()}
    return outside | own | {p for p, count in of_layers.items() if count > 1 or not p.ndim or not p.is_contiguous()}


def _mesh(device: torch.device) -> "DeviceMesh":
    """The devices that divide a base: those of one machine, if each has as many, numbered one after the other; else all."""
    from torch.distributed.device_mesh import init_device_mesh

    here = processes.local_size
    machines, rest = divmod(processes.size, here)
    places = processes.tell([processes.local_size, processes.local_rank])
    in_order = places == [[here, rank % here] for rank in range(processes.size)]
    if here > 1 and machines > 1 and not rest and in_order:
        return init_device_mesh(device.type, (machines, here), mesh_dim_names=("machine", "device"))["device"]
    return init_device_mesh(device.type, (processes.size,))
