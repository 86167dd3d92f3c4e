"""The part of a recipe that says which base, and how it is held in memory; and which device and number type that is here."""

from typing import Annotated, Literal

import torch
from pydantic import Field

from trimtab.base.quantized import Quantize
from trimtab.core.config import Config
from trimtab.core.errors import RecipeError


class ModelConfig(Config):
    """Which base, and how it is held in memory. In a recipe, `model: NAME` is short for `model: {name: NAME}`."""

    name: Annotated[str, Field(min_length=1)]
    """A local folder, a GGUF file, a hub name, or `smollm2-135m-instruct`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Number type of the frozen weights; auto is float32 on a CPU and bfloat16 on an accelerator. float16 is for using what was
    trained so elsewhere: no recipe trains in it, as small gradients vanish in it silently."""
    quantize: Quantize = "none"
    """Hold the matrices of its blocks in 4 bits a weight (nf4, as QLoRA does) or in 8 (int8): pip install 'trimtab[quantized]'."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """Where the model runs; auto is the first accelerator, or the CPU."""
    template: dict[str, bool | int | float | str | list[str]] = Field(default={})
    """Switches of its chat template, such as {enable_thinking: false}; `trimtab check` lists those that it has."""


def device_of(config: ModelConfig) -> torch.device:
    """Where a base is held that is asked for so. Raises RecipeError if that can't be here."""
    if config.device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        knows = accelerator is not None and not (accelerator.type == "mps" and config.dtype == "float64")
        return accelerator if accelerator is not None and knows else torch.device("cpu")
    try:
        torch.empty(0, device=config.device, dtype=getattr(torch, config.dtype, None))
    except (RuntimeError, AssertionError, TypeError) as error:
        raise RecipeError(f"model.device: {config.device} cannot be used here: {str(error).splitlines()[0]}") from None
    return torch.device(config.device)


def dtype_of(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The number type of its frozen weights on this device."""
    chosen = config.dtype if config.dtype != "auto" else "float32" if device.type == "cpu" else "bfloat16"
    kind: torch.dtype = getattr(torch, chosen)
    return kind


def here(config: ModelConfig) -> tuple[ModelConfig, str | None]:
    """How a base is held here that was held so elsewhere, and what to say of that.

    Where its device is missing, another one computes the same but for rounding. Its number type and its quantization are part of
    what an adapter has learned on it, so they stay.
    """
    try:
        device_of(config)
    except RecipeError:
        other = config.model_copy(update={"device": "auto"})
        said = f"it was trained on {config.device}, which is not here, so it runs on {device_of(other)}: results may differ by rounding."
        return other, said
    return config, None


def as_held(name: str, dtype: torch.dtype, device: str, quantize: Quantize, template: dict[str, object]) -> ModelConfig:
    """The configuration of a base that is held so; `auto` for a device or number type that a recipe has no name for."""
    raw = {"name": name, "quantize": quantize, "template": template}
    kinds = {getattr(torch, kind): kind for kind in ("float32", "bfloat16", "float16", "float64")}
    raw |= {"dtype": kinds.get(dtype, "auto"), "device": device}
    try:
        return ModelConfig.parse(raw)
    except RecipeError:
        return ModelConfig.parse({**raw, "device": "auto"})
