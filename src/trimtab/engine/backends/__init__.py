"""What the engine computes on a kind of device, behind one interface: `<device>.py` is what a device means.

A back end is a module with the functions of `Backend`. `torch` is the reference, and computes whatever a device's own back
end does not support. Shapes: T tokens, n numbers each, H = G · R query heads in G groups, K head size, P virtual tokens.
"""

import importlib
import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Literal, NamedTuple, Protocol, cast

from torch import Tensor  # and not `import torch`: in this package, that name is a back end

from trimtab.data.prefix_tree import Segment

Activation = Literal["silu", "gelu_tanh"]


class Norm(NamedTuple):
    """An RMSNorm: x / rms(x) · (offset + weight)."""

    weight: Tensor
    """n."""
    offset: float
    eps: float


class Heads(NamedTuple):
    """How the columns of queries, keys and values divide into heads."""

    groups: int
    """G, key-value heads."""
    per_group: int
    """R, query heads that share one."""
    size: int
    """K."""


class AttentionPlan(NamedTuple):
    """Which keys each token of a pack attends to, and how."""

    segments: tuple[Segment, ...]
    """A token attends to the virtual tokens, its segment's ancestors, and its segment up to itself."""
    heads: Heads
    scale: float
    """Of the scores."""
    window: int | None = None
    """A token attends to at most this many tokens, itself included."""
    virtual: int = 0
    """P, virtual tokens before every segment."""
    chunk: int | None = None
    """A row, virtual tokens included, is cut into chunks of this many tokens, and a token attends to its own alone."""
    interleaved: bool = False
    """Of the numbers that are rotated, number 2i is paired with its neighbour, and not number i with number R/2 + i."""
    softcap: float | None = None
    """Scores s become softcap · tanh(s / softcap), where a back end `supports_softcap`."""


class AttentionInputs(NamedTuple):
    """The tensors of `attend`."""

    q: Tensor
    """T H·K."""
    k: Tensor
    """T G·K."""
    v: Tensor
    """T G·K."""
    cos: Tensor
    """T R, of the angles by which the first R numbers of a head of q and k are rotated (RoFormer, arXiv:2104.09864)."""
    sin: Tensor
    virtual_k: Tensor | None = None
    """G P K, of the virtual tokens."""
    virtual_v: Tensor | None = None
    sinks: Tensor | None = None
    """H logits, of which each head's takes part in its softmaxes, without a value (StreamingLLM, arXiv:2309.17453)."""


class Recurrence(NamedTuple):
    """The tensors of a gated linear recurrence: S ← diag(exp g) S; w = β (v − Sᵀk), or v; S ← S + k wᵀ; out = Sᵀq."""

    q: Tensor
    """T G K: of the heads of a group, as all of k."""
    k: Tensor
    v: Tensor
    """T H V."""
    g: Tensor
    """T H, or T H K."""
    beta: Tensor | None
    """T H; None without the delta rule."""


class Backend(Protocol):
    """The functions that a back end's module has. Those that end in `_` write over their arguments."""

    def supports(self, *tensors: Tensor | None) -> bool:
        """Whether the functions below take these tensors, of whatever kind they are."""

    def supports_layers(self, hidden: Tensor) -> bool:
        """Whether decoder layers of such hidden states can be computed by these functions."""

    def supports_softcap(self, hidden: Tensor) -> bool:
        """Whether `attend` takes plans with a soft-cap, in layers of such hidden states."""

    def rms_norm(self, x: Tensor, norm: Norm, scratch: bool = False) -> tuple[Tensor, Tensor]:
        """norm(x), T n, and 1 / rms(x), T; on accelerators also of each head by itself: T heads n, and T heads.

        Args:
            scratch: The first is needed only until this thread asks for its next scratch result, which may overwrite it.
        """

    def rms_norm_backward(self, dy: Tensor, x: Tensor, norm: Norm, rstd: Tensor, residual: Tensor | None = None) -> Tensor:
        """The gradient of `rms_norm` with respect to x, plus that of the residual connection around it: T n."""

    def gate(self, g: Tensor, u: Tensor, activation: Activation, scratch: bool = False) -> Tensor:
        """act(g) · u: T n. For `scratch` see `rms_norm`."""

    def gate_backward_(self, dh: Tensor, g: Tensor, u: Tensor, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
        """dg and du, which are columns of one tensor, and act(g) · u once more, perhaps over `dh`."""

    def splits_rows(self, hidden: Tensor) -> bool:
        """Whether the head best forms logits of some hidden states over the whole vocabulary at a time; else it takes all of
        them over a part of the vocabulary, that stays in a cache."""

    def softmax_tile_(self, logits: Tensor, top: Tensor, total: Tensor) -> Tensor:
        """Add one tile of logits (T n) to a running softmax: they become exp(logits − top), summed before they are rounded.

        Args:
            top: T, at least float32: the largest logit so far.
            total: T, at least float32: the sum so far of exp(logits − top).

        Returns:
            T, by which sums over earlier tiles have to be multiplied: exp(top before − top now).
        """

    def attend(self, inputs: AttentionInputs, plan: AttentionPlan, backward: bool) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Attention with rotary embedding: T H·K, and what its backward pass needs, if there is to be one."""

    def attend_backward(self, dout: Tensor, saved: Sequence[Tensor | None], plan: AttentionPlan) -> Sequence[Tensor | None]:
        """The gradients of q, k, v, virtual_k, virtual_v and sinks, from what `attend` gave. None for what has no gradient."""

    def supports_recurrence(self, inputs: Recurrence) -> bool:
        """Whether it has the next two functions, for such tensors."""

    def recurrence(
        self, inputs: Recurrence, segments: tuple[Segment, ...], backward: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """out, T H V; the states in which segments end, each H K V; and what the backward pass needs, if there is to be one."""

    def recurrence_backward(
        self, dout: Tensor, inputs: Recurrence, saved: Tensor | None, segments: tuple[Segment, ...]
    ) -> Sequence[Tensor | None]:
        """The gradients of q, k, v, g and beta."""


def backend_for(first: Tensor, *others: Tensor | None) -> Backend:
    """The back end for these tensors: their device's where it supports them, else torch, as `TRIMTAB_KERNELS=torch` asks for all."""
    backend = _load(first.device.type)
    return backend if backend.supports(first, *others) else _load("torch")


@cache
def _load(device_type: str) -> Backend:
    own = f"{__name__}.{device_type}"
    known = os.environ.get("TRIMTAB_KERNELS") != "torch" and find_spec(own) is not None
    return cast(Backend, importlib.import_module(own if known else f"{__name__}.torch"))
