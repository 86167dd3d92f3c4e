"""The factor on the loss of a base model in float16, in which small gradients would vanish otherwise.

Gradients of activations are float16 there, and cannot be smaller than 6e-8. So the loss is multiplied by a power of two before the
backward pass, and the gradients, which are float32, are divided by it afterwards: both are exact (Micikevicius et al. 2017, "Mixed
Precision Training", arXiv:1710.03740, section 3.2). If gradients overflow, the factor is halved and the step computed again, so that no
example is left out; after many steps without, it is doubled.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

START = 2.0**16
MOST = 2.0**24
PATIENCE = 100
"""Steps without an overflow, after which the factor is doubled."""


@dataclass
class LossScale:
    """The factor, which is part of the state of training."""

    value: float = 1.0
    """1 on a base model in another dtype: there the loss is not scaled."""
    kept: int = 0
    """Steps since it was last changed."""

    @classmethod
    def of(cls, model: torch.nn.Module) -> "LossScale":
        """The first one for this base model."""
        return cls(START if any(p.dtype == torch.float16 for p in model.parameters()) else 1.0)

    def scaled(self, loss: Tensor) -> Tensor:
        return loss if self.value == 1.0 else loss * self.value

    def unscale_(self, gradients: Iterable[Tensor | None]) -> None:
        """Divide the gradients of a scaled loss by the factor."""
        held = [gradient for gradient in gradients if gradient is not None]
        if self.value != 1.0 and held:
            torch._foreach_mul_(held, 1 / self.value)

    def lower(self) -> bool:
        """Halve the factor after an overflow; False if it cannot be the reason."""
        if self.value == 1.0:
            return False
        self.value, self.kept = self.value / 2, 0
        return True

    def count(self) -> None:
        """Count a step that was taken; the next may have a larger factor."""
        self.kept += 1
        if self.value != 1.0 and self.kept == PATIENCE:
            self.value, self.kept = min(MOST, 2 * self.value), 0
