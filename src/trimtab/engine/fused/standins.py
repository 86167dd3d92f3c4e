"""Who stands in for the forward passes of a model's layers, and when: in packed passes alone, by hand or computed again where asked."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.core.attention_hook import holding
from trimtab.engine.fused.blocks import is_known, layer_by_hand, mlp_by_hand
from trimtab.engine.layouts import PackLayout

_by_hand: ContextVar[bool] = ContextVar("by_hand", default=True)
_recomputed: ContextVar[bool] = ContextVar("recomputed", default=False)
_passing: ContextVar["Passing | None"] = ContextVar("passing", default=None)


def unfused() -> AbstractContextManager[None]:
    """Packed passes within the block, in this thread, are the model's own code but for attention: the reference."""
    return holding(_by_hand, False)


def recomputed(recompute: bool = True) -> AbstractContextManager[None]:
    """Packed passes within the block, in this thread, keep the inputs of layers alone, and compute them again in the backward pass."""
    return holding(_recomputed, recompute)


class Passing:
    """A packed pass on its way through the layers, of which those below the lowest trained one may be known already."""

    def __init__(self, lowest: int, known: Tensor | None) -> None:
        """
        Args:
            lowest: The number of the lowest trained layer.
            known: T d, what enters it; then the layers below are passed over.
        """
        self.lowest, self.known = lowest, known
        self.number = 0
        self.left: Tensor | None = None
        """T d, what entered it, if that was not known."""

    def enter(self, hidden: Tensor) -> tuple[Tensor, bool]:
        """What enters the next layer (1 T d), and whether that is passed over."""
        number, self.number = self.number, self.number + 1
        if self.known is not None:
            return (self.known[None], False) if number == self.lowest else (hidden, number < self.lowest)
        if number == self.lowest and not hidden.requires_grad:
            self.left = hidden[0]
        return hidden, False


def passing(one: Passing) -> AbstractContextManager[None]:
    """The packed pass within the block, in this thread, is this one."""
    return holding(_passing, one)


def layers_of(model: nn.Module) -> list[Any]:
    """The layers that stand-ins stand before, in their order."""
    fuse(model)
    return [module for module in model.modules() if type(vars(module).get("forward")) is PatchedForward]


def fuse(model: nn.Module) -> None:
    """Put stand-ins before the layers' own forward passes, which act where a pass has a PackLayout. `remove_hook` undoes it."""
    last = True
    for module in _inside(model):
        own = module.__dict__.get("forward")
        if own is None and isinstance(getattr(type(module), "gradient_checkpointing", None), bool):
            module.forward = own = PatchedForward(module)  # as Transformers' own layers that can be computed again
        elif own is None and is_known(module, "MLP"):
            module.forward = PatchedMLPForward(module)
        if type(own) is PatchedForward:
            own.watched, own.last, last = any(map(_watched, _inside(module))), last, False


class PatchedForward:
    """A decoder layer's forward pass: by hand where it is known, computed again in the backward pass where that is asked for."""

    is_patch = True

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.watched = self.last = False
        """Somebody's hooks are in it, or a forward pass of their own; no layer is above it."""

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer, layout = self.layer, kwargs.get("layout")
        if type(layout) is not PackLayout:
            return type(layer).forward(layer, hidden_states, *args, **kwargs)
        if (one := _passing.get()) is not None:
            hidden_states, over = one.enter(hidden_states)
            if over:
                return hidden_states
        plain = not args and hidden_states.shape[0] == 1 and hidden_states.is_cpu and _by_hand.get()
        plain = plain and is_known(layer, "DecoderLayer") and hidden_states.dtype in (torch.float32, torch.float64)
        if plain and not self.watched:
            wanted = layout.wanted if self.last else None
            layout.narrowed = wanted is not None
            run = partial(layer_by_hand, layer, kwargs=kwargs, wanted=wanted)
            if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():  # as Transformers' own class does
                return layer._gradient_checkpointing_func(run, hidden_states)
        else:
            run = partial(type(layer).forward, layer, **kwargs)
        if not _recomputed.get() or not torch.is_grad_enabled():
            return run(hidden_states, *args)
        return checkpoint(copy_context().run, run, hidden_states, *args, use_reentrant=False)


class PatchedMLPForward:
    """An MLP's forward pass, for an adapter around it that is called by a layer by hand."""

    is_patch = True

    def __init__(self, mlp: Any) -> None:
        self.mlp = mlp

    def __call__(self, x: Tensor) -> Tensor:
        made = mlp_by_hand(self.mlp, x)
        return type(self.mlp).forward(self.mlp, x) if made is None else made


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all those in it, the last first, in a tenth of the time of `modules`, which names them."""
    todo: list[nn.Module | None] = [module]
    while todo:
        if (one := todo.pop()) is not None:
            yield one
            todo += one._modules.values()


def _watched(module: nn.Module) -> bool:
    """Somebody has put a hook, or a forward pass of their own, on the module."""
    own = vars(module)
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooked) or not getattr(own.get("forward", PatchedMLPForward), "is_patch", False)
