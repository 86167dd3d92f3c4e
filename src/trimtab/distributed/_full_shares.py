"""Full fine-tuning in shares, by FSDP: which of the trained copies of weights are divided, and how they and the frozen weights are gathered.

FSDP adds up the copies' gradients in every backward pass, a share for each process: kept whole until the step, they would take the memory that
is saved. A layer's copies and its frozen weights are gathered apart, since a pass needs one or the other.
"""

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from trimtab.core.errors import RecipeError
from trimtab.core.wrapping import is_divided, unwrap
from trimtab.distributed._shares import parameters_of
from trimtab.methods import Attached

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

FULL = "full"
"""The method that trains as many numbers as the base has."""
SETTINGS = ("set_gradient_divide_factor", "set_force_sum_reduction_for_comms", "set_reduce_scatter_unused_params")


def check_torch() -> None:
    """Raise RecipeError if this version of torch's FSDP only takes the mean of gradients, or needs one of every weight in every process."""
    from torch.distributed.fsdp import FSDPModule

    if missing := [name for name in SETTINGS if not hasattr(FSDPModule, name)]:
        raise RecipeError(
            f"distributed.engine: fsdp trains full with a newer PyTorch than {torch.__version__}, whose FSDP has no {missing[0]}. Install "
            "2.13, or use distributed.engine=zero2."
        )


def add_up_gradients(layer: Any) -> None:
    """Have FSDP add up the gradients of a layer that it divides, also where a process has none: no token of it reached an expert."""
    layer.set_gradient_divide_factor(1.0)
    layer.set_force_sum_reduction_for_comms(True)
    layer.set_reduce_scatter_unused_params(True)


class Divided(NamedTuple):
    """What is divided of layers of which trained copies are, too."""

    dtype: torch.dtype
    """In passes."""
    weights: set[nn.Parameter]
    originals: set[nn.Parameter]
    """Those of the weights that have a copy, which acts in their place while the adapter is on."""
    copies: set[nn.Parameter]


def divided(adapter: Attached, layers: list[nn.Module], whole: set[nn.Parameter]) -> Divided:
    """Weights in the dtype that most numbers of the layers have, and their copies; but not those of vectors, which are few numbers, and whose
    gradients FSDP would round.

    Args:
        whole: What would not be divided if all were frozen.
    """
    could = {p for _, _, p in parameters_of(layers) if p not in whole}
    numbers: Counter[torch.dtype] = Counter()
    for weight in could:
        numbers[weight.dtype] += weight.numel()
    dtype = max(numbers, key=lambda dtype: numbers[dtype])
    weights = {weight for weight in could if weight.dtype == dtype}
    copied = [
        (unwrap(layer.base)._parameters[name], copy)
        for layer in adapter.layers.values()
        for name, copy in layer.own_parameters().items()
    ]
    originals = {weight for weight, _ in copied if weight in weights}
    return Divided(dtype, weights, originals, {copy for weight, copy in copied if weight in originals and copy.ndim > 1})


def check_layers(adapter: Attached, layers: list[nn.Module]) -> None:
    """Raise RecipeError if a layer has copies of its own weights: it is gathered by hooks on itself, and not on its twin with the copies."""
    if path := next((path for path, layer in adapter.layers.items() if unwrap(layer.base) in layers), None):
        raise RecipeError(
            f"distributed.engine: fsdp cannot train full of {type(adapter.model).__name__}: {path} has weights of its own beside its matrices. "
            "Use a method such as lora."
        )


def gather_while_off(
    layer: nn.Module, adapter: Attached, originals: set[nn.Parameter], mesh: "DeviceMesh"
) -> set[nn.Parameter]:
    """Divide those of the originals that are in the layer by themselves, and gather them while the adapter is off; their shares."""
    from torch.distributed.fsdp import fully_shard

    group: Any = nn.Module()
    group.holders = nn.ModuleList(m for m in layer.modules() if any(p in originals for p in m.parameters(recurse=False)))
    fully_shard(group, mesh=mesh, reshard_after_forward=True, ignored_params=set(group.parameters()) - originals)

    def gather(*_: Any) -> None:
        if adapter.switch.state is not True:
            group.unshard()

    def free(*_: Any) -> None:
        group.reshard()

    layer.register_forward_pre_hook(gather)
    layer.register_forward_hook(free)
    return {p for p in group.parameters() if is_divided(p)}
