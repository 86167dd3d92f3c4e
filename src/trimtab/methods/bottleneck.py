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

from trimtab.core.adapterhub import is_adapterhub_config
from trimtab.core.errors import NotMergeable
from trimtab.methods import AdapterLayer, Method, Routing, base_modules, trainable_dtype
from trimtab.methods._adapterhub import ATTENTION, OUTPUT, from_adapterhub, to_adapterhub
from trimtab.methods._layers import Layers, within_layers
from trimtab.methods._structure import attention_outputs, mlps, stream_size

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu, "tanh": torch.tanh,
}  # fmt: skip


class BottleneckAdapter(Method):
    """Adds `scale · up(activation(down(h)))` in every block."""

    mergeable: ClassVar[bool] = False
    auto_lr: ClassVar[str] = "1e-3"

    kind: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    """After attention and after the MLP, after the MLP alone (half the parameters), or in parallel to the MLP, from its input."""
    width: Annotated[int, Field(ge=1)] | None = None
    """Width of the hidden layer; 64 unless `reduction` is set."""
    reduction: Annotated[int, Field(ge=1)] | None = None
    """Divides the model's hidden size by this for the width, instead of `width`."""
    activation: Literal["relu", "gelu", "gelu_tanh", "silu", "tanh"] = "relu"
    """Activation function of the hidden layer; gelu_tanh is gelu's approximation by tanh."""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on what is added; He et al. advise 4 for parallel."""

    layers: Layers = None

    @model_validator(mode="after")
    def _check_width(self) -> Self:
        if self.width is not None and self.reduction is not None:
            raise ValueError("width and reduction are two measures of one thing: give one of them.")
        return self

    def hidden_width(self, size: int) -> int:
        """The width of the hidden layer on a model of this hidden size."""
        if self.reduction is not None:
            return max(1, size // self.reduction)
        return self.width or 64

    def insertion_points(self, model: nn.Module) -> dict[str, tuple[str, str]]:
        """By the path of an adapted module: its block's, and which of the two places it is there. Raises UnsupportedModel."""
        points = {path: (block, OUTPUT) for block, path in mlps(model).items()}
        if self.kind == "houlsby":
            points |= {path: (block, ATTENTION) for block, path in attention_outputs(model).items()}
        inside = within_layers(model, self.layers, points, "kind")
        return {path: points[path] for path in base_modules(model) if path in inside}

    def sites(self, model: nn.Module) -> list[str]:
        return list(self.insertion_points(model))

    def layer(self, base: nn.Module, path: str) -> "BottleneckLayer":
        width = self.hidden_width(stream_size(base))
        return BottleneckLayer(base, width, self.activation, self.scale, parallel=self.kind == "parallel")

    def parameter_count(self, model: nn.Module) -> int:
        """layers · (2 · hidden · width + width + hidden), twice that for houlsby."""
        own = base_modules(model)
        sizes = [stream_size(own[path]) for path in self.sites(model)]
        return sum((2 * size + 1) * self.hidden_width(size) + size for size in sizes)

    @classmethod
    def recognizes(cls, config: dict[str, Any]) -> bool:
        return is_adapterhub_config(config)

    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """In the layout of the `adapters` library, which PEFT cannot read; except parallel, which that library computes differently."""
        if self.kind == "parallel":
            return super().to_peft(model, tensors)
        width = next(len(tensor) for name, tensor in tensors.items() if name.endswith("down.bias"))
        return to_adapterhub(model, {**self.plain(), "width": width}, self.insertion_points(model), tensors)

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        if not is_adapterhub_config(config):
            return cls(kind="parallel"), tensors  # of our own, with the method in our words beside it
        hyperparameters, renamed = from_adapterhub(config, tensors)
        return cls.parse(hyperparameters), renamed


class BottleneckLayer(AdapterLayer):
    """y + scale · (act(h Dᵀ + c) Uᵀ + u) with y = base(x), and h = y, or h = x if parallel to its base. U and u start as 0."""

    def __init__(self, base: nn.Module, width: int, activation: str, scale: float, parallel: bool) -> None:
        super().__init__(base)
        self.activation, self.scale, self.parallel = activation, scale, parallel
        size, dtype = stream_size(base), trainable_dtype(base)
        self.down = nn.Linear(size, width, dtype=dtype)
        self.up = nn.Linear(width, size, dtype=dtype)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def adapt(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.add_change(self.base(x, *args, **kwargs), x, None)

    def route(self, routing: Routing, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.add_change(self.base(x, *args, **kwargs), x, routing.tokens(self.switch, set(), x.device))

    def add_change(self, out: Any, x: Tensor, tokens: Tensor | None) -> Any:
        """The base's output for x plus the change, for these tokens, or for all if None."""
        y = out[0] if isinstance(out, tuple) else out  # a mixture of experts may return its router's scores too
        h = x.reshape(y.shape) if self.parallel else y
        y = y + self.change(h) if tokens is None else y.index_add(-2, tokens, self.change(h.index_select(-2, tokens)))
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def change(self, h: Tensor) -> Tensor:
        inner = ACTIVATIONS[self.activation](F.linear(h, self.down.weight.to(h.dtype), self.down.bias.to(h.dtype)))
        return self.scale * F.linear(inner, self.up.weight.to(h.dtype), self.up.bias.to(h.dtype))

    def merge(self) -> nn.Module:
        raise NotMergeable(
            "A bottleneck adapter has an activation between its two matrices, so no change of the base's weights equals it. "
            "Use the adapter beside its base model instead."
        )
