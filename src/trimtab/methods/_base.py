"""What a method is: its hyperparameters, the modules of a model that it adapts, and the layer it puts there."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.config import Choice
from trimtab.core.errors import NotMergeable, UnsupportedModel
from trimtab.core.wrapping import base_modules
from trimtab.methods._layers import Layers
from trimtab.methods._matrices import ALL_LINEAR, MatrixShape, Targets, find_matrices, left_frozen, matrix_modules
from trimtab.methods._merged import MergeableLayer
from trimtab.methods._peft import SELECTION_KEYS, check_peft_config, from_peft_names, shortest_names, to_peft_names
from trimtab.methods._rates import LearningRateContext
from trimtab.methods._switch import Routing, Switch, only_active


class LowRankUpdate(NamedTuple):
    """y + drop(x) Aᵀ Bᵀ of a matrix's input x and output y."""

    A: Tensor
    """rank inputs."""
    B: Tensor
    """outputs rank, scale included."""
    dropout: float = 0.0
    """Probability with which an input of A is dropped now; the others are divided by 1 minus it."""


class AdapterLayer(MergeableLayer):
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
        return (self.twin() or self.adapt)(*args, **kwargs) if state else self.base(*args, **kwargs)

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        """The base's output, adapted; same arguments and return type as `base`."""
        raise NotImplementedError

    def route(self, routing: Routing, x: Tensor, *per_token: Any, **kwargs: Any) -> Any:
        """`forward` for tokens of several adapters, each once: 1 T … -> 1 T …, for a base that treats each token by itself.

        A base whose tokens come first (T …), with more about each of them (`per_token`) and several results, is one as well:
        the experts of a mixture, and the router that chooses them.
        """
        chain = [self.switch]
        inner = self.base
        while isinstance(inner, AdapterLayer):
            chain.append(inner.switch)
            inner = inner.base
        axis = _token_axis(x, len(routing.owners))
        parts, order = [], []
        for owner in (*chain, None):
            tokens = routing.tokens(owner, set(chain), x.device)
            if len(tokens) == len(routing.owners):
                with only_active(owner):
                    return self(x, *per_token, **kwargs)
            if len(tokens):
                with only_active(owner):
                    parts.append(self(*(t.index_select(axis, tokens) for t in (x, *per_token)), **kwargs))
                order.append(tokens)
        back = torch.cat(order).argsort()
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(results, dim=axis).index_select(axis, back) for results in zip(*parts, strict=True))
        widest = max(part.shape[-1] for part in parts)  # logits: an adapter may know tokens that others do not
        parts = [F.pad(part, (0, widest - part.shape[-1]), value=float("-inf")) for part in parts]
        return torch.cat(parts, dim=axis).index_select(axis, back)

    def replacement_parameters(self) -> Mapping[str, Tensor] | None:
        """What acts in place of the base's own parameters, rounded to their dtype, by name, if that is all the layer does."""
        return None

    def low_rank_factors(self) -> LowRankUpdate | None:
        """The update, in the dtype that it is trained in, if the layer is now its base matrix with it, and nothing else."""
        return None

    def merge(self) -> nn.Module:
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
    axes = [axis for axis in range(min(x.ndim, 3)) if x.shape[axis] == count]
    if x.ndim == 4 and axes == [1, 2]:  # as many heads as tokens: the heads of a token lie together in memory
        return max(axes, key=x.stride)
    if not axes:
        raise UnsupportedModel(
            f"A module with an adapter gets {tuple(x.shape)}, which does not hold all {count} tokens, so rows of different adapters cannot "
            "share a pass through this model. Run the rows of each adapter by themselves (trimtab.active)."
        )
    return axes[0]


def _evaluate(module: nn.Module, mode: bool) -> None:
    """Put a base module and all in it into evaluation mode, except the layers of other adapters.

    Transformers' layers apply gradient checkpointing in training mode alone, so such a layer follows `mode`; what is in it evaluates.
    """
    if not isinstance(module, AdapterLayer):
        module.training = mode and getattr(module, "gradient_checkpointing", False)
        for child in module.children():
            _evaluate(child, mode)


class Sample(NamedTuple):
    """Data that an adapter's initial values can be computed from, besides the model."""

    rows: Sequence[Sequence[int]] = ()
    """Token ids of examples, such as those that will be trained on."""
    encode: Callable[[str], list[int]] | None = None
    """Turns a text into token ids."""
    pieces: Callable[[str], list[int]] | None = None
    """The same without the tokens that were added to the tokenizer."""


