"""ZeRO-3 of DeepSpeed: all processes share the base model's layers, each gathered whole while it computes.

DeepSpeed is given the layers' frozen weights, one decoder layer at a time, and nothing else: the adapter is whole on every process, and so
are embeddings, head and last norm. So there is no optimizer of DeepSpeed's, and no gradients are its business. Its hooks within layers would
change the order in which gradients of 16 bits are added, and with that their rounding; around layers they change nothing (decision 065).
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from trimtab.base import Base, ModelConfig
from trimtab.core.errors import RecipeError
from trimtab.core.wrapping import own_modules_in_place, trunk_of, unwrap
from trimtab.distributed._deepspeed import DeepSpeedEngine, imported, initialize
from trimtab.distributed._full_shares import FULL
from trimtab.distributed._shares import INSTEAD, SharedBase, kept_whole, outermost, parameters_of
from trimtab.engine.patching import layers_of
from trimtab.methods import Attached, Method
from trimtab.objectives import Objective
from trimtab.train import TrainConfig

PREFETCHED = 50_000_000
"""Numbers that are gathered ahead, unless the configuration says otherwise."""


class ZeRO3(SharedBase, DeepSpeedEngine):
    """DeepSpeed divides the base model's layers among all processes, across machines, too. fsdp does the same within each machine, where it is
    faster, without another package."""

    stage: ClassVar[int] = 3
    divides: ClassVar[str] = "the base model's layers are"

    def check(self, model: ModelConfig, method: Method, objective: Objective, train: TrainConfig) -> None:
        if method.name == FULL:
            raise RecipeError(
                "distributed.engine: zero3 cannot train full: it divides frozen weights alone, and every device would hold the trained copies "
                "whole. Use distributed.engine=fsdp, which divides those as well."
            )
        super().check(model, method, objective, train)

    def divide(self, base: Base, adapter: Attached, device: torch.device) -> None:
        share(base, device, self.told())


class _Layers(nn.Module):
    """What DeepSpeed is given of a model."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


def share(base: Base, device: torch.device, told: dict[str, Any]) -> None:
    """Divide the base's layers among the processes, and move the rest to this process's device.

    Raises:
        RecipeError: The model has no layers that could be divided.
    """
    layers, trunk = outermost(layers_of(base.model)), unwrap(trunk_of(base.model))
    if not layers:
        raise RecipeError(f"distributed.engine: zero3 finds no decoder layers in {type(base.model).__name__}. {INSTEAD}.")
    whole = kept_whole(base.model, layers)
    for tensor in (*whole, *base.model.buffers()):
        tensor.data = tensor.data.to(device)
    with own_modules_in_place(base.model):
        shared = {id(p): p for _, _, p in parameters_of(layers) if p not in whole}
        own = {module: module._parameters for layer in layers for module in layer.modules()}
        for module, parameters in own.items():
            module._parameters = {name: p for name, p in parameters.items() if p not in whole}
        begin = _divide(layers, {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": PREFETCHED, **told})
        for module, parameters in own.items():
            module._parameters = parameters  # as they were, without DeepSpeed's watch on who reads them
    base.hold_shares({place: parameter.ds_tensor for place, parameter in shared.items()})  # type: ignore[attr-defined]
    trunk.register_forward_pre_hook(lambda *_: begin())


def _divide(layers: list[nn.Module], told: dict[str, Any]) -> Callable[[], None]:
    """Have DeepSpeed divide layers, and gather each by hooks on itself alone; what must be called before each pass."""
    deepspeed = imported(next(layers[0].parameters()).device)
    leaf = deepspeed.utils.set_z3_leaf_module
    for layer in layers:
        leaf(layer, True)  # no hooks within it
    engine = initialize(_Layers(layers), {"overlap_comm": False, **told, "stage": 3, "memory_efficient_linear": False}, None)
    for layer in layers:
        leaf(layer, False)  # which it would search for parameters, and find the adapter's
        for inner in layer.modules():
            for parameter in inner.parameters(recurse=False) if inner is not layer else ():
                deepspeed.zero.register_external_parameter(layer, parameter)
    offload = engine.optimizer

    def begin() -> None:
        offload.release_backward_leftovers()
        offload.get_param_coordinator().reset_step()

    return begin
