"""What a method is: its hyperparameters, the modules of a model that it adapts, and the layer it puts there."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.config import Choice
from trimtab.core.errors import NotMergeable, UnsupportedModel
from trimtab.core.wrapping import Wrapper, unwrap
from trimtab.methods._switch import Routing, Switch, only


class AdapterLayer(Wrapper):
    """A frozen `base` module together with the trainable parameters that adapt it.

    Whatever this module owns outside `base` is the adapter. Freezing, counting, saving, loading and removing rely on
    that rule alone, so parameter names are free. `base` may itself be the layer of another adapter.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.switch = Switch()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self.switch.state
        if isinstance(state, Routing):
            return self.route(state, *args, **kwargs)
        return self.adapt(*args, **kwargs) if state else self.base(*args, **kwargs)

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        """The base's output, adapted; same arguments and return type as `base`."""
        raise NotImplementedError

    def route(self, routing: Routing, x: Tensor, *others: Any, **kwargs: Any) -> Any:
        """`forward` for tokens of several adapters, each once: 1 T … -> 1 T …, for a base that sees one token at a time.

        A base whose tokens come first (T …), with more about each of them (`others`) and several results, is one as well:
        the experts of a mixture, and what chooses them.
        """
        chain = [self.switch]
        inner = self.base
        while isinstance(inner, AdapterLayer):
            chain.append(inner.switch)
            inner = inner.base
        at = _token_axis(x, len(routing.owners))
        parts, order = [], []
        for owner in (*chain, None):
            tokens = routing.tokens(owner, set(chain), x.device)
            if len(tokens) == len(routing.owners):
                with only(owner):
                    return self(x, *others, **kwargs)
            if len(tokens):
                with only(owner):
                    parts.append(self(*(one.index_select(at, tokens) for one in (x, *others)), **kwargs))
                order.append(tokens)
        back = torch.cat(order).argsort()
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(several, dim=at).index_select(at, back) for several in zip(*parts, strict=True))
        most = max(part.shape[-1] for part in parts)  # logits: an adapter may know tokens that others do not
        parts = [F.pad(part, (0, most - part.shape[-1]), value=float("-inf")) for part in parts]
        return torch.cat(parts, dim=at).index_select(at, back)

    def replaced(self) -> Mapping[str, Tensor] | None:
        """What acts in place of the base's own parameters, by name, if that is all the layer does."""
        return None

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """A (rank, inputs) and B (outputs, rank), scale included, if the layer is now its base matrix plus B A, and nothing else."""
        return None

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
        _evaluate(self.base, mode)
        return self


def _token_axis(x: Tensor, count: int) -> int:
    """Which axis of a module's input counts the tokens: 1 T …, T …, or, before a norm of heads in Gemma 3, 1 H T K."""
    found = [axis for axis in range(min(x.ndim, 3)) if x.shape[axis] == count]
    if x.ndim == 4 and found == [1, 2]:  # as many heads as tokens: the heads of a token lie together in memory
        return max(found, key=x.stride)
    assert found, f"an input of the shape {tuple(x.shape)} does not hold {count} tokens"
    return found[0]


def _evaluate(module: nn.Module, mode: bool) -> None:
    """Evaluation mode for a base module and all in it, but for the layers of other adapters.

    Transformers' layers that are asked to recompute their activations do so in training mode alone; what they hold evaluates.
    """
    if not isinstance(module, AdapterLayer):
        module.training = mode and getattr(module, "gradient_checkpointing", False)
        for child in module.children():
            _evaluate(child, mode)


class LearningRateContext(NamedTuple):
    """What a learning rate chosen by formula may depend on."""

    model_type: str
    """The architecture's name in Transformers, such as "llama"."""
    hidden_size: int
    rows_per_step: float


class Sample(NamedTuple):
    """What an adapter's first values can be made from, besides the model."""

    rows: Sequence[Sequence[int]] = ()
    """Rows of tokens, such as those that will be learned."""
    encode: Callable[[str], list[int]] | None = None
    """Turns a text into tokens."""
    pieces: Callable[[str], list[int]] | None = None
    """The same without tokens that were added to the tokenizer."""


