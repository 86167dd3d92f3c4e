"""Which way attention over a tree is computed on an accelerator: the first that is made for it, and proved on this device.

A probe computes a small tree both ways, forward and backward, once for each kind of attention: what fails it is not used.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.attention
from torch import Tensor

from trimtab.data.prefix_tree import Segment
from trimtab.engine.backends import AttentionInputs, AttentionPlan, Heads, flash, flex, segments
from trimtab.engine.backends.paths import fits
from trimtab.engine.backends.probing import proved

_HALVES = (torch.bfloat16, torch.float16)


class Way(NamedTuple):
    """How attention is computed."""

    name: str
    takes: Callable[[Tensor, AttentionPlan, bool], bool]
    """Whether it is made for such queries, such a plan, and sinks."""
    attend: Callable[[AttentionInputs, AttentionPlan, bool], tuple[Tensor, Sequence[Tensor | None]]]
    attend_backward: Callable[[Tensor, Sequence[Tensor | None], AttentionPlan], Sequence[Tensor | None]]


def way_of(q: Tensor, plan: AttentionPlan, sinks: bool) -> Way:
    """The way that takes such attention.

    Args:
        q: T H·K, of which the device and number type count.
    """
    for way in WAYS[:-1]:
        if way.takes(q, plan, sinks) and fits(plan) and (q.is_meta or _is_proved(way, q, plan, sinks)):
            return way
    return WAYS[-1]


def _takes_flash(q: Tensor, plan: AttentionPlan, sinks: bool) -> bool:
    made_for = q.is_meta or (q.is_cuda and (torch.version.hip is not None or _capability(q.device) >= (8, 0)))
    return made_for and q.dtype in _HALVES and _has_plain_heads(plan) and (not sinks or flash.gives_sums_by_token())


def _takes_efficient(q: Tensor, plan: AttentionPlan, sinks: bool) -> bool:
    if not q.is_cuda or sinks or not _has_plain_heads(plan):
        return False
    return q.dtype in (torch.float32, torch.float16) or (q.dtype == torch.bfloat16 and _capability(q.device) >= (8, 0))


def _takes_flex(q: Tensor, plan: AttentionPlan, sinks: bool) -> bool:
    return q.is_cuda and not sinks and (plan.softcap is not None or q.dtype == torch.float32) and flex.takes(plan)


def _has_plain_heads(plan: AttentionPlan) -> bool:
    return plan.softcap is None and plan.heads.size % 8 == 0 and plan.heads.size <= 256


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _by(kernel: flash.Kernel, takes: Callable[[Tensor, AttentionPlan, bool], bool]) -> Way:
    return Way(kernel.name, takes, partial(flash.attend, kernel), partial(flash.attend_backward, kernel))


WAYS = (
    _by(flash.FLASH, _takes_flash),
    _by(flash.EFFICIENT, _takes_efficient),
    Way("FlexAttention", _takes_flex, flex.attend, flex.attend_backward),
    Way("a call for each segment", lambda q, plan, sinks: True, segments.attend, segments.attend_backward),
)
"""The best first; the last takes everything."""


def _is_proved(way: Way, q: Tensor, plan: AttentionPlan, sinks: bool) -> bool:
    key: tuple[Hashable, ...] = (q.device, q.dtype, plan.heads[1:], plan.window is not None, plan.softcap is not None, sinks)
    probe = partial(_problem, way, q, plan, sinks)
    while way.name == flash.FLASH.name and (newer := _newer_flash(q.device)) is not None:
        if proved(f"{way.name} by {newer}", key, probe):
            return True
        _newer[newer] = False
        torch.nn.attention.restore_flash_attention_impl()  # what newer kernels have proved, older ones have not
    return proved(way.name, key, probe)


_NEWER = {"FA3": (9,), "FA4": (9, 10)}
"""Implementations of flash attention that PyTorch puts in the place of its own where they are installed; for devices of which generations."""
_newer: dict[str, bool] = {}
"""Whether each is in use; False if it is not installed, or failed a probe."""


def _newer_flash(device: torch.device) -> str | None:
    """The newer implementation that is in use on this device, from now on if it was not."""
    activate: Any = getattr(torch.nn.attention, "activate_flash_attention_impl", None)  # PyTorch 2.11
    for name, generations in _NEWER.items() if activate is not None and device.type == "cuda" else ():
        if name not in _newer and _capability(device)[0] in generations:
            _newer[name] = False
            with suppress(Exception):
                activate(name)
                _newer[name] = True
        if _newer.get(name) and _capability(device)[0] in generations:
            return name
    return None


_TREE = (Segment(0, 70, -1), Segment(70, 75, 0), Segment(75, 210, 0), Segment(210, 211, -1), Segment(211, 340, 3))


def _problem(way: Way, q: Tensor, plan: AttentionPlan, sinks: bool) -> str | None:
    """What is wrong with a small tree, compared with float64 on the CPU."""
    heads, draw = Heads(2, *plan.heads[1:]), torch.Generator().manual_seed(0)
    small = plan._replace(segments=_TREE, heads=heads, virtual=5, chunk=None, window=None if plan.window is None else 40)
    tokens, H, narrow = _TREE[-1].end, heads.groups * heads.per_group, heads.groups * heads.size
    shapes: list[tuple[int, ...]] = [(tokens, H * heads.size), (tokens, narrow), (tokens, narrow), (tokens, 0), (tokens, 0)]
    shapes += [(2, 5, heads.size), (2, 5, heads.size), (H,), (tokens, H * heads.size)]
    *drawn, dout = (torch.randn(shape, generator=draw).to(q.dtype) for shape in shapes)

    def both(way: Way, place: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        out, saved = way.attend(AttentionInputs(*map(place, drawn if sinks else drawn[:-1])), small, True)
        return [out, *way.attend_backward(place(dout), saved, small)]

    results = both(way, lambda t: t.to(q.device)), both(WAYS[-1], torch.Tensor.double)
    names = "the result", *(f"the gradient of {name}" for name in ("q", "k", "v", "virtual keys", "virtual values", "sinks"))
    bound = max(4 * torch.finfo(q.dtype).eps, 1e-4)
    for name, ours, exact in zip(names, *results, strict=True):
        if ours is not None and exact is not None:
            apart = float((ours.cpu().double() - exact).norm() / exact.norm())
            if not apart <= bound:
                return f"{name} is off by {apart:.1%} of its size"
    return None
