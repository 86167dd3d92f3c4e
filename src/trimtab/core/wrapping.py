"""Adapter layers stand around a model's own modules: how to find those modules, and the paths they have without adapters."""

from typing import Any

from torch import nn


class Wrapper(nn.Module):
    """A layer in the place of a model's own module, which is its `base`. Everything else in it belongs to an adapter."""

    base: nn.Module


def unwrap(module: nn.Module) -> nn.Module:
    """The model's own module, without the adapter layers around it."""
    while isinstance(module, Wrapper):
        module = module.base
    return module


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's own modules by the path they have without adapters, in the model's order."""
    by_path: dict[str, nn.Module] = {}

    def visit(module: nn.Module, path: str) -> None:
        module = unwrap(module)
        by_path[path] = module
        for name, child in module.named_children():
            visit(child, f"{path}.{name}" if path else name)

    visit(model, "")
    return by_path


def trunk_of(model: Any) -> nn.Module:
    """The part of a model that makes hidden states, with the adapter layers around it: all but its head."""
    trunk: nn.Module = model.base_model if model.base_model is not model else model.model
    return trunk
