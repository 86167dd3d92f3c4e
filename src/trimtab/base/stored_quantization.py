"""Checkpoints that are stored quantized, known by their config.json before any weight is read: loaded as they are, dequantized, or refused.

bitsandbytes' are loaded as they are (see `quantized`). MXFP4 (GPT-OSS), block-wise FP8 and compressed-tensors are dequantized while they
are read, into the dtype of the base: what is computed is what their numbers stand for, in more memory. torchao's are, as soon as they
are read, and what its layers compute is compared. All others are refused by name.
"""

import importlib.util
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.base.loading import find_file, read_config, read_model, read_skeleton
from trimtab.base.quantized import Quantize
from trimtab.core.errors import RecipeError, UnsupportedModel

COMPRESSED = "compressed-tensors"
DEQUANTIZED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config", COMPRESSED: "CompressedTensorsConfig"}
"""How a checkpoint may be stored and is dequantized from -> Transformers' class that says so."""
TORCHAO = "torchao"
AS_ITS_LAYERS = 0.03
"""By how much, in proportion, torchao's own product may differ from that with the dequantized matrix: some round activations to 8 bits."""
_PROVED_FORMATS = {"pack-quantized", "int-quantized", "float-quantized", "naive-quantized"}
_PROVED_STRATEGIES = {"tensor", "channel", "group"}
"""Those of compressed-tensors of which every number was compared with what its bits stand for."""
BITSANDBYTES = "bitsandbytes"
_NAMES = {
    "gptq": "GPTQ", "awq": "AWQ", COMPRESSED: "compressed-tensors (llm-compressor)", "fbgemm_fp8": "FP8 by row (fbgemm)",
    "aqlm": "AQLM", "hqq": "HQQ", "torchao": "torchao", "quanto": "Quanto", "vptq": "VPTQ", "higgs": "HIGGS", "spqr": "SpQR",
    "bitnet": "BitNet", "nvfp4": "NVFP4", "mxfp8": "MXFP8", "auto-round": "AutoRound", "quark": "Quark", "eetq": "EETQ", "fp_quant": "FP-Quant",
}  # fmt: skip
"""What people call the other ways."""
_EMBEDDED = ("text_config", "llm_config")


def stored_quantization(place: Path | str, quantize: str = "none") -> str | None:
    """How a checkpoint is stored quantized: `bitsandbytes`, `mxfp4`, `fp8`, or None. Reads config.json alone.

    Args:
        quantize: How it is to be quantized while it is loaded.

    Raises:
        UnsupportedModel: It is stored in a way that Trimtab does not train on.
        RecipeError: It is quantized already, and is to be quantized.
    """
    settings = _settings(read_config(place))
    if settings is None:
        return None
    stored = str(settings.get("quant_method") or (BITSANDBYTES if _by_bitsandbytes(settings) else "an unnamed method"))
    if stored.startswith(BITSANDBYTES):
        return BITSANDBYTES
    if (reason := _why_not(stored, settings)) is not None:
        raise UnsupportedModel(
            f"model: {place} is stored quantized by {_NAMES.get(stored, stored)} (quantization_config in config.json), {reason}: "
            "nothing was loaded. Use the checkpoint that it was made from, in bfloat16; model.quantize: nf4 or int8 holds that in as "
            "little memory."
        )
    if quantize != "none":
        raise RecipeError(
            f"model.quantize: {quantize}, but {place} is stored in {stored}, and would be quantized a second time. Leave out model.quantize, "
            "and it is dequantized; or use a checkpoint in bfloat16."
        )
    return stored


def held_quantization(place: Path | str, quantize: Quantize) -> Quantize:
    """How a base is held: quantized while it is loaded, or as bitsandbytes has stored it. Raises as `stored_quantization` does."""
    if stored_quantization(place, quantize) != BITSANDBYTES:
        return quantize
    settings = _settings(read_config(place)) or {}
    return "nf4" if settings.get("load_in_4bit") or settings.get("quant_method") == "bitsandbytes_4bit" else "int8"


def _why_not(stored: str, settings: dict[str, Any]) -> str | None:
    """Why a checkpoint that is stored so is not dequantized, in words; None if it is."""
    if stored not in (*DEQUANTIZED, TORCHAO):
        return "which is made for generating, not for training"
    if stored in (COMPRESSED, TORCHAO) and importlib.util.find_spec(stored.replace("-", "_")) is None:
        return f"which the package of that name dequantizes (pip install {stored}), and it is not installed"
    return _why_not_compressed(settings) if stored == COMPRESSED else None