class Method(Choice):
    """A family of adapters. One concrete subclass per file in this folder; the file's name is its name."""

    family: ClassVar[str] = "trimtab.methods"
    default: ClassVar[str] = "lora"

    peft_type: ClassVar[str | None] = None
    """What PEFT calls the method; None if it has none such."""
    identity_at_init: ClassVar[bool] = True
    """A fresh adapter changes nothing, bit for bit."""
    mergeable: ClassVar[bool] = True
    """The adapter is a change of weights."""
    exact_gradient: ClassVar[bool] = True
    """The gradient is the slope of the loss, nothing in it taken as constant."""

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
    def learning_rate(self, at: LearningRateContext) -> tuple[float, str]:
        """The learning rate that `lr: auto` means, and the formula in words."""

    @property
    def positions(self) -> int:
        """How many of a row's positions its virtual tokens take."""
        return 0

    @property
    def new_tokens(self) -> tuple[str, ...]:
        """Texts that the tokenizer is to read as one token each, before anything is encoded."""
        return ()

    def bound(self, encode: Callable[[str], list[int]] | None) -> "Method":
        """This method with what it says of tokens in their ids, by the tokenizer of the base it is attached to. Raises RecipeError."""
        return self

    def initialize(self, model: nn.Module, layers: dict[str, AdapterLayer], sample: Sample) -> None:
        """Set first values that depend on more than one layer's weights; called once the layers are in the model.

        Raises:
            RecipeError: It needs what `sample` does not have.
        """

    def join(self, layers: dict[str, AdapterLayer]) -> None:
        """Let layers share parameters; called when all of them are made, each around the model's own module."""

    def lr_multiplier(self, name: str) -> float:
        """By what the learning rate is multiplied for the parameter of this name within its layer."""
        return 1.0

    def folded(self, layers: dict[str, AdapterLayer]) -> "tuple[Method, dict[str, Tensor]]":
        """What is saved: a method whose parameters are these tensors, by `path.name`; equal to this one, less its scaffolding.

        A parametrization that helps training, such as the network that makes a prefix, is computed once and left out.
        """
        return self, {f"{path}.{name}": p for path, layer in layers.items() for name, p in layer.own_parameters().items()}

    @classmethod
    def reads(cls, config: dict[str, Any]) -> bool:
        """Whether a PEFT configuration is of this method."""
        return cls.peft_type is not None and config.get("peft_type") == cls.peft_type

    @abstractmethod
    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The adapter in PEFT's terms: the content of `adapter_config.json`, and its tensors under PEFT's names.

        `tensors` holds them by `path.name`, as `folded` gives them; `model` is what they adapt. What PEFT has no method
        for, or would compute differently, says so in its `peft_type`, which PEFT then refuses: see `not_pefts`.
        """

    @classmethod
    @abstractmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple["Method", dict[str, Tensor]]:
        """The reverse of `to_peft`. Raises ArtifactError for what Trimtab would compute differently.

        PEFT's names of virtual tokens say no path; where there is none, the name alone means the method's only module.
        """


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


def wide(weight: Tensor) -> torch.dtype:
    """The number type of what is trained beside a weight: float32, or float64 beside float64."""
    return torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32


def matrix(module: nn.Module) -> Tensor:
    """The matrix of a module that has one, an embedding included, as (outputs, inputs) and in at least float32.

    Raises UnsupportedModel if it is quantized: then nothing else is exactly its matrix.
    """
    weight = unwrap(module).weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point():
        raise UnsupportedModel(
            f"A {type(unwrap(module)).__name__} is quantized, and this method starts from or changes the weights themselves. "
            "Use one that leaves them as they are, such as lora, or a base that is not quantized."
        )
    weight = weight.to(wide(weight))
    return weight if isinstance(unwrap(module), nn.Linear) else weight.T  # Conv1D and Embedding store (inputs, outputs)


def with_weight(module: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of the model's own module with another matrix: `make` turns its (outputs, inputs) into the new one."""
    changed = make(matrix(module))
    made = copy.deepcopy(unwrap(module))
    stored = changed if isinstance(made, nn.Linear) else changed.T
    made.weight = nn.Parameter(stored.contiguous(), requires_grad=False)
    return made
