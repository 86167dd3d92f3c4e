"""Passes over memory on an accelerator: Triton's kernels where a probe proved them on this device, else PyTorch's operations.

A probe computes a few random rows as long as those asked for, forward and backward, both ways, once for each kind of rows.
"""

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.engine.backends import Activation, Norm
from trimtab.engine.backends import torch as reference
from trimtab.engine.backends.probing import difference, proved

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter takes tensors on the CPU."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LONGEST = 65_536
"""Numbers of a row that a norm's program holds, at most."""


def rms_norm(x: Tensor, norm: Norm, scratch: bool = False) -> tuple[Tensor, Tensor]:
    return (_norms(x, norm, x) or reference).rms_norm(x, norm)


def rms_norm_backward(dy: Tensor, x: Tensor, norm: Norm, rstd: Tensor, residual: Tensor | None = None) -> Tensor:
    return (_norms(x, norm, dy, residual) or reference).rms_norm_backward(dy, x, norm, rstd, residual)


def gate(g: Tensor, u: Tensor, activation: Activation, scratch: bool = False) -> Tensor:
    return (_gates(activation, g, u) or reference).gate(g, u, activation)


def gate_backward_(dh: Tensor, g: Tensor, u: Tensor, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    return (_gates(activation, g, u, dh) or reference).gate_backward_(dh, g, u, activation)


def softmax_tile_(logits: Tensor, top: Tensor, total: Tensor) -> Tensor:
    def probe(way: Any, draw: _Draw) -> Sequence[Tensor]:
        tile, sums = 8 * draw(logits, 3), draw(top, 2, 3).abs()
        return way.softmax_tile_(tile, sums[0], sums[1]), tile, sums

    key = logits.device, logits.dtype, logits.shape[1]
    return (_proved("softmax", key, probe, logits, top, total) or reference).softmax_tile_(logits, top, total)


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, size: int, interleaved: bool, sign: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """x, T heads·size, with the first R numbers of each head rotated by its token's angles (cos and sin T R), or back (−1).

    Args:
        out: Where it is written, perhaps x itself; rows may be strided.
    """

    def probe(way: Any, draw: _Draw) -> Sequence[Tensor]:
        heads, angles = draw(x, 3), draw(cos, 6)
        turned = way.rotate(heads, angles[:3], angles[3:], size, interleaved)
        return turned, way.rotate(heads, angles[:3], angles[3:], size, interleaved, -1.0, heads)

    key = x.device, x.dtype, cos.dtype, x.shape[1], size, cos.shape[1], interleaved
    kernels = _proved("rotary embedding", key, probe, x, cos, sin, out) if cos.shape[1] else None
    return (kernels or reference).rotate(x, cos, sin, size, interleaved, sign, out)


def summed_by_users(source: Tensor, starts: Tensor, users: Tensor) -> Tensor:
    """For each of T keys, the sum of the rows of source (T' n) that `users[starts[key]:starts[key + 1]]` names: T n, in float32 inside.

    Args:
        starts: T + 1, int32.
        users: int32.
    """

    def probe(way: Any, draw: _Draw) -> Sequence[Tensor]:
        places = torch.tensor([0, 2, 2, 5, 4, 0, 1, 1, 3], dtype=torch.int32, device=source.device)
        return [way.summed_by_users(draw(source, 5), places[:4], places[4:])]

    key = source.device, source.dtype, source.shape[1]
    return (_proved("sums by users", key, probe, source) or reference).summed_by_users(source, starts, users)


def _norms(x: Tensor, norm: Norm, *others: Tensor | None) -> Any:
    def probe(way: Any, draw: _Draw) -> Sequence[Tensor]:
        heads = 2 if x.ndim == 3 else 1
        rows, weight = draw(x, 9 * heads), draw(norm.weight[None], 1)[0]
        given, dy, beside = (t.unflatten(0, (3, heads)) if heads > 1 else t for t in rows.split(3 * heads))
        own = norm._replace(weight=weight)
        y, rstd = way.rms_norm(given, own)
        return y, rstd, *(way.rms_norm_backward(dy, given, own, rstd, residual) for residual in (None, beside))

    if x.shape[-1] > _LONGEST or any(t is not None and t.ndim == 3 and t.stride(1) != t.shape[2] for t in (x, *others)):
        return None
    key = x.device, x.dtype, norm.weight.dtype, x.shape[-1], x.ndim
    return _proved("norms", key, probe, x, norm.weight, *others)


def _gates(activation: Activation, *tensors: Tensor) -> Any:
    def probe(way: Any, draw: _Draw) -> Sequence[Tensor]:
        g, u, dh = (2 * draw(tensors[0], 9)).split(3)
        return way.gate(g, u, activation), *way.gate_backward_(dh, g, u, activation)

    key = tensors[0].device, tensors[0].dtype, activation, tensors[0].shape[1]
    return _proved("gates", key, probe, *tensors)


_Draw = Callable[..., Tensor]
"""Of a tensor, rows, and perhaps columns: random numbers that such a tensor can hold."""


def _proved(
    what: str, key: tuple[Hashable, ...], probe: Callable[[Any, _Draw], Sequence[Tensor]], *tensors: Tensor | None
) -> Any:
    """Triton's kernels, if they take such tensors and the probe has the same results by them; else None."""
    for t in tensors:
        if t is not None and not ((t.is_cuda or (_INTERPRETED and t.is_cpu)) and t.dtype in _DTYPES and t.stride(-1) == 1):
            return None

    def problem() -> str | None:
        kernels = _kernels()
        ours, exact = probe(kernels, _drawing(torch.Tensor.clone)), probe(reference, _drawing(torch.Tensor.float))
        return next((wrong for pair in zip(ours, exact, strict=True) if (wrong := difference(*pair))), None)

    return _kernels() if proved(f"{what} by Triton", key, problem) else None


def _kernels() -> Any:
    from trimtab.engine.backends import triton_passes

    return triton_passes


def _drawing(held_as: Callable[[Tensor], Tensor]) -> _Draw:
    generator = torch.Generator().manual_seed(0)

    def draw(like: Tensor, rows: int, columns: int | None = None) -> Tensor:
        numbers = torch.randn(rows, like.shape[-1] if columns is None else columns, generator=generator)
        return held_as(numbers.to(like.device, like.dtype))

    return draw
