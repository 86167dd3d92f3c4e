"""Layers that carry state from token to token: gated DeltaNet and its kin, Mamba, short convolutions.

In Transformers such a layer asks a cache for its convolution and recurrent states, by methods that all of them share. That is how
they are recognized, and no layer needs code of its own. In a pack, a layer's own forward pass runs once on all tokens, and two of
the functions that it calls are replaced: the convolution looks up each token's predecessors in its row, and the scan runs over
segments, each of which starts from the state in which its parent ended. Segments of one depth and about one length are a batch.

A layer whose scan takes no state to start from (Mamba 1), or that does something else between tokens, runs row by row.

Shapes: T tokens, C channels, K kernel size, S segments in a batch, L tokens of the longest of them.
"""

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache, partial
from types import FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.attention_hook import current_layout, holding
from trimtab.core.stateful import called_state_methods
from trimtab.core.transfer import to_device
from trimtab.engine.layouts import DecodeLayout, LayerState, PackLayout, PrefillLayout
from trimtab.engine.recurrence import branching_scan
from trimtab.engine.segment_batches import batches
from trimtab.engine.state_caches import OwnStates, PackStates, stacked
from trimtab.methods import current_routing, routed

CONVOLUTION = "causal_conv1d_fn"
"""What Transformers calls the causal convolution of every such layer."""
UNLIMITED = (0.0, float("inf"))
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {None: lambda x: x, "silu": F.silu, "swish": F.silu}


class StateMethods(NamedTuple):
    """What a class of layers calls to reach its states, and how they can run in a pack."""

    convolves: bool
    recurrent: bool
    scans: tuple[str, ...]
    """Functions that go through all tokens, from a state if they are given one."""
    branches: bool
    """Its own forward pass can run on a whole pack, with the convolution and the scans replaced."""


def state_methods(kind: type[nn.Module]) -> StateMethods | None:
    """None for a class that carries no state."""
    called = called_state_methods(kind)
    return _state_methods(inspect.unwrap(kind.forward), frozenset(called)) if called else None


@cache
def _state_methods(forward: Any, called: frozenset[str]) -> StateMethods:
    convolves, recurrent = "get_conv_state" in called, "get_recurrent_state" in called
    functions = {n: forward.__globals__[n] for n in forward.__code__.co_names if callable(forward.__globals__.get(n))}
    scans = tuple(name for name, function in functions.items() if _initial_state(function) and "recurrent" not in name)
    branches = (not convolves or CONVOLUTION in functions) and (not recurrent or bool(scans))
    return StateMethods(convolves, recurrent, scans, branches)


def _initial_state(function: Callable[..., Any]) -> str | None:
    """The name of a function's parameter for the state from which it starts."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    return next((name for name in ("initial_state", "initial_states") if name in parameters), None)


_state_layers: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()


def state_layers(model: nn.Module) -> list[nn.Module]:
    """The model's layers that carry state."""
    if model not in _state_layers:
        _state_layers[model] = [module for module in model.modules() if state_methods(type(module)) is not None]
    return _state_layers[model]


def patch_state_layers(model: nn.Module) -> None:
    """Patch their forward passes, for passes that have a layout. `remove_hook` undoes it."""
    for layer in state_layers(model):
        if "forward" not in vars(layer):
            layer.forward = PatchedStateForward(layer)


class PatchedStateForward:
    """The forward pass of a layer that carries state: by the layout of the pass, or its own where there is none."""

    is_patch = True

    def __init__(self, layer: nn.Module, key: int | None = None) -> None:
        """`key` is that of its states in a cache."""
        self.layer, self.key = layer, id(layer) if key is None else key
        own: Any = inspect.unwrap(type(layer).forward)
        self.parameters = list(inspect.signature(own).parameters.values())[1:]
        self.names = {p.name for p in self.parameters if p.kind is not p.VAR_KEYWORD}

    def of_twin(self, twin: nn.Module) -> "PatchedStateForward":
        """The same of a layer that has other weights."""
        return PatchedStateForward(twin, self.key)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layout = kwargs.pop("layout", None) or current_layout()
        kwargs.pop("virtual", None)
        if not isinstance(layout, PackLayout | DecodeLayout):  # none, or the one of a single row
            return type(self.layer).forward(self.layer, *args, **kwargs)
        given = dict(zip((p.name for p in self.parameters), args, strict=False)) | kwargs
        first = self.parameters[0].name
        x = given.pop(first)
        options = {
            name: value for name, value in given.items() if name in self.names and name not in ("cache", "attention_mask")
        }
        layout.reached = True
        if isinstance(layout, DecodeLayout):
            return self._decode(x, layout, options)
        methods = state_methods(type(self.layer))
        assert methods is not None
        if methods.branches and x.shape[1] > 1:
            return self._pack(x, layout, methods, options)
        return self._rows(x, layout, options)

    def _own(self, x: Tensor, states: Any, options: dict[str, Any]) -> Any:
        return type(self.layer).forward(self.layer, x, cache=states, **options)

    def _pack(self, x: Tensor, layout: PackLayout, methods: StateMethods, options: dict[str, Any]) -> Any:
        states = PackStates(layout)
        with holding(_running, states):
            out = _branching_forward(inspect.unwrap(type(self.layer).forward), methods)(self.layer, x, cache=states, **options)
        if isinstance(layout, PrefillLayout):
            layout.cache.states[self.key] = LayerState(states.conv, states.recurrent)
        return out

    def _rows(self, x: Tensor, layout: PackLayout, options: dict[str, Any]) -> Any:
        """Each row by itself, shared tokens once more with each row."""
        ends = layout.leaves if isinstance(layout, PrefillLayout) else layout.ends
        outs, states, routing = [], [], current_routing()
        rows = [layout.row(end) for end in ends]
        for row in rows:
            states.append(OwnStates(LayerState({}, {})))
            with routed(routing.select(row.tolist()) if routing is not None else None):
                outs.append(self._own(x.index_select(1, to_device(row, x.device)), states[-1], options))
        if isinstance(layout, PrefillLayout):
            layout.cache.states[self.key] = stacked([each.state for each in states])
        first = to_device(torch.from_numpy(np.unique(torch.cat(rows).numpy(), return_index=True)[1]), x.device)
        return _joined(outs, lambda parts: torch.cat(parts, dim=1).index_select(1, first))

    def _decode(self, x: Tensor, layout: DecodeLayout, options: dict[str, Any]) -> Any:
        states = OwnStates(layout.cache.states[self.key])
        limit = tuple(getattr(self.layer, "time_step_limit", UNLIMITED))
        if limit != UNLIMITED:
            own: Any = inspect.unwrap(type(self.layer).forward)
            out = _replaced(own, _limited_steps(own, limit))(self.layer, x.transpose(0, 1), cache=states, **options)
        else:
            out = self._own(x.transpose(0, 1), states, options)
        return _joined([out], lambda parts: parts[0].transpose(0, 1))


