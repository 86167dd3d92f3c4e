"""Learn the structure of a model's decoder layers, at its first packed pass, and prove it.

One small pass of random tokens shows in which order layers run and with which keyword arguments. In it, each kind of layer is
watched, then computed both ways on random numbers: hidden states and gradient must agree, or the layer is left to its own code.
Of a layer in 16 bits, whose rounding would hide differences, a float32 copy is watched and computed; then in 16 bits, by hand must
be as near to that copy as its own code is.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.base.quantized import computing_in
from trimtab.core.attention import AttentionCall, LocalMask
from trimtab.core.attention_hook import holding
from trimtab.data.prefix_tree import Segment
from trimtab.engine.explain_layer import structures_of
from trimtab.engine.layers import compute_layer, patch_parts
from trimtab.engine.layouts import PackLayout
from trimtab.engine.products import HALF
from trimtab.engine.structure import LayerStructure
from trimtab.engine.watching import CLOSE, Attended, UnknownStructure, Watched, alike, watching
from trimtab.methods import AdapterLayer, base_modules

SEGMENTS = (Segment(0, 4, -1), Segment(4, 7, 0), Segment(7, 10, -1))
POSITIONS = (0, 3, 11, 26, 27, 31, 38, 2, 9, 40)
"""Far apart, and below the longest position of the tiniest models."""
FARTHER = 4099
"""Positions are multiplied by this where a layer gets them as numbers: what depends on long distances shows."""
WINDOW = 3
"""Longer windows are cut to this, so that a window matters to so few tokens."""
GRADIENT = 1e-4
"""Of the largest number in a row of the gradient: it is a sum of more numbers."""
NEAR = 1.5
"""In 16 bits, times the distance of the layer's own code from float32: chance alone makes a third, among so few tokens."""

Learned = LayerStructure | str
"""The structure of a layer; or why it is left to its own code."""


