"""Patched forward passes of a model's layers: in packed passes, by fused operations and with gradient checkpointing where asked."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, copy_context
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.base.quantized import ExactForward
from trimtab.core.attention_hook import holding
from trimtab.engine.backends import backend_for
from trimtab.engine.layers import PatchedPartForward, compute_layer, patch_parts
from trimtab.engine.layouts import PackLayout
from trimtab.engine.learning import Learned, Lesson, current_lesson, learn, may_narrow
from trimtab.engine.recompute import recomputed_level, recomputing
from trimtab.engine.structure import LayerStructure
from trimtab.methods import active

_fused: ContextVar[bool] = ContextVar("fused", default=True)
_frozen_layers: ContextVar["FrozenLayers | None"] = ContextVar("frozen_layers", default=None)


def unfused() -> AbstractContextManager[None]:
    """Packed passes within the block, in this thread, run the model's own code except for attention: the reference."""
    return holding(_fused, False)


class FrozenLayers:
    """The layers below the lowest trained one, in one packed pass: skipped if their output is known, else it is recorded."""

    def __init__(self, lowest: nn.Module, known: Tensor | None) -> None:
        """
        Args:
            lowest: The lowest trained layer.
            known: T d, its input.
        """
        self.lowest, self.known = lowest, known
        self.below = True
        """The next layer may be one of the frozen ones."""
        self.recorded: Tensor | None = None
        """T d, their output, if it was not known."""
        self.alone = True
        """Hidden states (1 T d) are all that these layers hand on, and each runs once."""
        self.entered: set[int] = set()

    def enter(self, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, bool]:
        """The input of the next layer, and whether that layer is skipped."""
        self.alone = self.alone and id(layer) not in self.entered
        self.entered.add(id(layer))
        if not self.below:
            return hidden, False
        self.below = layer is not self.lowest
        if self.known is not None:
            return (hidden, True) if self.below else (self.known[None], False)
        shared = any(isinstance(value, Mapping) and len(value) for value in kwargs.values())  # keys and values (Gemma 4)
        self.alone = self.alone and not shared and hidden.ndim == 3 and len(hidden) == 1
        if not self.below and self.alone and not hidden.requires_grad:
            self.recorded = hidden[0]
        return hidden, False

    def leave(self, result: Any) -> None:
        """A layer has returned this."""
        others = result[1:] if isinstance(result, tuple) else ()
        self.alone = self.alone and not (self.below and any(value is not None for value in others))


def use_frozen_layers(frozen: FrozenLayers) -> AbstractContextManager[None]:
    """The packed pass within the block, in this thread, goes through these frozen layers."""
    return holding(_frozen_layers, frozen)


def layers_of(model: nn.Module) -> list[Any]:
    """The model's decoder layers, in their order."""
    patch_layers(model)
    return [module for module in model.modules() if type(vars(module).get("forward")) is PatchedForward]


def layers_by_hand(model: nn.Module) -> dict[str, int]:
    """How the model's decoder layers are computed in packed passes, and how many of them so; empty before the first one."""
    counts: dict[str, int] = {}
    for layer in layers_of(model):
        learned = layer.forward.learned
        if isinstance(learned, LayerStructure):
            text = f"{_own_class(layer)}: {', '.join(learned.by_hand)} by hand"
        else:
            text = f"{_own_class(layer)}: its own code, because {learned}"
        if learned is not None:
            counts[text] = counts.get(text, 0) + 1
    return counts


def _own_class(layer: nn.Module) -> str:
    """The name of a layer's class, without the one by which FSDP extends it."""
    return next(kind.__name__ for kind in type(layer).__mro__ if not kind.__module__.startswith("torch.distributed."))


def patch_layers(model: nn.Module) -> None:
    """Patch the forward passes of the decoder layers, for passes that have a PackLayout. `remove_hook` undoes it."""
    for module in _modules_from_last(model):
        own = module.__dict__.get("forward")
        if own is None and isinstance(getattr(type(module), "gradient_checkpointing", None), bool):
            module.forward = own = PatchedForward(module)  # as Transformers' own layers that can be checkpointed
        if type(own) is PatchedForward:
            own.shared = _is_shared(module)
            own.hooked = any(_is_hooked(inner) for inner in _modules_from_last(module) if not (own.shared and inner is module))


def learn_layers(model: Any, run: Callable[[Tensor, Tensor, PackLayout], Any]) -> None:
    """Learn the structure of patched layers that have not been learned, by a small pass (see `learning`)."""
    layers = layers_of(model)
    device, dtype = next((p.device, p.dtype) for p in model.parameters() if p.is_floating_point())
    like = torch.empty(1, 8, dtype=dtype, device=device)
    known = any(layer.forward.learned is not None for layer in layers)
    if not layers or known or current_lesson() is not None or not backend_for(like).supports_layers(like):
        return
    with _without_hooks(model):
        if any(_is_hooked(module) for layer in layers for module in _modules_from_last(layer)):
            return  # another forward pass in place of a module's own: perhaps for a moment
        reason, lesson = "it gets no layout", Lesson()
        with active(model), recomputing("none"), holding(_frozen_layers, None):
            try:
                lesson = learn(run, model.config.get_text_config().vocab_size, device)
            except Exception as error:  # the real pass will raise it where it is to be seen
                reason = f"{type(error).__name__}: {error}"
            for layer in layers:
                if layer.forward.learned is None:
                    layer.forward.learned = "it is not called" if lesson.order else reason
            once = len(set(map(id, lesson.order))) == len(lesson.order)
            for layer in lesson.order[-1:] if once else ():
                layer.forward.last = True
                layer.forward.last = may_narrow(run, device)


