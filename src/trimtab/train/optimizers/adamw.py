"""AdamW: Adam with decoupled weight decay; torch's, in one kernel where it has that."""

from typing import ClassVar

import torch
from torch import nn

from trimtab.train.optimizers import Betas, Epsilon, Trained, UpdateRule, has_fused_adamw, torch_adamw


class AdamW(UpdateRule):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), by torch's fused kernel where it has one."""

    elementwise: ClassVar[bool] = True

    betas: Betas = (0.9, 0.999)
    """How much of their past the averages of the gradient and of its square keep at each step."""
    eps: Epsilon = 1e-8
    """Added to the root of the averaged square."""

    def notice(self, device: torch.device) -> str | None:
        if has_fused_adamw(device):
            return None
        return f"torch has no fused AdamW on {device}: each of its operations runs by itself, on all tensors"

    def build(self, trained: list[Trained], weight_decay: float) -> list[torch.optim.Optimizer]:
        return [torch_adamw(trained, weight_decay, self.betas, self.eps)]

    def state_bytes(self, parameter: nn.Parameter, is_matrix: bool) -> int:
        return 2 * parameter.nbytes
