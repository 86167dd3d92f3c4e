"""Put adapters on a model, switch them off and on, read and write their tensors, take them off without a trace."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.attention_hook import install_hook, remove_hook
from trimtab.core.errors import ArtifactError, RecipeError, listing
from trimtab.core.randomness import seeded
from trimtab.core.wrapping import base_modules
from trimtab.methods._base import AdapterLayer, Method, Sample
from trimtab.methods._described import Described
from trimtab.methods._merged import MergeableAdapter
from trimtab.methods._switch import Switch, switched

_REGISTER = "trimtab_adapters"
"""The attribute of a model that holds what is attached to it."""


@dataclass
class _Register:
    """The adapters on a model, and what to restore when the last is detached: `requires_grad` of its parameters, and own methods."""

    required_grad: dict[str, bool]
    adapters: "dict[str, Attached]" = field(default_factory=dict)
    replaced_methods: set[str] = field(default_factory=set)


class Attached(MergeableAdapter, Described):
    """An adapter on a model. Made by `attach`."""

    def __init__(self, model: nn.Module, name: str, method: Method, layers: dict[str, AdapterLayer]) -> None:
        self.model = model
        self.name = name
        self.method = method
        self.layers: dict[str, AdapterLayer] = layers
        """The adapter's layers by the path of the module they adapt."""
        self.trained = False
        """Its values have been trained, or loaded: a fresh adapter's reference is the base, a trained one's is itself."""
        self.shares = 1
        """Among how many processes an engine divides what it trains, and the optimizer's state of that."""
        self.switch = Switch()
        for layer in layers.values():
            layer.switch = self.switch

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by `path.name`; one that layers share is under the name of the first."""
        named = self._named_parameters()
        first_name = {id(parameter): name for name, parameter in reversed(named.items())}
        return {name: parameter for name, parameter in named.items() if first_name[id(parameter)] == name}

    def _named_parameters(self) -> dict[str, nn.Parameter]:
        """Shared parameters under each of their names."""
        return {f"{path}.{name}": p for path, layer in self.layers.items() for name, p in layer.own_parameters().items()}

    def state(self) -> dict[str, Tensor]:
        """A copy of the adapter's tensors, by `path.name`, on the CPU."""
        return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in self.parameters().items()}

    @torch.no_grad()
    def to_inference_form(self) -> tuple[Method, dict[str, Tensor]]:
        """What is saved of the adapter: a method without what only training needs, and its tensors as `state` returns them."""
        method, tensors = self.method.to_inference_form(self.layers)
        names = self.parameters() if method is self.method else tensors
        return method, {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items() if name in names}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the adapter's tensors: exactly its names, shapes and dtypes, every value finite; else ArtifactError and no change.

        What layers share may come under several of its names, if the values are equal.
        """
        if self.merged:
            raise RecipeError("This adapter is merged, so other values would not act. Unmerge it first (unmerge).")
        own = self.parameters()
        name_of = {id(parameter): name for name, parameter in own.items()}
        aliases = {name: name_of[id(parameter)] for name, parameter in self._named_parameters().items()}
        shared = {name: tensors.get(aliases.get(name, "")) for name in tensors.keys() - own.keys()}
        repeated = {name for name, original in shared.items() if original is not None and torch.equal(tensors[name], original)}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in repeated}
        problems = [f"{name}: missing" for name in own if name not in tensors]
        problems += [f"{name}: unexpected" for name in tensors if name not in own]
        for name in own.keys() & tensors.keys():
            parameter, saved = own[name], tensors[name]
            if saved.shape != parameter.shape:
                problems.append(f"{name}: has shape {tuple(saved.shape)}, expected {tuple(parameter.shape)}")
            elif not saved.is_floating_point():
                problems.append(f"{name}: has type {saved.dtype}, expected {parameter.dtype}")
            elif not bool(saved.isfinite().all()):
                problems.append(f"{name}: holds values that are not finite")
        if problems:
            raise ArtifactError(f"its tensors do not fit this adapter on this model:\n{listing(sorted(problems))}")
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
        self.trained = True

    @property
    def enabled(self) -> bool:
        """Whether the adapter acts, outside of blocks that say otherwise."""
        return self.switch.on

    def enable(self, enabled: bool = True) -> None:
        """Switch the adapter on, or off: without others the model is then the base, bit for bit."""
        self.switch.on = enabled

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the model without this adapter within the block, in this thread."""
        with switched({self.switch: False}):
            yield

    def train(self, mode: bool = True) -> None:
        """Switch the adapter between training (its dropout acts) and evaluation. The base always evaluates."""
        for layer in self.layers.values():
            layer.train(mode)

    def detach(self) -> nn.Module:
        """Take the adapter off; without others the model is what it was before, modules, names, flags and bits."""
        own = set(self.layers.values())
        for holder in list(self.model.modules()):
            for name, child in list(holder.named_children()):
                while child in own:
                    child = child.base
                setattr(holder, name, child)
        register = getattr(self.model, _REGISTER, None)
        if register is not None and register.adapters.get(self.name) is self:
            del register.adapters[self.name]
            if not register.adapters:
                delattr(self.model, _REGISTER)
                remove_hook(self.model)
                for name in register.replaced_methods:
                    delattr(self.model, name)
                for name, parameter in self.model.named_parameters():
                    parameter.requires_grad_(register.required_grad.get(name, parameter.requires_grad))
        self.layers = {}
        return self.model


