"""AdamW whose averages take 8 bits a number; bitsandbytes'."""

import importlib.util
from typing import ClassVar

import torch
from torch import nn

from trimtab.core.errors import RecipeError
from trimtab.train.optimizers import Betas, Epsilon, Trained, UpdateRule, grouped

BLOCK = 256
"""Numbers that share a scale."""
SMALLEST = 4096
"""Parameters with fewer numbers keep averages of 32 bits."""
PAGED = 100_000
"""Parameters with fewer numbers have no pages."""
DEVICES = ("cpu", "cuda", "xpu")


class AdamW8bit(UpdateRule):
    """AdamW whose two averages take 8 bits a number instead of 32 (Dettmers et al. 2022, arXiv:2110.02861), by bitsandbytes.

    For full fine-tuning, where they are most of the memory; an adapter's are small. Parameters of fewer than 4,096 numbers keep 32 bits.
    On a GPU, bitsandbytes waits for each tensor's update, so a step with many small tensors is slower than AdamW's.
    """

    constants: ClassVar[tuple[str, ...]] = ("qmap1", "qmap2")

    betas: Betas = (0.9, 0.999)
    """How much of their past the averages of the gradient and of its square keep at each step."""
    eps: Epsilon = 1e-8
    """Added to the root of the averaged square."""
    paged: bool = False
    """Whether the driver may move averages to the host's memory where the GPU's is short; CUDA only."""

    def check_available(self, device: torch.device) -> None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise RecipeError("train.optimizer: adamw_8bit needs bitsandbytes: pip install 'trimtab[quantized]', or use adamw.")
        if device.type not in DEVICES:
            raise RecipeError(f"train.optimizer: bitsandbytes has no 8-bit AdamW on {device.type}. Use adamw or adafactor.")
        if self.paged and device.type != "cuda":
            raise RecipeError(
                f"train.optimizer.paged: only CUDA has paged memory, and this is trained on {device.type}. Leave it out."
            )

    def notice(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "bitsandbytes waits for the device after the update of each tensor"

    def build(self, trained: list[Trained], weight_decay: float) -> list[torch.optim.Optimizer]:
        self.check_available(trained[0].parameter.device)
        from bitsandbytes.optim import AdamW8bit as Library

        settings = {"lr": 0.0, "betas": self.betas, "eps": self.eps, "weight_decay": weight_decay}
        return [Library(grouped(trained), **settings, min_8bit_size=SMALLEST, is_paged=self.paged)]

    def state_bytes(self, parameter: nn.Parameter, is_matrix: bool) -> int:
        count = parameter.numel()
        if count < SMALLEST:
            return 2 * 4 * count
        scales = 2 * 4 * -(-count // BLOCK)
        return scales if self.paged and count >= PAGED else 2 * count + scales