def _joined(outs: list[Any], join: Callable[[list[Tensor]], Tensor]) -> Any:
    """What a layer returned for parts of its input as one; it may return several tensors."""
    if isinstance(outs[0], tuple):
        return tuple(join(list(parts)) if isinstance(parts[0], Tensor) else parts[0] for parts in zip(*outs, strict=True))
    return join(outs)


_running: ContextVar[PackStates] = ContextVar("running")


@cache
def _branching_forward(own: Any, methods: StateMethods) -> Callable[..., Any]:
    """A class's own forward pass, in which the convolution and the scans are replaced by ours."""
    replaced: dict[str, Any] = {name: partial(_scan, own.__globals__[name]) for name in methods.scans}
    if methods.convolves:
        replaced[CONVOLUTION] = _convolve
    return _replaced(own, replaced)


def _replaced(own: Any, functions: dict[str, Any]) -> Callable[..., Any]:
    """A function in which other functions stand for those of these names."""
    function = FunctionType(own.__code__, {**own.__globals__, **functions}, own.__name__, own.__defaults__, own.__closure__)
    function.__kwdefaults__ = own.__kwdefaults__
    return function


def _limited_steps(own: Any, limit: tuple[float, float]) -> dict[str, Any]:
    """The single steps of Mamba 2 with its limits on dt, which Transformers' scan applies and its steps forget."""

    def step(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(function).bind(*args, **kwargs)
        dt, bias = bound.arguments["dt"], bound.arguments.pop("dt_bias", None)
        dt = dt if bias is None else dt + bias.to(dt.dtype)
        dt = F.softplus(dt) if bound.arguments.pop("dt_softplus", False) else dt
        bound.arguments["dt"] = dt.clamp(*limit)
        return function(*bound.args, **bound.kwargs)

    steps = (name for name in own.__code__.co_names if "selective_state_update" in name and name in own.__globals__)
    return {name: partial(step, own.__globals__[name]) for name in steps}


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any) -> Tensor:
    """act(bias + Σ_k weight[k] · x[the token K−1−k before]) along each row: 1 C T -> 1 C T; weight C K."""
    before = _running.get().layout.sent("before", x.device)
    rows = F.pad(x[0].T, (0, 0, 0, 1))  # T+1 C; index −1 is what stands before a row
    at = torch.arange(len(before), device=x.device)
    before = torch.cat([before, before.new_full((1,), -1)])
    y = rows[:-1] * weight[:, -1]
    for k in range(2, weight.shape[1] + 1):
        at = before[at]
        y = torch.addcmul(y, rows.index_select(0, at % len(rows)), weight[:, -k])
    return ACTIVATIONS[activation](y if bias is None else y + bias).T[None]


def _scan(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a scan gives for each row of a pack: its outputs, 1 T …, and a last state that no token goes on from."""
    states = _running.get()
    bound = inspect.signature(function).bind(*args, **kwargs)
    start = _initial_state(function)
    assert start is not None
    count = len(states.layout.before)
    if (known := branching_scan(function, dict(bound.arguments), states.layout.segments)) is not None:
        out, ends = known
        states.after = dict(enumerate(ends.split(1)))
        return out, ends[-1:]
    sequences = {n: a for n, a in bound.arguments.items() if isinstance(a, Tensor) and a.ndim > 2 and a.shape[:2] == (1, count)}
    parts, tokens = [], []
    states.after.clear()
    device = next(iter(sequences.values())).device
    for batch in batches(states.layout, isinstance(states.layout, PrefillLayout), device):
        index = batch.tokens
        for name, sequence in sequences.items():
            bound.arguments[name] = sequence[0].index_select(0, index.flatten()).unflatten(0, index.shape)
        before = [states.after[states.layout.segments[number].parent] for number in batch.segments if batch.depth]
        bound.arguments[start] = torch.cat(before) if before else None
        out, last = function(*bound.args, **bound.kwargs)
        if batch.exact:
            states.after.update(zip(batch.segments, last.split(1), strict=True))
        parts.append(out.flatten(0, 1).index_select(0, batch.real))
        tokens.append(index.flatten().index_select(0, batch.real))
    return torch.cat(parts).index_select(0, torch.cat(tokens).argsort())[None], last
