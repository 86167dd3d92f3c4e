"""What a method is: its hyperparameters, the modules of a model that it adapts, and the layer it puts there."""

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from trimtab.config import Choice
from trimtab.errors import ArtifactError, NotMergeable


class AdapterLayer(nn.Module):
    """A frozen `base` module together with the trainable parameters that adapt it.

    Whatever this module owns outside `base` is the adapter. Freezing, counting, saving, loading and removing rely on
    that rule alone, so parameter names are free.
    """

    base: nn.Module

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.enabled = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.adapt(*args, **kwargs) if self.enabled else self.base(*args, **kwargs)

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        """The base's output, adapted; same arguments and return type as `base`."""
        raise NotImplementedError

    def merged(self) -> nn.Module:
        """A plain module equal to this one, new weights and all; `base` is left as it is.

        Raises:
            NotMergeable: This adapter is not a change of weights.
        """
        raise NotMergeable(
            f"{type(self).__name__} is not a change of weights, so it cannot be merged into the base. "
            "Use the adapter beside its base model instead."
        )

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters in this layer, by their name within it."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("base.")}

    def train(self, mode: bool = True) -> "AdapterLayer":
        """Switch what the adapter owns between training and evaluation (dropout); `base` always evaluates."""
        super().train(mode)
        self.base.eval()
        return self


class Circumstances(NamedTuple):
    """What a learning rate chosen by formula may depend on."""

    model_type: str
    """The architecture's name in Transformers, such as "llama"."""
    hidden_size: int
    rows_per_step: float


class Method(Choice):
    """A family of adapters. One concrete subclass per file in this folder; the file's name is its name."""

    family: ClassVar[str] = "trimtab.methods"
    default: ClassVar[str] = "lora"

    peft_type: ClassVar[str]
    """What PEFT calls the method."""
    starts_as_base: ClassVar[bool] = True
    """A fresh adapter changes nothing, bit for bit."""
    mergeable: ClassVar[bool] = True
    """The adapter is a change of weights."""

    @abstractmethod
    def sites(self, model: nn.Module) -> list[str]:
        """Dotted paths of the modules to adapt, in the model's order. Every pattern asked for must match."""

    @abstractmethod
    def layer(self, base: nn.Module, path: str) -> AdapterLayer:
        """The layer to put at `path`, around `base`; its parameters are drawn from torch's global generator."""

    @abstractmethod
    def parameter_count(self, model: nn.Module) -> int:
        """How many parameters will be trained on this model, by closed formula."""

    @abstractmethod
    def learning_rate(self, at: Circumstances) -> tuple[float, str]:
        """The learning rate that `lr: auto` means, and the formula in words."""

    @abstractmethod
    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The adapter in PEFT's terms: the content of `adapter_config.json`, and its tensors under PEFT's names.

        `tensors` holds them by `path.name`, as `Attached.state` does; `model` is what they adapt.
        """

    @classmethod
    @abstractmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple["Method", dict[str, Tensor]]:
        """The reverse of `to_peft`. Raises ArtifactError for what Trimtab would compute differently."""


def only_known(config: dict[str, Any], honoured: set[str], neutral: dict[str, tuple[Any, ...]], ignored: set[str]) -> None:
    """Refuse a PEFT config that asks for something this method does not do.

    Args:
        honoured: Keys that are read.
        neutral: Keys that are not, with the values that ask for nothing (besides None, False and empty).
        ignored: Keys that do not change what the adapter computes.
    """
    asked = [
        f"{key}: {value!r}"
        for key, value in config.items()
        if key not in honoured | ignored and value not in (None, False, [], {}, "") and value not in neutral.get(key, ())
    ]
    if asked:
        raise ArtifactError(
            f"adapter_config.json asks for what Trimtab does not do here: {'; '.join(asked)}. "
            "Loading it anyway would give other outputs than PEFT's."
        )


def look_through(module: nn.Module) -> nn.Module:
    """The model's own module at a place where adapter layers may stand."""
    while isinstance(module, AdapterLayer):
        module = module.base
    return module


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's own modules by the path they have without adapters."""
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, path: str) -> None:
        module = look_through(module)
        found[path] = module
        for name, child in module.named_children():
            visit(child, f"{path}.{name}" if path else name)

    visit(model, "")
    return found


def matrix_shape(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a module that multiplies by one weight matrix, or None for any other module.

    Besides nn.Linear, that is GPT-2's Conv1D, which stores the matrix transposed and says its sizes as `nx` and `nf`.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    sizes = (getattr(module, "nx", None), getattr(module, "nf", None))
    if isinstance(weight, Tensor) and weight.ndim == 2 and tuple(weight.shape) == sizes:
        return weight.shape[0], weight.shape[1]
    return None
