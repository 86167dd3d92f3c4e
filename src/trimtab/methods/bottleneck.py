"""Bottleneck adapters: a small network with one hidden layer, in every block, added to what the block computes.

After attention and after the MLP: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv:1902.00751.
After the MLP alone: Pfeiffer et al. 2020, "MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer",
arXiv:2005.00052. Beside the MLP: He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer Learning",
arXiv:2110.04366.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from trimtab.core.errors import NotMergeable
from trimtab.core.wrapping import modules
from trimtab.methods._adapterhub import ATTENTION, OUTPUT, from_hub, is_hubs, to_hub
from trimtab.methods._base import AdapterLayer, LearningRateContext, Method, wide
from trimtab.methods._blocks import attention_outputs, mlps, stream_size
from trimtab.methods._peft import not_pefts
from trimtab.methods._switch import Routing

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu, "tanh": torch.tanh,
}  # fmt: skip


class BottleneckAdapter(Method):
    """Adds `scale · up(activation(down(h)))` in every block."""

    mergeable: ClassVar[bool] = False

    kind: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    """After attention and after the MLP, after the MLP alone (half the parameters), or beside the MLP, from what that takes."""
    width: Annotated[int, Field(ge=1)] | None = None
    """Of the hidden layer; 64 unless `reduction` is given."""
    reduction: Annotated[int, Field(ge=1)] | None = None
    """The hidden layer's width as the model's divided by this, instead of `width`."""
    activation: Literal["relu", "gelu", "gelu_tanh", "silu", "tanh"] = "relu"
    """Of the hidden layer; gelu_tanh is gelu's approximation by tanh."""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """What is added is multiplied by this; He et al. advise 4 for parallel."""

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if self.width is not None and self.reduction is not None:
            raise ValueError("width and reduction are two measures of one thing: give one of them.")
        return self

    def width_on(self, size: int) -> int:
        """Of the hidden layer, on a model of this size."""
        if self.reduction is not None:
            return max(1, size // self.reduction)
        return self.width or 64

    def places(self, model: nn.Module) -> dict[str, tuple[str, str]]:
        """By the path of an adapted module: its block's, and which of the two places it is there. Raises UnsupportedModel."""
        found = {path: (block, OUTPUT) for block, path in mlps(model).items()}
        if self.kind == "houlsby":
            found |= {path: (block, ATTENTION) for block, path in attention_outputs(model).items()}
        return {path: found[path] for path in modules(model) if path in found}

    def sites(self, model: nn.Module) -> list[str]:
        return list(self.places(model))

    def layer(self, base: nn.Module, path: str) -> "BottleneckLayer":
        return BottleneckLayer(
            base, self.width_on(stream_size(base)), self.activation, self.scale, beside=self.kind == "parallel"
        )

    def parameter_count(self, model: nn.Module) -> int:
        """layers · (2 · hidden · width + width + hidden), twice that for houlsby."""
        everything = modules(model)
        sizes = [stream_size(everything[path]) for path in self.sites(model)]
        return sum((2 * size + 1) * self.width_on(size) + size for size in sizes)

    def learning_rate(self, at: LearningRateContext) -> tuple[float, str]:
        """1e-3, by a small search: see docs/methods.md."""
        return 1e-3, "1e-3"

    @classmethod
    def reads(cls, config: dict[str, Any]) -> bool:
        return is_hubs(config)

    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """In the layout of the `adapters` library, which PEFT cannot read; but parallel, which that library computes otherwise."""
        if self.kind == "parallel":
            return not_pefts(self.name), tensors
        width = next(len(tensor) for name, tensor in tensors.items() if name.endswith("down.bias"))
        return to_hub(model, {**self.plain(), "width": width}, self.places(model), tensors)

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        if not is_hubs(config):
            return cls(kind="parallel"), tensors  # of our own, with the method in our words beside it
        hyperparameters, renamed = from_hub(config, tensors)
        return cls.parse(hyperparameters), renamed


class BottleneckLayer(AdapterLayer):
    """y + scale · (act(h Dᵀ + c) Uᵀ + u) with y = base(x), and h = y, or h = x where it stands beside its base. U and u start as 0."""

    def __init__(self, base: nn.Module, width: int, activation: str, scale: float, beside: bool) -> None:
        super().__init__(base)
        self.activation, self.scale, self.beside = activation, scale, beside
        size, kind = stream_size(base), wide(next(base.parameters()))
        self.down = nn.Linear(size, width, dtype=kind)
        self.up = nn.Linear(width, size, dtype=kind)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for started_as_zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(started_as_zero)

    def adapt(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.added_to(self.base(x, *args, **kwargs), x, None)

    def route(self, routing: Routing, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.added_to(self.base(x, *args, **kwargs), x, routing.tokens(self.switch, set(), x.device))

    def added_to(self, out: Any, x: Tensor, tokens: Tensor | None) -> Any:
        """The base's output for x with its change, for some of the tokens or all."""
        y = out[0] if isinstance(out, tuple) else out  # a mixture of experts may hand on its router's scores too
        h = x.reshape(y.shape) if self.beside else y
        y = y + self.change(h) if tokens is None else y.index_add(-2, tokens, self.change(h.index_select(-2, tokens)))
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def change(self, h: Tensor) -> Tensor:
        inner = ACTIVATIONS[self.activation](F.linear(h, self.down.weight.to(h.dtype), self.down.bias.to(h.dtype)))
        return self.scale * F.linear(inner, self.up.weight.to(h.dtype), self.up.bias.to(h.dtype))

    def merged(self) -> nn.Module:
        raise NotMergeable(
            "A bottleneck adapter has an activation between its two matrices, so no change of the base's weights equals it. "
            "Use the adapter beside its base model instead."
        )