class Lesson:
    """The small pass in which a model's layers are learned."""

    def __init__(self) -> None:
        self.kinds: dict[Any, Learned] = {}
        self.order: list[Any] = []
        """The layers, as they are called."""

    def attend_to(self, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Learned:
        """Learn the structure of a layer that is called with these arguments."""
        self.order.append(layer)
        if hidden.ndim != 3 or len(hidden) != 1:
            return "it is not called with hidden states (1 T d)"
        key = _kind(layer, kwargs)
        if key not in self.kinds:
            self.kinds[key] = _learned(layer, hidden, kwargs)
        return self.kinds[key]


_lesson: ContextVar[Lesson | None] = ContextVar("lesson", default=None)


def current_lesson() -> Lesson | None:
    """The lesson that the running pass is."""
    return _lesson.get()


def learn(run: Callable[[Tensor, Tensor, PackLayout], Any], vocabulary: int, device: torch.device) -> Lesson:
    """Run a small pass, from token ids, positions and a layout, in which `current_lesson` is the lesson that is returned."""
    ids = torch.arange(len(POSITIONS), device=device) * 7 % vocabulary
    lesson = Lesson()
    with torch.no_grad(), holding(_lesson, lesson), torch.random.fork_rng(devices=[]):
        run(ids, torch.tensor(POSITIONS, device=device), PackLayout(SEGMENTS))
    return lesson


@torch.no_grad()
def may_narrow(run: Callable[[Tensor, Tensor, PackLayout], Any], device: torch.device) -> bool:
    """Whether what comes after the last layer takes fewer tokens than the model was given: some models restore the shape of their input."""
    ids, at = torch.arange(len(POSITIONS), device=device), torch.tensor([1, 5, 9], device=device)
    try:
        whole, narrowed = (run(ids, ids, PackLayout(SEGMENTS, part)).last_hidden_state[0] for part in (None, at))
    except Exception:  # whatever their code raises
        return False
    return narrowed.shape == whole[at].shape and alike(narrowed, whole[at], CLOSE)


def _kind(layer: nn.Module, kwargs: Mapping[str, Any]) -> Any:
    """What decides how a layer computes, besides its weights: classes, sizes, and settings of every module in it."""
    facts: list[Any] = []
    configs: dict[int, Any] = {}
    for path, module in base_modules(layer).items():
        own = vars(module)
        facts.append((path, type(module), own["training"]))
        facts += [(n, v) for n, v in own.items() if n not in _NUMBERS and isinstance(v, bool | int | float | str | None)]
        for name, t in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            facts.append((name, t.shape, t.dtype, t.device, t.numel() == 1 and float(t) in (0.0, 1.0)))
        if (config := own.get("config")) is not None:
            configs[id(config)] = config
    number = next((n for m in base_modules(layer).values() if (n := getattr(m, "layer_idx", None)) is not None), None)
    for config in configs.values():
        listed = {name: value for name, value in vars(config).items() if isinstance(value, list | tuple)}
        facts += [(name, str(value[number])) for name, value in listed.items() if number is not None and number < len(value)]
    mask = kwargs.get("attention_mask")
    facts += [("mask", None if isinstance(mask, Tensor) else mask), ("arguments", tuple(kwargs))]
    return tuple(facts)


_NUMBERS = ("layer_idx", "training")


def _learned(layer: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> Learned:
    try:
        with torch.enable_grad():
            if hidden.dtype not in HALF:
                return _proved(layer, _inputs(hidden), dict(kwargs))
            return _proved_in_half(layer, _inputs(hidden), dict(kwargs))
    except UnknownStructure as unknown:
        return str(unknown)
    except Exception as error:  # whatever its modules raise when they are called otherwise than they expect
        return f"{type(error).__name__}: {error}"


class _Inputs(NamedTuple):
    """Random hidden states, 1 T d, and the direction of their gradient."""

    x: Tensor
    direction: Tensor


def _inputs(like: Tensor) -> _Inputs:
    draw = torch.Generator().manual_seed(0)
    size = torch.logspace(-2, 0.5, like.shape[1], dtype=torch.float64)[torch.randperm(like.shape[1], generator=draw)]
    x = torch.randn(like.shape, generator=draw, dtype=torch.float64) * size[:, None]
    direction = torch.randn(like.shape, generator=draw, dtype=torch.float64)
    return _Inputs(x.to(like).requires_grad_(), direction.to(like))


def _proved(layer: nn.Module, inputs: _Inputs, kwargs: dict[str, Any]) -> LayerStructure:
    """The structure of the layer, by which it computes what its own code does.

    Raises:
        UnknownStructure: Otherwise.
    """
    x, direction = inputs
    if isinstance(positions := kwargs.get("position_ids"), Tensor):
        kwargs["position_ids"] = positions * FARTHER
    held = _held(kwargs)
    with _watched_attention(kwargs["layout"]) as attended:
        with watching(layer) as calls:
            own = type(layer).forward(layer, x, **kwargs)
        of_own = _gradient(own, x, direction, keep=True)
        shares = _held(kwargs) != held
        with torch.no_grad():
            structures = list(structures_of(Watched(layer, x, kwargs, calls, attended, own, shares)))
        kwargs |= _short_mask(attended, kwargs)
        for structure in structures:
            patch_parts(layer, structure)
            ours = compute_layer(layer, structure, x, kwargs)
            if alike(_first(ours), _first(own), CLOSE) and alike(_gradient(ours, x, direction), of_own, GRADIENT):
                return structure
    patch_parts(layer, None)
    raise UnknownStructure("computed by hand it gives something else")


def _proved_in_half(layer: nn.Module, inputs: _Inputs, kwargs: dict[str, Any]) -> LayerStructure:
    """The structure that is proved on a float32 copy of the layer, which is as near to it in 16 bits as its own code.

    Raises:
        UnknownStructure: Otherwise.
    """
    switches = {id(m.switch): m.switch for m in layer.modules() if isinstance(m, AdapterLayer)}
    wide = copy.deepcopy(layer, dict(switches)).float()
    wide_inputs, wide_kwargs = _Inputs(inputs.x.detach().float().requires_grad_(), inputs.direction.float()), _widened(kwargs)
    with computing_in(wide, torch.float32):
        structure = _proved(wide, wide_inputs, wide_kwargs)
        with _watched_attention(kwargs["layout"]):
            exact = _computed(type(wide).forward(wide, wide_inputs.x, **wide_kwargs), wide_inputs)
    kwargs |= {name: wide_kwargs[name] for name in ("position_ids", "attention_mask") if name in wide_kwargs}
    with _watched_attention(kwargs["layout"]):
        own = _computed(type(layer).forward(layer, inputs.x, **kwargs), inputs)
    patch_parts(layer, structure)
    ours = _computed(compute_layer(layer, structure, inputs.x, kwargs), inputs)
    for one, other, truth in zip(ours, own, exact, strict=True):
        if one.dtype != other.dtype or not _distance(one, truth) <= NEAR * _distance(other, truth):
            raise UnknownStructure(
                f"in {str(one.dtype).removeprefix('torch.')}, by hand it is farther from float32 than its own code"
            )
    return structure


def _computed(out: Any, inputs: _Inputs) -> tuple[Tensor, Tensor]:
    """Hidden states and gradient, each 1 T d."""
    return _first(out).detach(), _gradient(out, *inputs)


def _distance(a: Tensor, truth: Tensor) -> float:
    """‖a − truth‖ / ‖truth‖, of all rows alike."""
    size = truth.norm(dim=-1, keepdim=True)
    return float(((a.float() - truth) / size).norm())


def _widened(value: Any) -> Any:
    """Tensors of 16 bits in float32, those in tuples, lists and dictionaries too."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALF else value
    if type(value) is dict:
        return {key: _widened(item) for key, item in value.items()}
    return type(value)(map(_widened, value)) if type(value) in (tuple, list) else value


def _held(kwargs: Mapping[str, Any]) -> list[Any]:
    """What is in the mappings among the keyword arguments, by which layers hand things on to each other."""
    return [[(key, id(item)) for key, item in value.items()] for value in kwargs.values() if isinstance(value, Mapping)]


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _gradient(out: Any, x: Tensor, direction: Tensor, keep: bool = False) -> Tensor:
    return torch.autograd.grad(_first(out), x, direction, retain_graph=keep)[0]


@contextmanager
def _watched_attention(layout: PackLayout) -> Iterator[list[Attended]]:
    """The calls of attention within the block, whose windows and chunks are cut short."""
    attended: list[Attended] = []

    def attend(call: AttentionCall) -> Tensor:
        rules = call.rules
        short = rules._replace(window=_short(rules.window), chunk=_short(rules.chunk))
        out = PackLayout.attend(layout, call._replace(rules=short))
        attended.append(Attended(call.layer, call.query[0], call.key[0], call.value[0], rules, out[0].flatten(1)))
        return out

    vars(layout)["attend"] = attend
    try:
        yield attended
    finally:
        del vars(layout)["attend"]


def _short(size: int | None) -> int | None:
    return None if size is None else min(size, WINDOW)


def _short_mask(attended: list[Attended], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The mask that says the windows and chunks that attention was asked for, cut short."""
    sizes = {(one.rules.window, one.rules.chunk) for one in attended} - {(None, None)}
    if not sizes or isinstance(kwargs.get("attention_mask"), Tensor):
        return {}
    if len(sizes) > 1 or "attention_mask" not in kwargs:
        raise UnknownStructure("it has several windows, or none of its masks says them")
    return {"attention_mask": LocalMask(*map(_short, *sizes))}
