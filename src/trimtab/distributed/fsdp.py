"""Fully sharded data parallelism: the devices of a machine share the base model's layers, each gathered whole while it computes.

FSDP2 of torch gathers a layer before its forward and its backward pass, and frees it afterwards. The base is frozen, so that is all its
traffic: no gradients, and none between machines, each of which holds the whole base. What is outside of layers (embeddings, head, last
norm) and the adapter are whole on every device; but for the copies of the layers' weights that `full` trains (`_full_shares`).
"""

import inspect
from typing import TYPE_CHECKING, cast

import torch

from trimtab.base import Base, ModelConfig
from trimtab.core.errors import RecipeError
from trimtab.core.processes import processes
from trimtab.core.wrapping import is_divided, trunk_of, unwrap
from trimtab.distributed._full_shares import (
    FULL,
    add_up_gradients,
    check_layers,
    check_torch,
    divided,
    gather_while_off,
)
from trimtab.distributed._shared_optimizer import SharedOptimizer
from trimtab.distributed._shares import INSTEAD, SharedBase, kept_whole, outermost, parameters_of
from trimtab.engine.patching import layers_of
from trimtab.methods import Attached, Method
from trimtab.objectives import Objective
from trimtab.train import Optimizer, TrainConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


class FSDP(SharedBase):
    """The devices of a machine share the base model's layers, and what `full` trains of them: for what does not fit on one device.

    Gathering takes time, hidden behind computing in micro-batches of some 1,000 tokens or more.
    """

    def check(self, model: ModelConfig, method: Method, objective: Objective, train: TrainConfig) -> None:
        from torch.distributed.fsdp import fully_shard

        super().check(model, method, objective, train)
        if method.name == FULL and not train.optimizer.elementwise:
            raise RecipeError(
                f"train.optimizer: {train.optimizer.name} updates whole matrices, and fsdp divides them for the method full. Use "
                "train.optimizer=adamw, or distributed.engine=ddp."
            )
        if processes.size > 1 and "ignored_params" not in inspect.signature(fully_shard).parameters:
            raise RecipeError(
                f"distributed.engine: fsdp needs torch 2.7 or newer, which leaves an adapter whole, and this is {torch.__version__}. {INSTEAD}."
            )
        if processes.size > 1 and method.name == FULL:
            check_torch()

    def divide(self, base: Base, adapter: Attached, device: torch.device) -> None:
        shard(base, adapter, device)

    def optimizer(self, adapter: Attached, train: TrainConfig) -> Optimizer:
        if any(map(is_divided, adapter.parameters().values())):
            return SharedOptimizer(adapter, train)
        return super().optimizer(adapter, train)


def shard(base: Base, adapter: Attached, device: torch.device) -> None:
    """Divide the base's layers among the devices of each machine, with the copies that `full` trains of them, and move the rest to this
    process's device.

    Raises:
        RecipeError: The model has no layers that could be divided.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    layers, trunk = outermost(layers_of(base.model)), unwrap(trunk_of(base.model))
    if not layers:
        raise RecipeError(f"distributed.engine: fsdp finds no decoder layers in {type(base.model).__name__}. {INSTEAD}.")
    whole, mesh, policy = kept_whole(base.model, layers), _mesh(device), MixedPrecisionPolicy()
    full = divided(adapter, layers, whole) if adapter.method.name == FULL else None
    if full is not None:
        check_layers(adapter, layers)
        whole = set(base.model.parameters()) - full.weights - full.copies
        policy = MixedPrecisionPolicy(full.dtype, torch.promote_types(full.dtype, torch.float32), cast_forward_inputs=False)
    places = [(id(p), module, name) for module, name, p in parameters_of(layers) if p not in whole]
    for layer in layers:
        apart = gather_while_off(layer, adapter, full.originals, mesh) if full is not None else set()
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole | apart, mp_policy=policy)
        if full is not None:
            add_up_gradients(layer)
    shares = {before: cast("DTensor", module._parameters[name]).to_local() for before, module, name in places}
    base.hold_shares(shares)
    adapter.shares = mesh.size() if any(map(is_divided, adapter.parameters().values())) else 1
    # A root around the layers, without weights of its own, gathers each while the one before it computes.
    fully_shard(trunk, mesh=mesh, reshard_after_forward=False, ignored_params={p for p in trunk.parameters()})
    for tensor in (*whole, *base.model.buffers()):
        tensor.data = tensor.data.to(device)


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
