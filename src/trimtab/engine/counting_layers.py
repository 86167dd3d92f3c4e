"""Layers that count the tokens before them with torch.arange, as Llama 4's attention does for its temperature.

In a pass with a layout, tokens are not where they stand in the pass but where they stand in their rows. So these layers' own forward
passes run with a `torch` whose arange, asked for as many numbers as there are tokens, gives their positions.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trimtab.core.attention_hook import current_layout
from trimtab.engine.layouts import DecodeLayout, PackLayout

_counting_layers: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()


def patch_counting_layers(model: nn.Module) -> None:
    """Patch the forward passes of such layers, for passes that have a layout. `remove_hook` undoes it."""
    if model not in _counting_layers:
        _counting_layers[model] = [m for m in model.modules() if hasattr(m, "layer_idx") and _counts(type(m).forward)]
    for layer in _counting_layers[model]:
        if "forward" not in vars(layer):
            layer.forward = PatchedCountingForward(layer)


@cache
def _counts(forward: Any) -> bool:
    return "arange" in getattr(getattr(inspect.unwrap(forward), "__code__", None), "co_names", ())


class PatchedCountingForward:
    """The forward pass of a layer that counts tokens: by their positions in a pass with a layout."""

    is_patch = True

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def of_twin(self, twin: nn.Module) -> "PatchedCountingForward":
        """The same of a layer that has other weights."""
        return PatchedCountingForward(twin)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layout = kwargs.get("layout") or current_layout()
        if isinstance(layout, PackLayout):
            counting = _TorchByPositions(len(layout.positions), partial(layout.sent, "positions"))
        elif isinstance(layout, DecodeLayout):
            counting = _TorchByPositions(len(layout.cache.token_counts), layout.cache.token_counts.to)
        else:
            return type(self.layer).forward(self.layer, *args, **kwargs)
        own: Any = inspect.unwrap(type(self.layer).forward)
        forward = FunctionType(
            own.__code__, {**own.__globals__, "torch": counting}, own.__name__, own.__defaults__, own.__closure__
        )
        forward.__kwdefaults__ = own.__kwdefaults__
        return forward(self.layer, *args, **kwargs)


class _TorchByPositions:
    def __init__(self, tokens: int, positions: Callable[[torch.device], Tensor]) -> None:
        self.tokens, self.positions = tokens, positions

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def arange(self, *given: Any, device: Any = None, **options: Any) -> Tensor:
        if given == (self.tokens,) and not options:
            return self.positions(torch.device("cpu" if device is None else device))
        return torch.arange(*given, device=device, **options)
