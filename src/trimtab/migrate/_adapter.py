"""Which adapter is trained, on which modules, and what the base model is quantized to."""

from typing import Any

from trimtab.migrate._settings import NOTHING, Settings

LORA = (
    "lora_rank", "lora_r", "r", "lora_alpha", "lora_dropout", "lora_target", "lora_target_modules", "target_modules",
    "lora_target_linear", "use_dora", "peft_use_dora", "use_rslora", "peft_use_rslora", "pissa_init", "pissa_iter", "pissa_convert",
    "init_lora_weights", "peft_init_lora_weights", "loraplus_lr_ratio", "layers_to_transform", "peft_layers_to_transform",
    "rank_pattern", "lora_rank_pattern", "alpha_pattern", "lora_alpha_pattern",
)  # fmt: skip
"""Settings of LoRA, which have no effect where no adapter is trained."""


def lora(settings: Settings, alpha: float) -> None:
    """LoRA, and what PEFT has in its configuration.

    Args:
        alpha: The tool's default for it, as a multiple of the rank.
    """
    rank, scale = settings.first("lora_rank", "lora_r", "r"), settings.first("lora_alpha")
    if rank:
        settings.put(rank, int(settings.get(rank)))
    if scale:
        settings.put(scale, float(settings.get(scale)))
    elif rank:
        settings.put("lora_alpha", alpha * int(settings.get(rank)))
    _targets(settings)
    _variant(settings)
    layers = settings.first("layers_to_transform", "peft_layers_to_transform")
    if layers:
        value = settings.get(layers)
        settings.put(layers, [value] if isinstance(value, int) else value)


def _targets(settings: Settings) -> None:
    name = settings.first("lora_target", "lora_target_modules", "target_modules")
    whole = settings.on("lora_target_linear")
    if name is None or whole:
        if whole:
            settings.put("lora_target_linear", "all-linear")
            if name:
                settings.settle(name, "derived", "lora_target_linear names all linear layers, and these are among them")
        else:
            settings.put(
                name or "target_modules", ["q_proj", "v_proj"], "PEFT's choice for Llama and its like, as none is given"
            )
        return
    value = settings.get(name)
    if isinstance(value, str):
        named = [part.strip() for part in value.split(",")]
        value = "all-linear" if named[0] in ("all", "all-linear") else named if all(n.isidentifier() for n in named) else value
    settings.put(
        name,
        value,
        "a regular expression: of PEFT's, the whole path must match" if isinstance(value, str) and "*" in value else "",
    )


def _variant(settings: Settings) -> None:
    if settings.on("use_dora", "peft_use_dora"):
        name = settings.first("use_dora", "peft_use_dora") or ""
        settings.write(name, "method.name", "dora")
    init = settings.first("init_lora_weights", "peft_init_lora_weights")
    value = settings.get(init) if init else True
    if settings.on("pissa_init"):
        settings.put("pissa_init", "pissa")
    elif init and (value == "eva" or str(value).startswith("pissa")):
        settings.put(init, str(value)[: 3 if value == "eva" else 5])
    elif init and value == "gaussian" and not settings.on("use_dora", "peft_use_dora"):
        settings.put(init, "gaussian")
    elif init and value not in (True, "true", "default"):
        settings.settle(init, "missing", f"{value} is not there: A is random and B is zero, as by default")
    elif init:
        settings.settle(init, "unset")
    ratio = settings.get("loraplus_lr_ratio")
    if ratio:
        settings.put("loraplus_lr_ratio", float(ratio))


def full(settings: Settings, name: str, said: str = "") -> None:
    """All weights are trained; settings of adapters have no effect, as with the tool itself."""
    settings.write(name, "method.name", "full", said)
    for other in LORA:
        if settings.given.get(other) not in NOTHING:
            settings.settle(other, "unset", "no adapter is trained")


def quantized(settings: Settings) -> None:
    """QLoRA: the base model in 4 or 8 bits."""
    bits = settings.get("quantization_bit")
    four, eight = settings.on("load_in_4bit") or str(bits) == "4", settings.on("load_in_8bit") or str(bits) == "8"
    name = "quantization_bit" if bits else "load_in_4bit" if four else "load_in_8bit"
    if bits and not four and not eight:
        settings.refuse("quantization_bit", "4 bits (nf4) and 8 (int8) are there")
    method = settings.given.get("quantization_method")
    if bits and method not in (None, "bnb", "bitsandbytes"):
        settings.refuse("quantization_method", "bnb's nf4 and int8 are there")
    if bits:
        settings.settle("quantization_method", "derived", "bitsandbytes quantizes")
    kind = settings.first("bnb_4bit_quant_type", "quantization_type")
    if four and kind and settings.get(kind) != "nf4":
        settings.settle(kind, "missing", f"{settings.get(kind)} is not there: nf4 is used")
    elif kind:
        settings.settle(kind, "derived" if four else "unset")
    if four or eight:
        settings.put(name, "nf4" if four else "int8")
        if four and eight:
            settings.settle("load_in_8bit", "unset", "load_in_4bit decides")


def length(settings: Settings, name: str, longer: str, said: str) -> int | None:
    """The most tokens of an example, and what the tool does with a longer one."""
    value: Any = settings.get(name)
    if value:
        settings.put(name, int(value))
        settings.recipe["data.overlong"], settings.comments["data.overlong"] = longer, said
    return int(value) if value else None
