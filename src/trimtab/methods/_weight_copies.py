"""Trainable copies of a module's own weights, run in their place: what full fine-tuning and LayerNorm tuning have in common."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from trimtab.core.errors import RecipeError, UnsupportedModel
from trimtab.core.wrapping import is_divided
from trimtab.methods import AdapterLayer, Routing, base_modules, trainable_dtype, unwrap
from trimtab.methods._structure import own_weights


class WeightCopyLayer(AdapterLayer):
    """The base with trainable parameters in place of its own, under the same names; they start as those.

    They are float32 even on a base of fewer bits, and are rounded to its dtype to compute with.
    """

    def __init__(self, base: nn.Module, path: str) -> None:
        super().__init__(base)
        for name, weight in own_weights(base):
            if not weight.is_floating_point():
                raise UnsupportedModel(
                    f"{path}.{name} is quantized, and cannot be trained itself. Choose other targets, a method that leaves "
                    "weights as they are, such as lora, or a base that is not quantized."
                )
            self.register_parameter(name, nn.Parameter(weight.detach().to(trainable_dtype(weight), copy=True)))

    def __getattr__(self, name: str) -> Any:
        """Models read the weights of some modules, such as convolutions, without calling them: by these names, what acts now."""
        trained = vars(self)["_parameters"].get(name)
        if trained is None or is_divided(trained):  # between passes: FSDP asks for what it has divided
            return super().__getattr__(name)
        if isinstance(self.switch.state, Routing):
            raise UnsupportedModel(
                f"The model reads {name} of {type(unwrap(self.base)).__name__} itself, for rows of several adapters at once. Run the rows of "
                "each adapter by themselves (trimtab.active)."
            )
        weight: Tensor = getattr(self.base, name)
        return trained.to(weight.dtype) if self.switch.state else weight

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        values = {name: self._parameters[name].to(weight.dtype) for name, weight in own_weights(unwrap(self.base))}  # type: ignore[union-attr]
        return with_parameters(self.base, values)(*args, **kwargs)

    def replacement_parameters(self) -> Mapping[str, Tensor]:
        return dict(own_weights(self))

    def merge(self) -> nn.Module:
        return with_parameters(unwrap(self.base), dict(own_weights(self)))


def with_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A twin of a module that shares all with it but has these parameters; of another adapter's layer, one around such a twin.

    torch.func.functional_call would exchange them in the module itself, which another thread may be running.

    Raises:
        RecipeError: Another adapter that retrains the same weights is switched on.
    """
    twin = module.without_twin() if isinstance(module, AdapterLayer) else copy.copy(module)
    if isinstance(module, AdapterLayer):
        if isinstance(module, WeightCopyLayer) and module.switch.state:
            raise RecipeError("Two adapters that retrain the same weights cannot act at once: switch one of them off.")
        twin._modules = {**module._modules, "base": with_parameters(module.base, values)}
    else:
        twin._parameters = {**module._parameters, **values}  # type: ignore[dict-item]
        if getattr(patched := vars(twin).get("forward"), "is_patch", False):  # it would compute with the module's own
            twin.forward = patched.of_twin(twin)  # type: ignore[union-attr]
    return twin


def count_parameters(model: nn.Module, sites: Sequence[str]) -> int:
    """How many parameters these modules own, tied ones counted once."""
    own = base_modules(model)
    return sum({id(weight): weight.numel() for path in sites for _, weight in own_weights(own[path])}.values())
