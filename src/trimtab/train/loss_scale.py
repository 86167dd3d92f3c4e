"""The factor on the loss of a base model in float16, in which small gradients would vanish otherwise.

Gradients of activations are float16 there, and none is smaller than 6e-8. So the loss is multiplied by a power of two before the backward
pass, and the gradients of the parameters, which are float32, are divided by it: both are exact (Micikevicius et al. 2017, "Mixed Precision
Training", arXiv:1710.03740, section 3.2). If a gradient overflows, the factor is halved and the step computed again: no example is left
out. After many steps without that, it is doubled.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FIRST, LEAST, MOST = 2.0**16, 1.0, 2.0**24
STEPS = 100
"""So many steps without an overflow double the factor."""


@dataclass
class LossScale:
    """The factor; it is part of the state of training."""

    value: float | None = None
    """None where the loss is not scaled: on a base model in another dtype."""
    steps: int = 0
    """Taken since it was last changed."""

    @classmethod
    def of(cls, model: nn.Module) -> "LossScale":
        """The first one for this base model."""
        return cls(FIRST if any(parameter.dtype == torch.float16 for parameter in model.parameters()) else None)

    def scaled(self, loss: Tensor) -> Tensor:
        return loss if self.value is None else loss * self.value

    def unscale_(self, gradients: Iterable[Tensor | None]) -> None:
        """Divide the gradients of a scaled loss by the factor."""
        if self.value is not None:
            torch._foreach_mul_([gradient for gradient in gradients if gradient is not None], 1 / self.value)

    def lower(self, loss: float, grad_norm: float) -> bool:
        """Halve the factor if it may be why a gradient of this norm overflows; whether it was."""
        if self.value is None or self.value <= LEAST or math.isfinite(grad_norm) or not math.isfinite(loss):
            return False
        self.value, self.steps = self.value / 2, 0
        return True

    def after_step(self) -> "LossScale":
        """The next step's, after one that was taken with this."""
        if self.value is None:
            return self
        doubled = self.steps + 1 >= STEPS
        return LossScale(min(MOST, 2 * self.value) if doubled else self.value, 0 if doubled else self.steps + 1)
