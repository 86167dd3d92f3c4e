"""Muon for matrices, and AdamW for the rest; torch's."""

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from trimtab.core.errors import RecipeError
from trimtab.train.optimizers import Betas, Epsilon, Trained, UpdateRule, grouped, torch_adamw


class Muon(UpdateRule):
    """Muon: averages the gradient of a matrix, and makes all its singular values about equal (Jordan et al. 2024).

    For matrices of the model's blocks: LoRA's factors and its kin's, and the weights of full fine-tuning; embeddings, the head and vectors
    are AdamW's. Updates are scaled by the size of the matrix (Liu et al. 2025, arXiv:2502.16982), so rates are near AdamW's. Where it was
    measured, it was not better than AdamW (docs/decisions/049). It needs torch 2.9.
    """

    lr_multiplier: ClassVar[float] = 2.0

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """How much of its past the average of a matrix's gradient keeps at each step."""
    betas: Betas = (0.9, 0.999)
    """AdamW's, for the rest."""
    eps: Epsilon = 1e-8
    """AdamW's, for the rest."""

    def check_available(self, device: torch.device) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise RecipeError(
                f"train.optimizer: muon needs torch 2.9 or later, and this is {torch.__version__}. Upgrade, or use adamw."
            )

    def check_suits(self, trained: list[Trained]) -> None:
        if not any(one.is_matrix for one in trained):
            raise RecipeError(
                "train.optimizer: muon is for matrices of the model's blocks, and this method trains none. Use adamw."
            )

    def build(self, trained: list[Trained], weight_decay: float) -> list[torch.optim.Optimizer]:
        self.check_available(trained[0].parameter.device)
        matrices, rest = [one for one in trained if one.is_matrix], [one for one in trained if not one.is_matrix]
        scaled: dict[str, Any] = {"momentum": self.momentum, "adjust_lr_fn": "match_rms_adamw"}
        made: list[torch.optim.Optimizer] = [torch.optim.Muon(grouped(matrices), lr=0.0, weight_decay=weight_decay, **scaled)]
        if rest:
            made.append(torch_adamw(rest, weight_decay, self.betas, self.eps))
        return made

    def state_bytes(self, parameter: nn.Parameter, is_matrix: bool) -> int:
        return parameter.nbytes * (1 if is_matrix else 2)