class Method(Choice):
    """A family of adapters. One concrete subclass per file in this folder; the file's name is its name."""

    family: ClassVar[str] = "trimtab.methods"
    default: ClassVar[str] = "lora"

    peft_type: ClassVar[str | None] = None
    """What PEFT calls the method; None if PEFT has no such method."""
    peft_names: ClassVar[dict[str, str]] = {}
    """PEFT's names of the parameters, by ours."""
    identity_at_init: ClassVar[bool] = True
    """A fresh adapter changes nothing, bit for bit."""
    mergeable: ClassVar[bool] = True
    """The adapter is a change of weights."""
    exact_gradient: ClassVar[bool] = True
    """The gradient is the slope of the loss, nothing in it taken as constant."""
    auto_lr: ClassVar[str]
    """The learning rate that `lr: auto` means, from the search in docs/methods.md; unless `learning_rate` has a formula."""
    auto_lr_overshoots: ClassVar[bool] = False
    """With fewer than 16 examples per step, that rate is too high."""

    @abstractmethod
    def sites(self, model: nn.Module) -> list[str]:
        """Dotted paths of the modules to adapt, in the model's order. Every pattern asked for must match."""

    @abstractmethod
    def layer(self, base: nn.Module, path: str) -> AdapterLayer:
        """The layer to put at `path`, around `base`; its parameters are drawn from torch's global generator."""

    @abstractmethod
    def parameter_count(self, model: nn.Module) -> int:
        """How many parameters will be trained on this model, by closed formula."""

    def left_frozen(self, model: nn.Module) -> str:
        """What a target that means everything leaves as it is, and why, for people to read; "" where nothing has to be said."""
        everything = any(ALL_LINEAR in getattr(self, key, ()) for key in ("targets", "outputs", "inputs"))
        return left_frozen(model) if everything else ""

    def learning_rate(self, at: LearningRateContext) -> tuple[float, str]:
        """The learning rate that `lr: auto` means, and the formula in words."""
        if self.auto_lr_overshoots:
            return at.in_small_steps(self.auto_lr)
        return float(self.auto_lr), f"the best of a search for {self.name}"

    @property
    def virtual_token_count(self) -> int:
        """How many virtual tokens stand before every row; each takes one of the model's positions."""
        return 0

    @property
    def new_tokens(self) -> tuple[str, ...]:
        """Texts that the tokenizer is to read as one token each, before anything is encoded."""
        return ()

    def resolve_tokens(self, encode: Callable[[str], list[int]] | None) -> "Method":
        """This method with ids in place of the texts of tokens that it names, by the base's tokenizer. Raises RecipeError."""
        return self

    def initialize(self, model: nn.Module, layers: dict[str, AdapterLayer], sample: Sample) -> None:
        """Set initial values that depend on more than one layer's weights; called once the layers are in the model.

        Raises:
            RecipeError: It needs data that `sample` does not have.
        """

    def tie_parameters(self, layers: dict[str, AdapterLayer]) -> None:
        """Let layers share parameters; called when all of them are made, each around the model's own module."""

    def lr_multiplier(self, name: str) -> float:
        """The factor on the learning rate for the parameter of this name within its layer."""
        return 1.0

    def to_inference_form(self, layers: dict[str, AdapterLayer]) -> "tuple[Method, dict[str, Tensor]]":
        """What is saved: a method equal to this one without what only training needs, and its tensors by `path.name`.

        A reparametrization that helps training, such as the network that makes a prefix, is evaluated once and left out.
        """
        return self, {f"{path}.{name}": p for path, layer in layers.items() for name, p in layer.own_parameters().items()}

    @classmethod
    def recognizes(cls, config: dict[str, Any]) -> bool:
        """Whether a PEFT configuration is of this method."""
        return cls.peft_type is not None and config.get("peft_type") == cls.peft_type

    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The adapter in PEFT's terms: the content of `adapter_config.json`, and its tensors under PEFT's names.

        `tensors` holds them by `path.name`, as `to_inference_form` returns them; `model` is what they adapt. What PEFT has no
        method for, or would compute differently, says so in its `peft_type`, which PEFT then refuses: see `trimtab_only_config`.
        """
        return self.trimtab_only_config(), tensors

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple["Method", dict[str, Tensor]]:
        """The reverse of `to_peft`. Raises ArtifactError for what Trimtab would compute differently.

        PEFT's names of virtual tokens hold no path; where there is none, the name alone means the method's only module.
        """
        return cls(), tensors

    def peft_config(self, **settings: Any) -> dict[str, Any]:
        """The content of PEFT's `adapter_config.json`."""
        return {"peft_type": self.peft_type, "task_type": "CAUSAL_LM", "inference_mode": True, **settings}

    def trimtab_only_config(self) -> dict[str, Any]:
        """The same for an adapter that PEFT cannot represent: PEFT refuses it by this name, and our manifest has it all."""
        return self.peft_config() | {"peft_type": f"TRIMTAB_{self.name.upper()}"}

    @classmethod
    def read_peft(
        cls, config: dict[str, Any], tensors: Mapping[str, Tensor], *, ignored: Iterable[str] = (), **keys: Any
    ) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """PEFT's tensors under our names, and the paths of the adapted modules; `ignored` and `keys` as in `check_peft_config`.

        Raises ArtifactError: the configuration asks for something else, or a tensor is not this method's.
        """
        check_peft_config(config, ignored={*ignored, *SELECTION_KEYS}, **keys)
        return from_peft_names(tensors, cls.peft_names, cls.__name__)


class MatrixMethod(Method):
    """A method that adapts matrices of the blocks, each by itself."""

    targets: Targets = (ALL_LINEAR,)
    """Which matrices: `all-linear`, `attention`, names such as `q_proj`, or regular expressions, such as `[qv]_proj`."""
    layers: Layers = None
    adapts_experts: ClassVar[bool] = False
    """Whether it adapts the matrices of fused experts, each by itself."""

    def shapes(self, model: nn.Module) -> dict[str, MatrixShape]:
        """The targeted matrices by path. Raises NoSuchModule; RecipeError where a method does not fit one."""
        return find_matrices(model, self.targets, experts=self.adapts_experts, layers=self.layers)

    def sites(self, model: nn.Module) -> list[str]:
        return matrix_modules(self.shapes(model))

    def peft_settings(self) -> dict[str, Any]:
        """The method's own keys in PEFT's configuration."""
        return {}

    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """If PEFT has the method, it has it for nn.Linear alone."""
        if self.peft_type is None:
            return super().to_peft(model, tensors)
        own, sites = base_modules(model), self.sites(model)
        config = self.peft_config(target_modules=shortest_names(model, sites), bias="none", **self.peft_settings())
        if not all(isinstance(own[path], nn.Linear) for path in sites):
            config = self.trimtab_only_config()
        return config, to_peft_names(tensors, self.peft_names)
