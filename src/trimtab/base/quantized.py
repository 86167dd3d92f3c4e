"""Quantized bases: the matrices of a model, but for its embeddings and head, held by bitsandbytes in 4 or 8 bits a weight.

A quantized base computes with the numbers that its bits stand for: y = x Ŵᵀ, Ŵ being dequantized for each pass in the type of
its activations. So it is its dequantized self in less memory: gradients are exact, and tokens do not depend on each other.

nf4: 4-bit NormalFloat in blocks of 64 weights, whose scales are quantized in turn (QLoRA, Dettmers et al. 2023,
arXiv:2305.14314, section 3). int8: a row of a matrix in steps of 1/127 of its largest weight, as LLM.int8() stores it
(Dettmers et al. 2022, arXiv:2208.07339, section 2); its rounding of activations too, and its outlier columns, which any
token of a batch can add to, are left out.
"""

import copy
import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.errors import RecipeError, UnsupportedModel

Quantize = Literal["none", "nf4", "int8"]

FOUR, EIGHT = "Linear4bit", "Linear8bitLt"
"""What bitsandbytes calls its matrices."""


def loading(quantize: Quantize, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What Transformers' `from_pretrained` is told, to quantize a model as it loads it. Raises RecipeError if it can't."""
    if quantize == "none":
        return {}
    missing = [package for package in ("bitsandbytes", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise RecipeError(
            f"model.quantize: {quantize} needs {' and '.join(missing)}. Install them with: pip install 'trimtab[quantized]'"
        )
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quantize, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    return {"quantization_config": config, "device_map": {"": device}}


def matrices(model: nn.Module) -> Iterator[Any]:
    """The modules that bitsandbytes holds."""
    return (module for module in model.modules() if type(module).__module__.partition(".")[0] == "bitsandbytes")


def kind_of(model: nn.Module) -> str:
    """`none`, `nf4`, `fp4`, `int8`, or several of them."""
    kinds = {module.weight.quant_type if type(module).__name__ == FOUR else "int8" for module in matrices(model)}
    return "+".join(sorted(kinds)) or "none"


def identity(model: nn.Module) -> dict[str, str]:
    """What decides a model's outputs besides its configuration and weights, if it is quantized."""
    computed = {f"{type(m).__name__} {getattr(m, 'compute_dtype', None)}" for m in matrices(model)}
    return {"bitsandbytes": ", ".join(sorted(computed))} if computed else {}


def refuse_unknown(model: Any) -> None:
    """Raise UnsupportedModel for a model that is quantized in another way than bitsandbytes' 4-bit or 8-bit matrices."""
    found = list(matrices(model))
    name, advice = type(model).__name__, "Load it in float32 or bfloat16, or with quantize: nf4 or int8."
    if getattr(model, "hf_quantizer", None) is not None and not found:
        raise UnsupportedModel(f"{name} is quantized, and not by bitsandbytes, whose way alone Trimtab knows. {advice}")
    head = model.get_output_embeddings()
    for module in found:
        if type(module).__name__ not in (FOUR, EIGHT) or module is head:
            what = "head" if module is head else type(module).__name__
            raise UnsupportedModel(
                f"{name} has a quantized {what}, and Trimtab trains on quantized matrices of blocks alone. {advice}"
            )
        if module.weight.dtype not in (torch.uint8, torch.int8):
            raise UnsupportedModel(f"{name} stores quantized weights as {module.weight.dtype}, not as whole numbers. {advice}")


def settle(model: nn.Module) -> None:
    """Let every quantized matrix compute what this file's head says, on any device, and never change in doing so."""
    for module in matrices(model):
        if type(module).__name__ == EIGHT:
            module.forward = partial(_multiply, module)
            continue
        module.support_avx512bf16_for_cpu = False  # it would lay the weights out anew in place, and then pass no gradient on
        if module.in_features % module.weight.quant_state.blocksize:
            module.forward = partial(_multiply, module)  # on CPUs with AVX-512 its own dequantizes these wrongly (0.50.2)
        if module.bias is not None and module.compute_dtype is not None:
            module.bias.data = module.bias.data.to(module.compute_dtype)  # as its first forward pass would


def _multiply(module: Any, x: Tensor) -> Tensor:
    kind = getattr(module, "compute_dtype", None) or x.dtype
    y = _Dequantized.apply(x.to(kind), module)
    return (y if module.bias is None else y + module.bias.to(y.dtype)).to(x.dtype)


def _dequantized(module: Any, kind: torch.dtype) -> Tensor:
    """A matrix, (outputs, inputs)."""
    if type(module).__name__ == EIGHT:
        largest = module.state.SCB if module.state.SCB is not None else module.weight.SCB
        return (module.weight.data * (largest / 127)[:, None]).to(kind)
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(module.weight.quant_state)
    state.shape = torch.Size([1, state.shape.numel()])  # blocks of weights that share a scale go on from row to row
    return dequantize_4bit(module.weight.data, state).view(module.out_features, module.in_features).to(kind)


class _Dequantized(torch.autograd.Function):
    """x Ŵᵀ. Ŵ is made again in the backward pass: the graph would keep every layer's in full until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        ctx.module = module
        return F.linear(x, _dequantized(module, x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ _dequantized(ctx.module, gradients[0].dtype), None
