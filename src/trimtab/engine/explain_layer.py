"""Explain what was watched of a decoder layer as a structure: branches of norms and mixers, and the sums between them.

What is found is compared in numbers (each projection, norm, rotation, gate and sum), and no name of a class is looked at. It
explains one pass of random numbers; `learning` then proves it by computing the layer both ways.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trimtab.engine.explain_parts import mixer_part, norm_part
from trimtab.engine.structure import AttentionPart, Branch, LayerStructure, Mixer, MLPPart, NormPart
from trimtab.engine.watching import CLOSE, SUM, Call, UnknownStructure, Watched, alike, is_norm
from trimtab.methods import base_modules


def structures_of(seen: Watched) -> Iterator[LayerStructure]:
    """Structures that explain what was seen, the best first: the whole layer's, and its parts alone.

    Raises:
        UnknownStructure: None does.
    """
    reason = "nothing in it is known"
    try:
        structure = _structure(seen)
        if structure.by_hand:
            yield structure
    except UnknownStructure as unknown:
        reason = str(unknown)
    parts: dict[str, NormPart | AttentionPart | MLPPart] = {}
    for call in seen.calls[""]:
        part = norm_part(call.name, call.module) or (None if call.others else mixer_part(seen, call))
        if part is not None:
            parts[call.name] = part
    if not parts:
        raise UnknownStructure(reason)
    yield LayerStructure((), {}, None, -1, _drops(seen.layer), parts)


def _structure(seen: Watched) -> LayerStructure:
    calls, at, branches = seen.calls[""], 0, []
    norms = {call.name: part for call in calls if (part := norm_part(call.name, call.module)) is not None}
    if len({call.name for call in calls}) != len(calls) or not calls:
        raise UnknownStructure("it calls a module several times, or none")
    out = seen.result[0] if isinstance(seen.result, tuple) else seen.result
    rest = seen.result[1:] if isinstance(seen.result, tuple) else ()
    if not isinstance(out, Tensor) or out.shape != seen.x.shape or any(value is not None for value in rest):
        raise UnknownStructure("it returns more than hidden states")
    x = seen.x
    while at < len(calls):
        if at and calls[at].x.shape != x.shape:
            raise UnknownStructure(f"it calls {calls[at].name} with something other than hidden states")
        branch, y, at = _branch(seen, x, at)
        end, factor = (calls[at].x, None) if at < len(calls) else _factor(seen.layer, out, x, y)
        branches.append(branch._replace(scale=_scale(seen.layer, end, x, y)))
        x = end
    used = {name for branch in branches for name in (branch.pre, branch.post)}
    kept = {name: part for name, part in norms.items() if name in used}
    returns = len(rest) if isinstance(seen.result, tuple) else -1
    return LayerStructure(tuple(branches), kept, factor, returns, _drops(seen.layer), {})


def _branch(seen: Watched, x: Tensor, at: int) -> tuple[Branch, Tensor, int]:
    """The branch whose first call has this number, what it adds, and the number of the next one's."""
    calls = seen.calls[""]
    pre, h = None, x
    if calls[at].x is not x:
        raise UnknownStructure(f"it changes what it calls {calls[at].name} with")
    if is_norm(calls[at].module) and at + 1 < len(calls) and calls[at + 1].x is calls[at].y:
        pre, h, at = calls[at].name, calls[at].y, at + 1
    mixers, sums = [], []
    while at < len(calls) and calls[at].x is h and not is_norm(calls[at].module):
        mixers.append(_mixer(seen, calls[at]))
        sums.append(calls[at].y)
        at += 1
    if not mixers or any(y.shape != x.shape for y in sums):
        raise UnknownStructure(f"it calls {calls[min(at, len(calls) - 1)].name} with something other than what a norm returns")
    y = torch.stack(sums).sum(0) if len(sums) > 1 else sums[0]
    if at < len(calls) and is_norm(calls[at].module) and calls[at].x.shape == y.shape and alike(calls[at].x, y, SUM):
        return Branch(pre, tuple(mixers), calls[at].name, 1.0), calls[at].y, at + 1
    return Branch(pre, tuple(mixers), None, 1.0), y, at


def _scale(layer: nn.Module, end: Tensor, x: Tensor, y: Tensor) -> float:
    """s of end = x + s · y."""
    scales = [1.0, *(value for value in vars(layer).values() if type(value) is float)]
    size = y.double().abs().amax(-1) / (x.double().abs().amax(-1) + 1e-30)
    if float(size.max()) < 1e3 * SUM:
        raise UnknownStructure("what a part of it adds is too small to be told from nothing")
    for scale in scales:
        if alike(end.double(), x.double() + scale * y.double(), SUM):
            return scale
    raise UnknownStructure("what it adds to the hidden states is not what its modules return")


def _factor(layer: nn.Module, out: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, str | None]:
    """x + s · y and f of out = f · (x + s · y), where f is a number that the layer holds."""
    for name, value in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
        if value.numel() == 1 and float(value) != 0.0:
            plain = (out.double() / value.double()).to(out.dtype)
            try:
                _scale(layer, plain, x, y)
            except UnknownStructure:
                continue
            return plain, name
    return out, None


def _mixer(seen: Watched, call: Call) -> Mixer:
    """How a module is called, and computed by hand, if that is known."""
    if call.others:
        raise UnknownStructure(f"it calls {call.name} with several tensors")
    handed = frozenset(name for name, value in seen.kwargs.items() if call.kwargs.get(name, seen) is value)
    dropped = frozenset(seen.kwargs.keys() - handed) if "layout" in handed else None
    constants = {name: value for name, value in call.kwargs.items() if name not in handed}
    if not all(value is None or isinstance(value, bool | int | float | str) for value in constants.values()):
        raise UnknownStructure(f"it calls {call.name} with keyword arguments of its own")
    part, mixes = mixer_part(seen, call), any(one.module is call.module for one in seen.attended)
    mixer = Mixer(call.name, part, call.x_name, handed, dropped, constants, isinstance(part, MLPPart))
    if part is None and not mixes and not handed:
        tokens = torch.arange(call.x.shape[1] - 1, -1, -2)  # what they give alone, in another order, they give among others
        some = mixer.call(call.module, call.x[:, tokens], {})
        return mixer._replace(per_token=alike(some, call.y[:, tokens], CLOSE))
    return mixer


def _drops(layer: nn.Module) -> bool:
    """Whether something in the layer is dropped at random in training."""
    for module in base_modules(layer).values():
        if isinstance(module, nn.Dropout) and module.p > 0:
            return True
        if any("dropout" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items()):
            return True
    return False
