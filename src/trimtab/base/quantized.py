"""Quantized bases: all matrices of a model but its embeddings and head are stored by bitsandbytes in 4 or 8 bits a weight.

A quantized base computes y = x Ŵᵀ, where Ŵ is dequantized for each pass in the dtype of its activations. So it computes what its
dequantized weights would, in less memory: gradients are exact, and tokens do not depend on each other.

nf4: 4-bit NormalFloat in blocks of 64 weights, whose scales are quantized in turn (QLoRA, Dettmers et al. 2023,
arXiv:2305.14314, section 3). int8: a row of a matrix in steps of 1/127 of its largest weight, as LLM.int8() stores it
(Dettmers et al. 2022, arXiv:2208.07339, section 2); its rounding of activations and its outlier columns,
which depend on every token of a batch, are left out.
"""

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.attributes import attributes_set
from trimtab.core.errors import RecipeError, UnsupportedModel

Quantize = Literal["none", "nf4", "int8"]

FOUR, EIGHT = "Linear4bit", "Linear8bitLt"
"""The classes of quantized layers in bitsandbytes."""


def load_arguments(quantize: Quantize, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of Transformers' `from_pretrained` to quantize a model while loading it. Raises RecipeError if it can't."""
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


def quantized_layers(model: nn.Module) -> Iterator[Any]:
    """The modules of bitsandbytes in a model."""
    return (module for module in model.modules() if type(module).__module__.partition(".")[0] == "bitsandbytes")


def quantization_of(model: nn.Module) -> str:
    """`none`, `nf4`, `fp4`, `int8`, or several of them joined by +."""
    kinds = {module.weight.quant_type if type(module).__name__ == FOUR else "int8" for module in quantized_layers(model)}
    return "+".join(sorted(kinds)) or "none"


def quantization_identity(model: nn.Module) -> dict[str, str]:
    """What decides a quantized model's outputs besides its configuration and weights."""
    layers = {f"{type(m).__name__} {getattr(m, 'compute_dtype', None)}" for m in quantized_layers(model)}
    return {"bitsandbytes": ", ".join(sorted(layers))} if layers else {}


def release(model: nn.Module) -> None:
    """Free the scales of quantized matrices, which are not among a model's parameters."""
    for module in quantized_layers(model):
        if type(module).__name__ == EIGHT:
            module.state.SCB = module.weight.SCB = None
        else:
            module.weight.quant_state = None


def refuse_unknown_quantization(model: Any) -> None:
    """Raise UnsupportedModel for a model that is not quantized in bitsandbytes' 4-bit or 8-bit layers."""
    layers = list(quantized_layers(model))
    name, advice = type(model).__name__, "Load it in float32 or bfloat16, or with quantize: nf4 or int8."
    if getattr(model, "hf_quantizer", None) is not None and not layers:
        raise UnsupportedModel(f"{name} is quantized, and not by bitsandbytes, the only supported way. {advice}")
    head = model.get_output_embeddings()
    for module in layers:
        if type(module).__name__ not in (FOUR, EIGHT) or module is head:
            part = "head" if module is head else type(module).__name__
            raise UnsupportedModel(
                f"{name} has a quantized {part}, and only quantized matrices of blocks are supported. {advice}"
            )
        if module.weight.dtype not in (torch.uint8, torch.int8):
            raise UnsupportedModel(f"{name} stores quantized weights as {module.weight.dtype}, not as integers. {advice}")


def make_exact(model: nn.Module) -> None:
    """Have every quantized layer compute exactly x Ŵᵀ on any device, without changing its weights."""
    for module in quantized_layers(model):
        if type(module).__name__ == EIGHT:
            module.forward = ExactForward(module)
            continue
        module.support_avx512bf16_for_cpu = False  # it would reorder the weights in place, and then pass no gradient
        if module.in_features % module.weight.quant_state.blocksize:
            module.forward = ExactForward(module)  # on CPUs with AVX-512 its own dequantizes these wrongly (0.50.2)
        if module.bias is not None and module.compute_dtype is not None:
            module.bias.data = module.bias.data.to(module.compute_dtype)  # as its first forward pass would


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within the block, quantized layers compute in this dtype, and are dequantized in it."""
    changes: list[tuple[Any, str, torch.dtype]] = []
    for module in quantized_layers(model):
        state = getattr(module.weight, "quant_state", None)
        changes += [(module, "compute_dtype", dtype)] if getattr(module, "compute_dtype", None) is not None else []
        changes += [(state, "dtype", dtype)] if state is not None else []
    with attributes_set(changes):
        yield


class StoredMatrix:
    """The matrix of a quantized layer, where it is multiplied without the layer's own code."""

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self._module, self.dtype = module, dtype

    def __len__(self) -> int:
        outputs: int = self._module.out_features
        return outputs

    def dense(self) -> Tensor:
        """Ŵ, (outputs, inputs): made for this call."""
        return _dequantized(self._module, self.dtype)


def stored_matrix(module: Any, dtype: torch.dtype) -> StoredMatrix | None:
    """None for modules that are not quantized, or compute in another dtype."""
    if type(module).__name__ not in (FOUR, EIGHT) or type(module).__module__.partition(".")[0] != "bitsandbytes":
        return None
    return StoredMatrix(module, dtype) if getattr(module, "compute_dtype", None) in (None, dtype) else None


class ExactForward:
    """The forward pass of a quantized layer, for as long as the base lives: passes by hand compute the same."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        module, dtype = self.module, getattr(self.module, "compute_dtype", None) or x.dtype
        y = _Dequantized.apply(x.to(dtype), module)
        return (y if module.bias is None else y + module.bias.to(y.dtype)).to(x.dtype)


def _dequantized(module: Any, dtype: torch.dtype) -> Tensor:
    """Ŵ, (outputs, inputs)."""
    if type(module).__name__ == EIGHT:
        largest = module.state.SCB if module.state.SCB is not None else module.weight.SCB
        return (module.weight.data * (largest / 127)[:, None]).to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(module.weight.quant_state)
    state.shape = torch.Size([1, state.shape.numel()])  # blocks of weights that share a scale continue from row to row
    return dequantize_4bit(module.weight.data, state).view(module.out_features, module.in_features).to(dtype)


class _Dequantized(torch.autograd.Function):
    """x Ŵᵀ. Ŵ is dequantized again in the backward pass: the graph would keep every layer's in full until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        ctx.module = module
        return F.linear(x, _dequantized(module, x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ _dequantized(ctx.module, gradients[0].dtype), None
