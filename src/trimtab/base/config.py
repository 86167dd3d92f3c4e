"""The part of a recipe that names the base model, and the device and dtype that it resolves to on this machine."""

from typing import Annotated, Literal

import torch
from pydantic import Field

from trimtab.base.quantized import Quantize
from trimtab.core.config import Config
from trimtab.core.errors import RecipeError
from trimtab.core.processes import processes


class ModelConfig(Config):
    """The base model, and how it is held in memory. In a recipe, `model: NAME` is short for `model: {name: NAME}`."""

    name: Annotated[str, Field(min_length=1)]
    """A local folder, a GGUF file, a hub name (`org/model`, or `org/model@revision` for a branch, tag or commit), or `smollm2-135m-instruct`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Dtype of the frozen weights; auto is float32 on a CPU, bfloat16 on an accelerator that computes in it, and float16 on others.
    In float16 small gradients would vanish, so the loss is scaled; a model whose activations overflow in it is refused."""
    quantize: Quantize = "none"
    """Quantize the matrices of its blocks to 4 bits a weight (nf4, as QLoRA does) or 8 (int8): pip install 'trimtab[quantized]'."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$")] = "auto"
    """Where the model runs; auto is the first accelerator, if it computes in `dtype`, or the CPU. ROCm's devices are called cuda, too."""
    template: dict[str, bool | int | float | str | list[str]] = Field(default={})
    """Switches of its chat template, such as {enable_thinking: false}; `trimtab check` lists them."""
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    """A file with a chat template (Jinja, or a tokenizer_config.json that has one), instead of the model's own or where it has none; or, of
    a model with several templates, the name of one. Unless given, such a model's `tool_use` writes examples with tools, and its `default`
    the others. Saved with adapters and merged models."""


def resolve_device(config: ModelConfig) -> torch.device:
    """The device that a config means on this machine. Raises RecipeError if it cannot be used."""
    if config.device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        supported = accelerator is not None and _problem(accelerator, config.dtype) is None
        if accelerator is None or not supported:
            return torch.device("cpu")
        return torch.device(accelerator.type, processes.local_rank) if processes.started > 1 else accelerator
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise RecipeError(f"model.device: {config.device} is unknown to this PyTorch: {str(error).splitlines()[0]}") from None
    if problem := _problem(device, config.dtype):
        raise RecipeError(f"model.device: {config.device} cannot be used here: {problem}")
    return device


def _problem(device: torch.device, dtype: str) -> str | None:
    """Why the device does not compute in this dtype: it is not there, or some (MPS, many of XPU) have no float64."""
    try:
        float(torch.ones(1, device=device, dtype=getattr(torch, dtype, None)) + 1)  # making one is not enough
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return None


def resolve_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype of the frozen weights on this device."""
    if config.dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if _computes_bfloat16(device) else torch.float16
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype


def dtype_note(config: ModelConfig, device: torch.device) -> str | None:
    """Why the weights have a dtype that was not to be expected; None if they have not."""
    if config.dtype != "auto" or resolve_dtype(config, device) != torch.float16:
        return None
    return (
        f"model.dtype: float16, because {device.type} here does not compute in bfloat16 itself. The loss is scaled, so that small "
        "gradients do not vanish; float32 takes twice the memory, and more time."
    )


def _computes_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16, which others emulate, slowly, or lack."""
    if device.type == "cuda":  # sm80 and later; ROCm
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        one = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
        return (one @ one).dtype == torch.bfloat16  # MPS before macOS 14 has no such tensors
    except (RuntimeError, TypeError):
        return False


def fit_to_machine(config: ModelConfig) -> tuple[ModelConfig, str | None]:
    """The config of a base from another machine for this one, and a note if it differs.

    Where its device is missing, another one computes the same up to rounding. Dtype and quantization stay: an adapter has
    learned to correct their rounding.
    """
    try:
        resolve_device(config)
    except RecipeError:
        fitted = config.model_copy(update={"device": "auto"})
        device = resolve_device(fitted)
        return (
            fitted,
            f"it was trained on {config.device}, which this machine lacks, so it runs on {device}: results may differ by rounding.",
        )
    return config, None


def nearest_config(
    name: str,
    dtype: torch.dtype,
    device: str,
    quantize: Quantize,
    template: dict[str, object],
    chat_template: str | None = None,
) -> ModelConfig:
    """The config that describes a loaded base; `auto` for a device or dtype that a recipe has no name for."""
    raw = {"name": name, "quantize": quantize, "template": template, "chat_template": chat_template}
    names = {getattr(torch, known): known for known in ("float32", "bfloat16", "float16", "float64")}
    raw |= {"dtype": names.get(dtype, "auto"), "device": device}
    try:
        return ModelConfig.parse(raw)
    except RecipeError:
        return ModelConfig.parse({**raw, "device": "auto"})
