"""Adafactor: AdamW's average of the square as a row and a column; Transformers'."""

from typing import ClassVar

import torch
from torch import nn

from trimtab.train.optimizers import Trained, UpdateRule, grouped


class Adafactor(UpdateRule):
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235): of the squared gradient's average, a row and a column; no other average.

    For full fine-tuning, where AdamW's averages are most of the memory. It is Transformers', with steps of the learning rate rather than
    relative to the parameter, as in its Trainer: a factor that starts at zero would hardly move by relative ones.
    """

    lr_multiplier: ClassVar[float] = 1.0

    def build(self, trained: list[Trained], weight_decay: float) -> list[torch.optim.Optimizer]:
        from transformers.optimization import Adafactor as Library

        absolute = {"scale_parameter": False, "relative_step": False}
        return [Library(grouped(trained), lr=0.0, weight_decay=weight_decay, **absolute)]

    def state_bytes(self, parameter: nn.Parameter, is_matrix: bool) -> int:
        shape, scale = parameter.shape, 4
        if parameter.ndim < 2:
            return parameter.nbytes + scale
        return (parameter.numel() // shape[-1] + parameter.numel() // shape[-2]) * parameter.element_size() + scale