class PatchedForward:
    """A decoder layer's forward pass: by fused operations where they support it, with gradient checkpointing where asked."""

    is_patch = True

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.hooked = self.last = self.shared = False
        """Other code has hooks, or a forward pass, on a module in it; no layer is above it; processes share its weights."""
        self.learned: Learned | None = None
        self.returns = -1
        """As in LayerStructure."""

    def of_twin(self, twin: nn.Module) -> "PatchedForward":
        """The same of a layer that has other weights."""
        patched = copy.copy(self)
        patched.layer = twin
        return patched

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer, layout = self.layer, kwargs.get("layout")
        if type(layout) is not PackLayout:
            return type(layer).forward(layer, hidden_states, *args, **kwargs)
        kwargs.update(zip(_parameters(layer.__class__), args, strict=False))
        if (lesson := current_lesson()) is not None:
            self.learned = lesson.attend_to(layer, hidden_states, kwargs)
            patch_parts(layer, self.learned if isinstance(self.learned, LayerStructure) else None)
            return type(layer).forward(layer, hidden_states, **kwargs)
        if (frozen := _frozen_layers.get()) is not None:
            hidden_states, skipped = frozen.enter(layer, hidden_states, kwargs)
            if skipped:
                return hidden_states if self.returns < 0 else (hidden_states, *(None,) * self.returns)
        result = self._compute(layout, hidden_states, kwargs)
        self.returns = len(result) - 1 if isinstance(result, tuple) else -1
        if frozen is not None:
            frozen.leave(result)
        return result

    def _compute(self, layout: PackLayout, hidden_states: Tensor, kwargs: dict[str, Any]) -> Any:
        layer = self.layer
        if self._is_fused(hidden_states):
            assert isinstance(self.learned, LayerStructure)
            output_at = layout.output_at if self.last and self.learned.branches else None
            layout.narrowed = output_at is not None
            run = partial(_compute_by_hand, self, kwargs=kwargs, output_at=output_at)
            if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():  # as Transformers' own class does
                return layer._gradient_checkpointing_func(run, hidden_states)
        else:
            run = partial(type(layer).forward, layer, **kwargs)
        if recomputed_level() != "full" or not torch.is_grad_enabled():
            return run(hidden_states)
        return checkpoint(copy_context().run, run, hidden_states, use_reentrant=False)

    def _is_fused(self, hidden_states: Tensor) -> bool:
        if not _fused.get() or self.hooked or not isinstance(self.learned, LayerStructure):
            return False
        drops = self.learned.drops and any(module.training for module in self.layer.modules())
        known = not drops and hidden_states.ndim == 3 and len(hidden_states) == 1
        return known and backend_for(hidden_states).supports_layers(hidden_states)


def _compute_by_hand(patched: PatchedForward, hidden: Tensor, kwargs: dict[str, Any], output_at: Tensor | None) -> Any:
    result = compute_layer(patched.layer, patched.learned, hidden, kwargs, output_at)  # type: ignore[arg-type]
    if not patched.shared:
        return result
    # No view for autograd: FSDP's hook on the output, which gathers the layer for the backward pass, would be lost with an operation in place.
    first, *others = result if isinstance(result, tuple) else (result,)
    first = torch.ops.aten._unsafe_view(first, first.shape)
    return (first, *others) if isinstance(result, tuple) else first


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Within the block, other code's hooks are not called."""
    held = []
    for module in model.modules():
        own = vars(module)
        held += [(own, name, own[name]) for name in _HOOKS if own[name]]
    for own, name, hooks in held:
        own[name] = type(hooks)()
    try:
        yield
    finally:
        for own, name, hooks in held:
            own[name] = hooks


_GATHERING = ("torch.distributed.fsdp.", "deepspeed.", "trimtab.distributed.")
"""Packages of hooks that gather a layer's weights."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@cache
def _parameters(kind: Any) -> tuple[str, ...]:
    """The names of what a layer's forward pass gets after hidden states."""
    return tuple(inspect.signature(kind.forward).parameters)[2:]


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
    forward = own.get("forward", PatchedPartForward)
    return any(own[name] for name in _HOOKS) or not (type(forward) is ExactForward or getattr(forward, "is_patch", False))


def _is_shared(layer: nn.Module) -> bool:
    """Whether the only hooks on a layer are those that gather its weights before it computes, however it does, and free them: of FSDP, ZeRO-3,
    or `distributed`."""
    hooks = [hook for name in _HOOKS for hook in vars(layer)[name].values()]
    owners = [type(hook.__self__) if hasattr(hook, "__self__") else hook for hook in hooks]
    return bool(hooks) and all(str(owner.__module__).startswith(_GATHERING) for owner in owners)
