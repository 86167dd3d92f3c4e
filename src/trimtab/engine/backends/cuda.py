"""CUDA devices (and ROCm's, which torch calls by the same name), in float32, bfloat16 and float16.

What is not proven here by a probe at first use, torch computes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.engine.backends import AttentionInputs, AttentionPlan
from trimtab.engine.backends import torch as reference
from trimtab.engine.backends.passes import (  # noqa: F401  (a back end's functions)
    gate,
    gate_backward_,
    rms_norm,
    rms_norm_backward,
    rotate,
    softmax_tile_,
    summed_by_users,
)
from trimtab.engine.backends.torch import recurrence, recurrence_backward, supports_recurrence  # noqa: F401
from trimtab.engine.backends.ways import way_of

# Products of 16 bits are summed in float32: partial sums would be rounded to 16 bits otherwise, where cuBLAS splits them.
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def supports(*tensors: Tensor | None) -> bool:
    dtypes = [t.dtype for t in tensors if t is not None]  # of sums, norms and masters float32, beside any
    return dtypes[0] in _DTYPES and all(dtype in (dtypes[0], torch.float32) for dtype in dtypes)


def supports_layers(hidden: Tensor) -> bool:
    return reference.supports_layers(hidden)


def supports_softcap(hidden: Tensor) -> bool:
    return True


def splits_rows(hidden: Tensor) -> bool:
    return True


def attend(inputs: AttentionInputs, plan: AttentionPlan, backward: bool) -> tuple[Tensor, Sequence[Tensor | None]]:
    return way_of(inputs.q, plan, inputs.sinks is not None).attend(inputs, plan, backward)


def attend_backward(dout: Tensor, saved: Sequence[Tensor | None], plan: AttentionPlan) -> Sequence[Tensor | None]:
    q, sinks = saved[0], saved[5]
    assert q is not None
    return way_of(q, plan, sinks is not None).attend_backward(dout, saved, plan)