def adapters(model: nn.Module) -> dict[str, Attached]:
    """The adapters on a model by name, in the order they came."""
    register = getattr(model, _REGISTER, None)
    return dict(register.adapters) if register is not None else {}


def replace_method(model: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Replace a method of the model itself, as long as there are adapters on it."""
    getattr(model, _REGISTER).replaced_methods.add(name)
    setattr(model, name, partial(function, model))


def activate(model: nn.Module, *names: str) -> None:
    """Switch on these adapters and no others. Raises RecipeError for a name that is not on the model."""
    on = [find_adapter(model, name) for name in names]
    for adapter in adapters(model).values():
        adapter.enable(adapter in on)


@contextmanager
def active(model: nn.Module, *names: str) -> Iterator[None]:
    """These adapters and no others act within the block, in this thread."""
    on = [find_adapter(model, name) for name in names]
    with switched({adapter.switch: adapter in on for adapter in adapters(model).values()}):
        yield


def switch_of(model: nn.Module, name: str | None) -> Switch | None:
    """The switch of the adapter of this name; None for None, the base alone. Raises RecipeError."""
    return None if name is None else find_adapter(model, name).switch


def max_row_length(model: nn.Module, context_length: int | None) -> int | None:
    """How many tokens an example may have in a context that holds the adapters' virtual tokens too; None for no limit."""
    virtual = max((adapter.method.virtual_token_count for adapter in adapters(model).values()), default=0)
    return None if context_length is None else context_length - virtual


def find_adapter(model: nn.Module, name: str) -> Attached:
    """The adapter of this name. Raises RecipeError if it is not on the model."""
    attached = adapters(model)
    if name not in attached:
        raise RecipeError(f"There is no adapter {name!r} on this model. It has: {', '.join(map(repr, attached)) or 'none'}.")
    return attached[name]


def require_free_name(model: nn.Module, name: str) -> None:
    """Raise RecipeError if the model has an adapter of this name already."""
    if name in adapters(model):
        raise RecipeError(
            f"This model has an adapter called {name!r} already. Take it off first (detach), or give the new one another name."
        )


def attach(
    model: nn.Module,
    method: Method,
    seed: int = 0,
    *,
    name: str = "default",
    sample: Sample | None = None,
) -> Attached:
    """Freeze `model` and put the method's layers on it, in place. Of several adapters, only the new one is switched on.

    Arguments and errors are those of `trimtab.attach`, which also has the model's `save_pretrained` write adapters alone.
    """
    require_free_name(model, name)
    method = method.resolve_tokens(sample.encode if sample else None)
    adapter = attach_uninitialized(model, method, seed, name)
    try:
        with seeded(seed), torch.no_grad():
            method.initialize(model, adapter.layers, sample or Sample())
    except BaseException:
        adapter.detach()
        raise
    return adapter


def attach_uninitialized(model: nn.Module, method: Method, seed: int, name: str) -> Attached:
    """`attach` without `Method.initialize`, for an adapter whose values are then loaded."""
    require_free_name(model, name)
    sites = method.sites(model)
    own = base_modules(model)
    layers = {}
    with seeded(seed):
        for path in sites:
            layer = method.layer(own[path], path).eval()
            parameter = next(own[path].parameters(), None)
            if parameter is not None:
                layer.to(parameter.device)  # drawn on the CPU, so equal on every device
            layers[path] = layer
    method.tie_parameters(layers)
    register = getattr(model, _REGISTER, None)
    if register is None:
        register = _Register({path: p.requires_grad for path, p in model.named_parameters()})
        model.requires_grad_(False)
    for path, layer in layers.items():
        holder, _, last = path.rpartition(".")
        layer.base = getattr(own[holder], last)  # another adapter's layer, where one stands there already
        setattr(own[holder], last, layer)
    install_hook(model)
    adapter = Attached(model, name, method, layers)
    register.adapters[name] = adapter
    setattr(model, _REGISTER, register)
    activate(model, name)
    trained = sum(parameter.numel() for parameter in adapter.parameters().values())
    assert trained == method.parameter_count(model), f"{method.name} trains {trained:,} parameters, not what its formula says"
    return adapter
