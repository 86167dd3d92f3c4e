"""Patched forward passes of a model's layers: in packed passes, by fused operations and with gradient checkpointing where asked."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.core.attention_hook import holding
from trimtab.engine.backends import backend_for
from trimtab.engine.layers import compute_layer, compute_mlp, is_supported
from trimtab.engine.layouts import PackLayout

_fused: ContextVar[bool] = ContextVar("fused", default=True)
_checkpointing: ContextVar[bool] = ContextVar("checkpointing", default=False)
_frozen_layers: ContextVar["FrozenLayers | None"] = ContextVar("frozen_layers", default=None)


def unfused() -> AbstractContextManager[None]:
    """Packed passes within the block, in this thread, run the model's own code except for attention: the reference."""
    return holding(_fused, False)


def gradient_checkpointing(enabled: bool = True) -> AbstractContextManager[None]:
    """Packed passes within the block, in this thread, save the layers' inputs alone and recompute layers in the backward pass."""
    return holding(_checkpointing, enabled)


class FrozenLayers:
    """The layers below the lowest trained one, in one packed pass: skipped if their output is known, else it is recorded."""

    def __init__(self, count: int, known: Tensor | None) -> None:
        """
        Args:
            known: T d, their output.
        """
        self.count, self.known = count, known
        self.layer = 0
        """The number of the next layer."""
        self.recorded: Tensor | None = None
        """T d, their output, if it was not known."""

    def enter(self, hidden: Tensor) -> tuple[Tensor, bool]:
        """The input of the next layer (1 T d), and whether that layer is skipped."""
        number, self.layer = self.layer, self.layer + 1
        if self.known is not None:
            return (self.known[None], False) if number == self.count else (hidden, number < self.count)
        if number == self.count and not hidden.requires_grad:
            self.recorded = hidden[0]
        return hidden, False


def use_frozen_layers(frozen: FrozenLayers) -> AbstractContextManager[None]:
    """The packed pass within the block, in this thread, goes through these frozen layers."""
    return holding(_frozen_layers, frozen)


def layers_of(model: nn.Module) -> list[Any]:
    """The model's decoder layers, in their order."""
    patch_layers(model)
    return [module for module in model.modules() if type(vars(module).get("forward")) is PatchedForward]


def patch_layers(model: nn.Module) -> None:
    """Patch the forward passes of the decoder layers, for passes that have a PackLayout. `remove_hook` undoes it."""
    last = True
    for module in _modules_from_last(model):
        own = module.__dict__.get("forward")
        if own is None and isinstance(getattr(type(module), "gradient_checkpointing", None), bool):
            module.forward = own = PatchedForward(module)  # as Transformers' own layers that can be checkpointed
        elif own is None and is_supported(module, "MLP"):
            module.forward = PatchedMLPForward(module)
        if type(own) is PatchedForward:
            own.hooked, own.last, last = any(map(_is_hooked, _modules_from_last(module))), last, False


class PatchedForward:
    """A decoder layer's forward pass: by fused operations where they support it, with gradient checkpointing where asked."""

    is_patch = True

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.hooked = self.last = False
        """Other code has hooks, or a forward pass, on a module in it; no layer is above it."""

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer, layout = self.layer, kwargs.get("layout")
        if type(layout) is not PackLayout:
            return type(layer).forward(layer, hidden_states, *args, **kwargs)
        if (frozen := _frozen_layers.get()) is not None:
            hidden_states, skipped = frozen.enter(hidden_states)
            if skipped:
                return hidden_states
        if self._is_fused(hidden_states, args):
            output_at = layout.output_at if self.last else None
            layout.narrowed = output_at is not None
            run = partial(compute_layer, layer, kwargs=kwargs, output_at=output_at)
            if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():  # as Transformers' own class does
                return layer._gradient_checkpointing_func(run, hidden_states)
        else:
            run = partial(type(layer).forward, layer, **kwargs)
        if not _checkpointing.get() or not torch.is_grad_enabled():
            return run(hidden_states, *args)
        return checkpoint(copy_context().run, run, hidden_states, *args, use_reentrant=False)

    def _is_fused(self, hidden_states: Tensor, args: Any) -> bool:
        known = _fused.get() and not self.hooked and is_supported(self.layer, "DecoderLayer")
        return known and not args and len(hidden_states) == 1 and backend_for(hidden_states).supports_layers(hidden_states)


class PatchedMLPForward:
    """An MLP's forward pass, by fused operations where an adapter around it is called by `compute_layer`."""

    is_patch = True

    def __init__(self, mlp: Any) -> None:
        self.mlp = mlp

    def __call__(self, x: Tensor) -> Tensor:
        out = compute_mlp(self.mlp, x)
        return type(self.mlp).forward(self.mlp, x) if out is None else out


def _modules_from_last(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all those in it, the last first, in a tenth of the time of `modules`, which names them."""
    stack: list[nn.Module | None] = [module]
    while stack:
        if (inner := stack.pop()) is not None:
            yield inner
            stack += inner._modules.values()


def _is_hooked(module: nn.Module) -> bool:
    """Whether other code has put a hook, or a forward pass of its own, on the module."""
    own = vars(module)
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooked) or not getattr(own.get("forward", PatchedMLPForward), "is_patch", False)
