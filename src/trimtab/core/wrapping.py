"""Adapter layers stand around a model's own modules: how to find those modules, and the paths they have without adapters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from trimtab.core.attributes import attributes_set
from trimtab.core.errors import UnsupportedModel


class WeightFacts:
    """What a model's code learns of a weight under an adapter layer: all but its numbers, because these are not what acts there."""

    def __init__(self, weight: Tensor, name: str) -> None:
        self.dtype, self.device, self.shape, self.ndim, self.name = weight.dtype, weight.device, weight.shape, weight.ndim, name

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        facts = next(value for value in (*args, *(kwargs or {}).values()) if isinstance(value, cls))
        raise UnsupportedModel(
            f"The model's code computes with {facts.name} of a module that has an adapter, so the adapter would not act there. "
            "Leave that module out of the targets."
        )


class Wrapper(nn.Module):
    """A layer in the place of a model's own module, which is its `base`. Everything else in it belongs to an adapter."""

    base: nn.Module

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """A parameter of the adapter's; the base may have one of this name, which `__getattr__` would answer with."""
        self._parameters[name] = param

    def __getattr__(self, name: str) -> Any:
        """What a model's code asks its module for besides calling it, the base answers: sizes and flags, and facts of its weights."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = vars(self).get("_modules", {}).get("base")
            value = getattr(base, name, None) if not name.startswith("_") else None
            if isinstance(value, Tensor):
                return WeightFacts(value, name)
            if value is None and name in getattr(base, "_parameters", ()):  # a linear layer without a bias, say
                return None
            if value is None or isinstance(value, nn.Module) or callable(value):
                raise
            return value


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


def whole_shape(weight: Tensor) -> tuple[int, ...]:
    """The shape of a weight, also between passes of processes that share it, when DeepSpeed's ZeRO-3 leaves nothing in its place."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def is_divided(weight: Tensor) -> bool:
    """Whether processes hold shares of a weight, as FSDP divides it."""
    return hasattr(weight, "device_mesh")


def held_bytes(weight: Any) -> int:
    """Bytes of a weight that this process holds: of one that is divided, its share's."""
    held: Tensor = weight.detach().to_local() if is_divided(weight) else weight
    return held.nbytes


def whole_tensor(weight: Any) -> Tensor:
    """All of a weight that may be divided: then all processes ask for it together."""
    whole: Tensor = weight.detach().full_tensor() if is_divided(weight) else weight
    return whole


@contextmanager
def own_modules_in_place(model: nn.Module) -> Iterator[None]:
    """Within the block, the model's own modules stand where the adapter layers around them do: for code that looks for its parameters."""
    outer = [
        (holder, name, unwrap(child))
        for holder in model.modules()
        for name, child in holder.named_children()
        if isinstance(child, Wrapper) and not isinstance(holder, Wrapper)
    ]
    with attributes_set(outer):
        yield


def trunk_of(model: Any) -> nn.Module:
    """The part of a model that makes hidden states, with the adapter layers around it: all but its head. Raises UnsupportedModel."""
    trunk = model.base_model if model.base_model is not model else getattr(model, "model", None)
    if not isinstance(trunk, nn.Module):
        raise UnsupportedModel(f"{type(model).__name__} has no module that makes hidden states from tokens, beside its head.")
    return trunk


def text_modules(model: Any) -> dict[str, nn.Module]:
    """Those of the model's own modules that texts pass through, by path: all of them, unless it is a multimodal wrapper.

    A wrapper has a configuration for its text model within its own. Texts pass its decoder, token embeddings and head; vision and audio
    towers and what projects from them get no gradient from a text, so adapters there would be saved untrained.
    """
    own = base_modules(model)
    config = getattr(model, "config", None)
    if config is None or config.get_text_config() is config:
        return own
    decoder = unwrap(model.get_decoder())
    trunk = next((path for path, module in own.items() if module is decoder), "")
    ends = [unwrap(end) for end in (model.get_input_embeddings(), model.get_output_embeddings())]
    return {
        path: module
        for path, module in own.items()
        if not trunk or path == trunk or path.startswith(f"{trunk}.") or any(module is end for end in ends)
    }
