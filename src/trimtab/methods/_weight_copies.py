"""What the methods that retrain a model's own weights have in common: copies of a module's parameters, run in their place."""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from trimtab.core.errors import NoSuchModule, RecipeError, UnsupportedModel, listing
from trimtab.core.wrapping import modules, unwrap
from trimtab.methods._base import AdapterLayer, matrix_shape, wide
from trimtab.methods._targets import matches

ALL = "all"
"""The target that is everything a method can train."""


class CopyLayer(AdapterLayer):
    """The base with trainable parameters in place of its own, under the same names; they start as those.

    They are float32 even on a base of fewer bits, and are rounded to its number type to compute with.
    """

    def __init__(self, base: nn.Module, path: str) -> None:
        super().__init__(base)
        for name, weight in own_weights(base):
            if not weight.is_floating_point():
                raise UnsupportedModel(
                    f"{path}.{name} is quantized, and cannot be trained itself. Choose other targets, a method that leaves "
                    "weights as they are, such as lora, or a base that is not quantized."
                )
            self.register_parameter(name, nn.Parameter(weight.detach().to(wide(weight), copy=True)))

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        return with_parameters(self.base, self.replaced())(*args, **kwargs)

    def replaced(self) -> Mapping[str, Tensor]:
        return {name: self._parameters[name].to(weight.dtype) for name, weight in own_weights(unwrap(self.base))}  # type: ignore[union-attr]

    def merged(self) -> nn.Module:
        return with_parameters(unwrap(self.base), dict(self.named_parameters(recurse=False, remove_duplicate=False)))


def own_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's parameters, without those of the modules in it."""
    return module.named_parameters(recurse=False, remove_duplicate=False)


def with_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A twin of a module that shares all with it but has these parameters; of another adapter's layer, one around such a twin.

    torch.func.functional_call would exchange them in the module itself, which another thread may be running.

    Raises:
        RecipeError: Another adapter that retrains the same weights is switched on.
    """
    twin = copy.copy(module)
    if isinstance(module, AdapterLayer):
        if isinstance(module, CopyLayer) and module.switch.state:
            raise RecipeError("Two adapters that retrain the same weights cannot act at once: switch one of them off.")
        twin._modules = {**module._modules, "base": with_parameters(module.base, values)}
    else:
        twin._parameters = {**module._parameters, **values}  # type: ignore[dict-item]
    return twin


def count(model: nn.Module, sites: Sequence[str]) -> int:
    """How many parameters these modules own, tied ones counted once."""
    everything = modules(model)
    return sum({id(weight): weight.numel() for path in sites for _, weight in own_weights(everything[path])}.values())


def norms(model: nn.Module) -> list[str]:
    """Paths of the modules that normalize and then scale, LayerNorm, RMSNorm and their like, in the model's order."""
    return [path for path, module in modules(model).items() if _is_norm(module)]


def _is_norm(module: nn.Module) -> bool:
    """It owns a vector that scales, perhaps one that shifts, and nothing else.

    The scale of a norm on the heads of queries and keys may be a matrix (Cohere's); then what tells it is its epsilon.
    """
    own = dict(own_weights(module))
    if "weight" not in own or not own.keys() <= {"weight", "bias"} or any(True for _ in module.children()):
        return False
    if matrix_shape(module) or isinstance(module, nn.Embedding):
        return False
    return own["weight"].ndim == 1 or any("eps" in name for name in vars(module))


def within(model: nn.Module, candidates: Collection[str], patterns: Sequence[str], key: str) -> set[str]:
    """Those of the candidates that the patterns name or match, themselves or by a module that they are in.

    Args:
        key: What a recipe calls these patterns.

    Raises:
        NoSuchModule: A pattern that gives none.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        named = [path for path in modules(model) if matches(pattern, path)]
        inside = {c for c in candidates if pattern == ALL or any(c == path or c.startswith(f"{path}.") for path in named)}
        if not inside:
            lasts = sorted({path.rpartition(".")[2] for path in candidates})
            raise NoSuchModule(
                f"{key}: {pattern!r} names none of the modules of {type(model).__name__} that this method trains:\n{listing(lasts, 12)}"
            )
        chosen |= inside
    return chosen
