"""Which layers carry state from token to token, by the methods of Transformers' cache that their code calls."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

STATE_METHODS = {"get_conv_state", "get_recurrent_state"}


def called_state_methods(kind: type[nn.Module]) -> set[str]:
    """Those that a class's forward pass calls; none for a class that carries no state."""
    return _called(kind.forward)


@cache
def _called(forward: Callable[..., Any]) -> set[str]:
    return STATE_METHODS & set(getattr(getattr(inspect.unwrap(forward), "__code__", None), "co_names", ()))


def updates_state(kind: type[nn.Module]) -> bool:
    """Whether a class's forward pass changes such states, in whatever version of Transformers."""
    names = getattr(getattr(inspect.unwrap(kind.forward), "__code__", None), "co_names", ())
    return not {"update_conv_state", "update_recurrent_state"}.isdisjoint(names)


def carries_state(model: nn.Module) -> bool:
    """Whether any of the model's layers does."""
    return any(called_state_methods(type(module)) for module in model.modules())
