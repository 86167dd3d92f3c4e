"""PyTorch's own operations: the reference, for every device and number type."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.attention import at_least_float32
from trimtab.data.prefix_tree import Segment
from trimtab.engine.backends import Activation, AttentionPlan, Heads, Norm, Recurrence
from trimtab.engine.backends.segments import attend, attend_backward, rotated  # noqa: F401  (a back end's functions)


def supports(*tensors: Tensor | None) -> bool:
    return True


def supports_layers(hidden: Tensor) -> bool:
    return hidden.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def supports_softcap(hidden: Tensor) -> bool:
    return not hidden.is_cpu  # where models' own code, which recomputes nothing, is faster


def rms_norm(x: Tensor, norm: Norm, scratch: bool = False) -> tuple[Tensor, Tensor]:
    wide, weight = at_least_float32(x), norm.offset + at_least_float32(norm.weight)
    rstd = torch.rsqrt(wide.square().mean(-1) + norm.eps)
    return (wide * rstd[..., None] * weight).to(x.dtype), rstd


def rms_norm_backward(dy: Tensor, x: Tensor, norm: Norm, rstd: Tensor, residual: Tensor | None = None) -> Tensor:
    g, xhat = at_least_float32(dy) * (norm.offset + at_least_float32(norm.weight)), at_least_float32(x) * rstd[..., None]
    dx = rstd[..., None] * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    return (dx if residual is None else dx + residual).to(x.dtype)


def gate(g: Tensor, u: Tensor, activation: Activation, scratch: bool = False) -> Tensor:
    return (_activate(at_least_float32(g), activation) * u).to(g.dtype)


def gate_backward_(dh: Tensor, g: Tensor, u: Tensor, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    dg, du = g.new_empty(len(g), 2 * g.shape[1]).chunk(2, dim=1)
    wide = at_least_float32(dh)
    with torch.enable_grad():
        leaf = at_least_float32(g.detach()).requires_grad_()
        activated = _activate(leaf, activation)
    dg.copy_(torch.autograd.grad(activated, leaf, wide * u)[0])
    du.copy_(wide * activated.detach())
    return dg, du, (activated.detach() * u).to(g.dtype)


def _activate(g: Tensor, activation: Activation) -> Tensor:
    return F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh")


def splits_rows(hidden: Tensor) -> bool:
    return not hidden.is_cpu


def softmax_tile_(logits: Tensor, top: Tensor, total: Tensor) -> Tensor:
    new_top = torch.maximum(top, logits.amax(dim=1))
    rescale = (top - new_top).exp_()
    exact = logits if logits.dtype == top.dtype else logits.to(top.dtype)
    exact.sub_(new_top[:, None]).exp_()
    total.mul_(rescale).add_(exact.sum(dim=1))
    if exact is not logits:
        logits.copy_(exact)
    top.copy_(new_top)
    return rescale


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, size: int, interleaved: bool, sign: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """x, T heads·size, with the first R numbers of each head rotated by its token's angles (cos and sin T R), or back (−1)."""
    turned = rotated(x, AttentionPlan((), Heads(1, 1, size), 1.0, interleaved=interleaved), cos, sin * sign)
    return turned if out is None else out.copy_(turned)


def summed_by_users(source: Tensor, starts: Tensor, users: Tensor) -> Tensor:
    """For each of T keys, the sum of the rows of source (T' n) that `users[starts[key]:starts[key + 1]]` names: T n, in float32 inside."""
    return F.embedding_bag(users, source, starts, mode="sum", include_last_offset=True)


def supports_recurrence(inputs: Recurrence) -> bool:
    """The next two are the reference: Transformers' own functions, which compute in chunks, are faster."""
    return False


def recurrence(inputs: Recurrence, segments: tuple[Segment, ...], backward: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    q, k, v, g, beta = inputs
    q, k = (t.repeat_interleave(v.shape[1] // t.shape[1], dim=1) for t in (q, k))
    outs: list[Tensor] = []
    ends: list[Tensor] = []
    for start, end, parent in segments:
        state = v.new_zeros(v.shape[1], k.shape[2], v.shape[2]) if parent < 0 else ends[parent]
        for t in range(start, end):
            state = state * g[t].exp().view(v.shape[1], -1, 1)
            written = v[t] if beta is None else beta[t, :, None] * (v[t] - (state * k[t, :, :, None]).sum(1))
            state = state + k[t, :, :, None] * written[:, None]
            outs.append((state * q[t, :, :, None]).sum(1))
        ends.append(state)
    return torch.stack(outs), torch.stack(ends), None


def recurrence_backward(
    dout: Tensor, inputs: Recurrence, saved: Tensor | None, segments: tuple[Segment, ...]
) -> Sequence[Tensor | None]:
    with torch.enable_grad():
        leaves = Recurrence(*(None if t is None else t.detach().requires_grad_() for t in inputs))  # type: ignore[arg-type]
        out = recurrence(leaves, segments, True)[0]
    gradients = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], dout))
    return [None if t is None else next(gradients) for t in leaves]
