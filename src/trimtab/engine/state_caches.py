"""What a layer that carries state finds in the place of Transformers' cache: by sequence as that cache keeps it, or for a whole pack."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.engine.layouts import LayerState, PackLayout, PrefillLayout


def stacked(states: list[LayerState]) -> LayerState:
    conv, recurrent = ({n: torch.cat([each[n] for each in kind]) for n in kind[0]} for kind in
                       ([each.conv for each in states], [each.recurrent for each in states]))  # fmt: skip
    return LayerState(conv, recurrent)


class OwnStates:
    """The states of one layer in the place of Transformers' cache, kept as that cache keeps them."""

    def __init__(self, state: LayerState) -> None:
        self.state = state

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.state.conv.get(state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.state.recurrent.get(state_idx)

    def update_conv_state(
        self, new: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        before = self.state.conv.get(state_idx)
        size = conv_kernel_size or (before if before is not None else new).shape[-1]
        full = new if before is None else torch.cat([before, new], dim=-1)
        full = F.pad(full, (max(0, size - full.shape[-1]), 0))
        self.state.conv[state_idx] = full[..., -size:].clone()  # single steps write over it
        return full

    def update_recurrent_state(self, new: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        self.state.recurrent[state_idx] = new
        return new

    def is_recording_past(self, layer_idx: int) -> bool:
        return False


class PackStates:
    """The same for a whole pack: no token has a state before it, and what stands at the ends of rows is kept in prefill."""

    def __init__(self, layout: PackLayout) -> None:
        self.layout = layout
        self.kept = layout if isinstance(layout, PrefillLayout) else None
        self.conv: dict[int, Tensor] = {}
        self.recurrent: dict[int, Tensor] = {}
        self.after: dict[int, Tensor] = {}
        """By segment: the recurrent state in which it ended, 1 …, from the last scan."""

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def update_conv_state(
        self, new: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        if self.kept is not None:
            size = conv_kernel_size or new.shape[-1]
            ends = [self.layout.row(leaf)[-size:] for leaf in self.kept.leaves]
            self.conv[state_idx] = torch.cat([F.pad(new[..., end.to(new.device)], (size - len(end), 0)) for end in ends])
        return new

    def update_recurrent_state(self, new: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        if self.kept is not None:
            self.recurrent[state_idx] = torch.cat([self.after[leaf] for leaf in self.kept.leaves])
        return new

    def is_recording_past(self, layer_idx: int) -> bool:
        return True
