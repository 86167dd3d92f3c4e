"""A base model of which each process holds a share: which of its weights are divided, and what cannot be trained so."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch
from torch import nn

from trimtab.base import Base, ModelConfig, resolve_device, resolve_dtype
from trimtab.core.errors import RecipeError
from trimtab.core.processes import processes
from trimtab.distributed import Engine
from trimtab.methods import AdapterLayer, Attached, Method
from trimtab.objectives import Objective, ReferenceObjective
from trimtab.train import TrainConfig

INSTEAD = "Use distributed.engine=ddp"
_PROMPT = (
    "the keys of its virtual tokens leave a layer beside its output, where no gradient gathers the layer again. Use prefix or ptuning_v2, "
    "or distributed.engine=ddp."
)
REFUSED = {"prompt": _PROMPT, "ptuning": _PROMPT}
"""Methods that are refused, and why."""


class SharedBase(Engine):
    """An engine by which each process holds a share of the base model's layers."""

    shards_base: ClassVar[bool] = True

    def check(self, model: ModelConfig, method: Method, objective: Objective, train: TrainConfig) -> None:
        super().check(model, method, objective, train)
        if model.quantize != "none":
            raise RecipeError(self._quantized(model.quantize))
        if (reason := REFUSED.get(method.name)) is not None:
            raise RecipeError(f"distributed.engine: {self.name} cannot train {method.name}: {reason}")
        if isinstance(objective, ReferenceObjective) and objective.reference not in ("auto", "base", "start"):
            raise RecipeError(
                f"objective.reference: {objective.reference} would be loaded whole beside the shares of the base. {INSTEAD}, or leave the "
                "reference out: the base, or the adapter that training starts from."
            )

    def check_base(self, base: Base) -> None:
        if base.quantization != "none":
            raise RecipeError(self._quantized(base.quantization))

    def _quantized(self, kind: str) -> str:
        return (
            f"model.quantize: {kind}, and {self.name} divides matrices of plain numbers alone: a share of quantized ones has lost its scales. "
            f"{INSTEAD}: quantized, the base takes a quarter or half of the memory on every device."
        )

    def place(self, model: ModelConfig) -> ModelConfig:
        device = resolve_device(model)
        if processes.size == 1 or device.type == "cpu":
            return model
        dtype = str(resolve_dtype(model, device)).removeprefix("torch.")
        return model.model_copy(update={"device": "cpu", "dtype": dtype})

    def prepare(self, base: Base, adapter: Attached, model: ModelConfig) -> None:
        super().prepare(base, adapter, model)
        if processes.size == 1:
            return
        self.divide(base, adapter, resolve_device(model))
        base.requested_device = model.device
        processes.equal_passes = True

    @abstractmethod
    def divide(self, base: Base, adapter: Attached, device: torch.device) -> None:
        """Leave each process its share of the base's layers, and the rest whole, on its device.

        Raises:
            RecipeError: The model has no layers that could be divided.
        """


def outermost(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of the layers that are in no other of them."""
    layers = list(layers)
    inner = {id(module) for layer in layers for module in layer.modules() if module is not layer}
    return [layer for layer in layers if id(layer) not in inner]


def parameters_of(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The parameters in modules: each module that has it, and its name there."""
    for module in {id(inner): inner for outer in modules for inner in outer.modules()}.values():
        for name, parameter in module.named_parameters(recurse=False):
            yield module, name, parameter


def kept_whole(model: nn.Module, layers: list[nn.Module]) -> set[nn.Parameter]:
    """What every device holds: what is trained, what is in no layer or in several, and what has nothing that could be divided."""
    of_layers = Counter(p for layer in layers for p in set(layer.parameters()))
    inside = {id(module) for layer in layers for module in layer.modules()}
    outside = {p for module in model.modules() if id(module) not in inside for p in module.parameters(recurse=False)}
    own = {p for module in model.modules() if isinstance(module, AdapterLayer) for p in module.own_parameters().values()}
    return outside | own | {p for p, count in of_layers.items() if count > 1 or not p.ndim or not p.is_contiguous()}
