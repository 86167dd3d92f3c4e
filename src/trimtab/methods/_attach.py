"""Put an adapter on a model, switch it off and on, read and write its tensors, take it off without a trace."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trimtab.errors import ArtifactError, RecipeError, listing
from trimtab.methods._base import AdapterLayer, Method, modules


class Attached:
    """An adapter on a model. Made by `attach`."""

    def __init__(self, model: nn.Module, method: Method, layers: dict[str, AdapterLayer], before: dict[str, bool]) -> None:
        self.model = model
        self.method = method
        self.layers = layers
        """The adapter's layers by the path of the module they adapt."""
        self._required_grad = before

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by `path.name`."""
        return {f"{path}.{name}": p for path, layer in self.layers.items() for name, p in layer.own_parameters().items()}

    def state(self) -> dict[str, Tensor]:
        """A copy of the adapter's tensors, by `path.name`, on the CPU."""
        return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in self.parameters().items()}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the adapter's tensors: exactly its names, shapes and types, every value finite; else ArtifactError and no change."""
        own = self.parameters()
        problems = [f"{name}: missing" for name in own if name not in tensors]
        problems += [f"{name}: unexpected" for name in tensors if name not in own]
        for name in own.keys() & tensors.keys():
            mine, saved = own[name], tensors[name]
            if saved.shape != mine.shape:
                problems.append(f"{name}: has shape {tuple(saved.shape)}, expected {tuple(mine.shape)}")
            elif not saved.is_floating_point():
                problems.append(f"{name}: has type {saved.dtype}, expected {mine.dtype}")
            elif not bool(saved.isfinite().all()):
                problems.append(f"{name}: holds values that are not finite")
        if problems:
            raise ArtifactError(f"its tensors do not fit this adapter on this model:\n{listing(sorted(problems))}")
        for name, parameter in own.items():
            parameter.copy_(tensors[name])

    @property
    def enabled(self) -> bool:
        return all(layer.enabled for layer in self.layers.values())

    def enable(self, enabled: bool = True) -> None:
        """Switch the adapter on, or off: then the model is the base, bit for bit."""
        for layer in self.layers.values():
            layer.enabled = enabled

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the base alone within the block."""
        before = [(layer, layer.enabled) for layer in self.layers.values()]
        self.enable(False)
        try:
            yield
        finally:
            for layer, enabled in before:
                layer.enabled = enabled

    def train(self, mode: bool = True) -> None:
        """Switch the adapter between training (its dropout acts) and evaluation. The base always evaluates."""
        for layer in self.layers.values():
            layer.train(mode)

    def detach(self) -> nn.Module:
        """Take the adapter off; the model is what it was before, modules, names, flags and bits."""
        for holder in list(self.model.modules()):
            for name, child in list(holder.named_children()):
                if isinstance(child, AdapterLayer) and child in self.layers.values():
                    setattr(holder, name, child.base)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad.get(name, parameter.requires_grad))
        self.layers = {}
        return self.model


def refuse_second(model: nn.Module) -> None:
    """Raise RecipeError if the model has an adapter already."""
    if any(isinstance(module, AdapterLayer) for module in model.modules()):
        raise RecipeError("This model has an adapter already. Take it off first: adapter.detach().")


def attach(model: nn.Module, method: Method, seed: int = 0) -> Attached:
    """Freeze `model` and put the method's layers on it, in place.

    Args:
        model: Any Transformers causal language model.
        seed: Decides the adapter's first values, with the method and the model alone.

    Raises:
        NoSuchModule: A target that names nothing in this model.
        RecipeError: The model has an adapter already.
    """
    refuse_second(model)
    sites = method.sites(model)
    everything = modules(model)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    layers = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path in sites:
            layer = method.layer(everything[path], path).eval()
            layer.to(next(everything[path].parameters()).device)  # drawn on the CPU, so equal on every device
            holder, _, name = path.rpartition(".")
            setattr(everything[holder], name, layer)
            layers[path] = layer
    adapter = Attached(model, method, layers, before)
    trained = sum(parameter.numel() for parameter in adapter.parameters().values())
    assert trained == method.parameter_count(model), f"{method.name} trains {trained:,} parameters, not what its formula says"
    return adapter
