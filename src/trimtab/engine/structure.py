"""What a decoder layer is made of, as far as `layers` needs to know to compute it by fused operations.

A layer is branches, one after the other, each of which adds something to the hidden states x:
x + scale · post(Σ mixers(pre(x))), where the norms `pre` and `post` may be missing. A mixer is attention, an MLP, or any other module.
`watching` finds this out. Modules are known by the names of the attributes that hold them, so that adapters may stand around them.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from trimtab.engine.backends import Activation, Heads

Rotary = Literal["none", "halves", "halves of one", "neighbours", "neighbours of halves"]
"""Which numbers of a head are rotated with each other, and how the model's cos and sin say the angles:

none: no rotation (NoPE); halves: number i with number R/2 + i, the angles said twice, as halves; halves of one: said once;
neighbours: number 2i with number 2i + 1, each angle said twice in turn; neighbours of halves: said as halves.
"""

Gating = Literal["none", "within q", "own"]
"""Whether what comes out is multiplied by the sigmoid of a gate: beside each head's queries (Qwen3-Next), or of its own linear layer."""


class NormPart(NamedTuple):
    """An RMSNorm: x / rms(x) · (offset + weight)."""

    name: str
    offset: float
    eps: float


class PositionScale(NamedTuple):
    """Queries at position p are multiplied by 1 + beta · ln(1 + ⌊p / original⌋) (Llama 4, Ministral 3)."""

    beta: float
    original: int

    def of(self, positions: Tensor, like: Tensor) -> Tensor:
        """T."""
        return (1 + self.beta * torch.log(1 + torch.floor(positions / self.original))).to(like.dtype)


class AttentionPart(NamedTuple):
    """Attention over q, k and v that are linear in its input."""

    inputs: tuple[str, ...]
    """The linear layers of q, k and v, and perhaps of the gate; of q and k alone, where v is k before its norm; or one of q, k and v."""
    output: str
    heads: Heads
    scale: float
    softcap: float | None
    """Of the scores."""
    window_from: Literal["nowhere", "module", "config"]
    """What holds the sliding window, unless the layer's mask says one."""
    norms: tuple[NormPart | str | None, ...]
    """Of q, k and v: of each head, or of all of them, as the size of its weight says; the name of one that is called."""
    rotary: Rotary
    position_scale: PositionScale | None
    gate: Gating
    sinks: str | None
    """The parameter that holds them."""

    def window(self, module: Any) -> int | None:
        """As it is now: for a moment, the check of a model makes windows small."""
        holder = {"nowhere": None, "module": module, "config": getattr(module, "config", None)}[self.window_from]
        return None if holder is None else holder.sliding_window


class MLPPart(NamedTuple):
    """output(act(gate) · up)."""

    inputs: tuple[str, ...]
    """The linear layers of gate and up; or one of both, side by side."""
    output: str
    width: int
    """Numbers of gate, and of up."""
    activation: Activation


class Mixer(NamedTuple):
    """A module whose output is added to the hidden states."""

    name: str
    part: AttentionPart | MLPPart | None
    """How it is computed by hand; None if the module is called."""
    x_name: str | None
    """The keyword by which the layer hands hidden states to it; None if by position."""
    handed: frozenset[str]
    """Keyword arguments of the layer that it hands on to the module."""
    dropped: frozenset[str] | None
    """Those that it does not hand on, where it hands on whatever else there may be."""
    constants: Mapping[str, Any]
    """What it hands on of its own."""
    per_token: bool
    """It computes each token by itself."""

    def call(self, module: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """What the module returns for x (1 T d), called as the layer calls it with these keyword arguments; 1 T d."""
        names = [n for n in kwargs if n in self.handed or (self.dropped is not None and n not in self.dropped)]
        handed = {**self.constants, **{name: kwargs[name] for name in names}}
        out = module(x, **handed) if self.x_name is None else module(**{self.x_name: x}, **handed)
        return out[0] if isinstance(out, tuple) else out


class Branch(NamedTuple):
    """x + scale · post(Σ mixers(pre(x)))."""

    pre: str | None
    mixers: tuple[Mixer, ...]
    post: str | None
    scale: float


class LayerStructure(NamedTuple):
    """A decoder layer."""

    branches: tuple[Branch, ...]
    norms: Mapping[str, NormPart]
    """Those of the branches' norms that are RMSNorms."""
    factor: str | None
    """The parameter or buffer of one number by which what comes out is multiplied (Gemma 4)."""
    returns: int
    """The layer returns a tuple with so many times None after the hidden states; -1 if it returns these alone."""
    drops: bool
    """In training, something in it is dropped at random."""
    parts: Mapping[str, NormPart | AttentionPart | MLPPart]
    """Without branches: the modules that are computed by hand where the layer's own code calls them."""

    @property
    def narrow_at(self) -> int:
        """The number of the branch after whose mixers no token has anything to do with another."""
        mixing = [n for n, branch in enumerate(self.branches) if not all(mixer.per_token for mixer in branch.mixers)]
        return mixing[-1] if mixing else 0

    def result(self, hidden: Tensor) -> Any:
        """What the layer returns, with these hidden states in it."""
        return hidden if self.returns < 0 else (hidden, *(None,) * self.returns)

    @property
    def by_hand(self) -> list[str]:
        """The names of the modules that are computed by hand."""
        mixers = [mixer.name for branch in self.branches for mixer in branch.mixers if mixer.part]
        return [*self.norms, *mixers, *self.parts]


def rotary_angles(style: Rotary, embeddings: tuple[Tensor, Tensor] | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin as AttentionInputs has them (T R), from a model's position embeddings (1 T R or 1 T R/2)."""
    if style == "none" or embeddings is None:
        return like.new_empty(len(like), 0), like.new_empty(len(like), 0)
    cos, sin = embeddings[0][0], embeddings[1][0]
    if style == "halves of one":
        return torch.cat([cos, cos], dim=1), torch.cat([sin, sin], dim=1)
    if style == "neighbours of halves":
        cos, sin = (t[:, : t.shape[1] // 2].repeat_interleave(2, dim=1) for t in (cos, sin))
    return cos.contiguous(), sin.contiguous()


def is_interleaved(style: Rotary) -> bool:
    return style.startswith("neighbours")