def _why_not_compressed(settings: dict[str, Any]) -> str | None:
    import transformers

    config: Any = getattr(transformers, DEQUANTIZED[COMPRESSED], None)
    if config is None or "dequantize" not in inspect.signature(config.__init__).parameters:
        return f"which Transformers {transformers.__version__} does not dequantize, as later versions do"
    schemes = [
        group.get("weights") or {} for group in (settings.get("config_groups") or {}).values() if isinstance(group, dict)
    ]
    wrong = [scheme.get("strategy") for scheme in schemes if scheme.get("strategy") not in _PROVED_STRATEGIES]
    if settings.get("format") not in _PROVED_FORMATS or wrong or not schemes:
        form = f"format {settings.get('format')}, scales by {wrong or 'nothing'}"
        return f"in a form ({form}) of which it is not proved that it can be dequantized"
    if any(scheme != schemes[0] for scheme in schemes) or settings.get("sparsity_config"):
        return "in several forms at once, of which it is not proved that they can be dequantized"
    return None


def read_stored(place: Path | str, quantize: str, **arguments: Any) -> Any:
    """A model as `read_model` reads it, dequantized if it is stored in one of `DEQUANTIZED`. Raises as that and `stored_quantization` do."""
    import transformers

    stored = stored_quantization(place, quantize)
    if stored in DEQUANTIZED:
        arguments["quantization_config"] = getattr(transformers, DEQUANTIZED[stored])(dequantize=True)
    with _without_warnings():
        model = read_model(place, use_safetensors=True, **arguments)
    if stored == "fp8":
        _refuse_uneven_blocks(place)
    if stored == TORCHAO:
        _dequantize_tensors(model, place)
    return model


@torch.no_grad()
def _dequantize_tensors(model: Any, place: Path | str) -> None:
    """Put plain tensors in the place of torchao's. Raises UnsupportedModel for one that its layer does not multiply with."""
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not type(parameter.data).__module__.startswith(TORCHAO):
                continue
            stored: Any = parameter.data
            dense = nn.Parameter(stored.dequantize().to(parameter.dtype), requires_grad=False)
            dense._is_hf_initialized = True  # type: ignore[attr-defined]
            x = torch.linspace(-1, 1, dense.shape[-1], dtype=dense.dtype, device=dense.device).cos()[None]
            own = module(x) if isinstance(module, nn.Linear) and name == "weight" else None
            setattr(module, name, dense)
            if own is None or float((own - module(x)).norm()) > AS_ITS_LAYERS * float(own.norm()):
                raise UnsupportedModel(
                    f"model: {place}: {path}.{name}, a {type(stored).__name__} of torchao, is not the matrix of a product. "
                    "Use the checkpoint that it was made from, in bfloat16."
                )
    model.hf_quantizer.remove_quantization_config(model)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Within the block, Transformers does not say that it dequantizes (to bfloat16, it says, whatever the dtype): `dequantization_note` does."""
    logger = logging.getLogger("transformers.quantizers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def dequantization_note(place: Path | str, quantize: str, dtype: torch.dtype) -> str | None:
    """What dequantizing a checkpoint costs, in words; None for one that is not dequantized. Raises as `stored_quantization` does."""
    stored = stored_quantization(place, quantize)
    if stored not in (*DEQUANTIZED, TORCHAO):
        return None
    size = sum(p.numel() for p in read_skeleton(place).parameters()) * dtype.itemsize / 1e9
    kind = str(dtype).removeprefix("torch.")
    return f"{place} is stored in {stored}, and is dequantized to {kind}, in which its weights take {size:,.1f} GB of memory"


def _refuse_uneven_blocks(place: Path | str) -> None:
    """Raise UnsupportedModel for an FP8 checkpoint with a matrix that is not whole blocks, of which Transformers misplaces the scales."""
    from safetensors import safe_open

    size: list[int] = (_settings(read_config(place)) or {}).get("weight_block_size") or []
    for file in _weight_files(place) if size else ():
        with safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
            for scales in sorted(name for name in names if name.endswith("_scale_inv")):
                if (name := scales.removesuffix("_scale_inv")) not in names:
                    continue
                shape = tensors.get_slice(name).get_shape()[-2:]
                if any(length % block for length, block in zip(shape, size, strict=True)):
                    raise UnsupportedModel(
                        f"model: {place}: {name}, {shape[0]} × {shape[1]}, is not whole blocks of {size[0]} × {size[1]}, "
                        "whose scales Transformers would place wrongly. Use the checkpoint in bfloat16."
                    )


def _weight_files(place: Path | str) -> list[Path]:
    first = find_file(place, "model.safetensors") or find_file(place, "model.safetensors.index.json")
    return sorted(first.parent.glob("*.safetensors")) if first is not None else []


def _settings(config: dict[str, Any]) -> dict[str, Any] | None:
    """What a configuration, or that of its text model, says about its quantization."""
    parts = [config, *(config[name] for name in _EMBEDDED if isinstance(config.get(name), dict))]
    return next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)


def _by_bitsandbytes(settings: dict[str, Any]) -> bool:
    return bool(settings.get("load_in_4bit") or settings.get("load_in_8bit"))
