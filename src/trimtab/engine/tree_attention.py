"""Attention over a tree of segments, rotary embedding included, as one differentiable operation."""

from typing import Any

import torch
from torch import Tensor

from trimtab.engine.backends import AttentionInputs, AttentionPlan, backend_for


def attend(inputs: AttentionInputs, plan: AttentionPlan) -> Tensor:
    """What the tokens get from those they attend to: T H·K."""
    return _TreeAttention.apply(plan, *inputs)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: AttentionPlan, *tensors: Any) -> Tensor:
        ctx.plan, ctx.backend = plan, backend_for(*tensors)
        out, saved = ctx.backend.attend(AttentionInputs(*tensors), plan, any(ctx.needs_input_grad))
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        dq, dk, dv, *others = ctx.backend.attend_backward(gradients[0], ctx.saved_tensors, ctx.plan)
        return None, dq, dk, dv, None, None, *others
