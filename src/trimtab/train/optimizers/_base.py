"""What an optimizer of a recipe is: hyperparameters, and the optimizer of a library that they make."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import BeforeValidator, Field
from torch import nn

from trimtab.core.config import Choice, as_tuple


def _two(raw: Any) -> Any:
    numbers = as_tuple(raw)
    if isinstance(numbers, tuple) and len(numbers) != 2:
        raise ValueError("expected two numbers, such as [0.9, 0.999].")
    return numbers


_Decay = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[_Decay, _Decay], BeforeValidator(_two)]
"""How much of their past the averages of the gradient and of its square keep at each step."""
Epsilon = Annotated[float, Field(gt=0)]


class Trained(NamedTuple):
    """A parameter as its optimizer sees it."""

    parameter: nn.Parameter
    lr_multiplier: float
    """The method's factor on the learning rate."""
    is_matrix: bool
    """It has two dimensions, and belongs to a matrix of the model's blocks: no embedding, no head, no vector."""


def grouped(trained: Iterable[Trained]) -> list[dict[str, Any]]:
    """torch's parameter groups, one for each factor on the learning rate, which the group says."""
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, multiplier, _ in trained:
        groups.setdefault(multiplier, []).append(parameter)
    return [{"params": group, "lr_multiplier": multiplier} for multiplier, group in groups.items()]


def torch_adamw(trained: list[Trained], weight_decay: float, betas: Betas, eps: float) -> torch.optim.Optimizer:
    """torch's AdamW, in one kernel if the device has that."""
    fused = has_fused_adamw(trained[0].parameter.device)
    return torch.optim.AdamW(
        grouped(trained), lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused, foreach=not fused
    )


def has_fused_adamw(device: torch.device) -> bool:
    """Whether torch has one kernel for AdamW's step on the device; else it takes one for each operation, of all tensors at once."""
    try:
        torch.optim.AdamW([torch.zeros(1, device=device, requires_grad=True)], fused=True)
    except RuntimeError:
        return False
    return True


class UpdateRule(Choice):
    """An optimizer by name. One concrete subclass per file in this folder; a library's optimizer computes the update.

    What a library's optimizer holds for each parameter is saved under the library's names, and a step count: see `Optimizer`.
    """

    family: ClassVar[str] = "trimtab.train.optimizers"
    default: ClassVar[str] = "adamw"
    elementwise: ClassVar[bool] = False
    """Each number of a parameter is updated by itself, so that processes can divide a parameter anywhere."""
    constants: ClassVar[tuple[str, ...]] = ()
    """What the library keeps with a parameter's state and never changes: it is not saved."""
    lr_multiplier: ClassVar[float] = 1.0
    """The best learning rate, as a multiple of AdamW's; measured: docs/decisions/049."""

    def check_available(self, device: torch.device) -> None:
        """Raise RecipeError if it cannot be used here, before anything is loaded."""

    def check_suits(self, trained: list[Trained]) -> None:
        """Raise RecipeError if it is not for these parameters."""

    def notice(self, device: torch.device) -> str | None:
        """What to say of it on this device."""
        return None

    @abstractmethod
    def build(self, trained: list[Trained], weight_decay: float) -> list[torch.optim.Optimizer]:
        """Optimizers that update each parameter once; `Optimizer` sets their groups' learning rates."""

    @abstractmethod
    def state_bytes(self, parameter: nn.Parameter, is_matrix: bool) -> int:
        """What it holds for the parameter on the device, after a step."""
