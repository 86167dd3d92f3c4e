"""A model with adapters on it: its own modules are found through the layers that stand around them."""

from torch import nn


class Wrapper(nn.Module):
    """A layer in the place of a model's own module, which is its `base`. All else in it is an adapter's."""

    base: nn.Module


def unwrap(module: nn.Module) -> nn.Module:
    """The model's own module at a place where adapter layers may stand."""
    while isinstance(module, Wrapper):
        module = module.base
    return module


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's own modules by the path they have without adapters."""
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, path: str) -> None:
        module = unwrap(module)
        found[path] = module
        for name, child in module.named_children():
            visit(child, f"{path}.{name}" if path else name)

    visit(model, "")
    return found
