"""The arguments of a script with TRL and PEFT, as JSON: `{"LoraConfig": {…}, "SFTConfig": {…}}` or flat; and TRL's own YAML files.

Of a script with Unsloth: `{"FastLanguageModel": {…}, "get_peft_model": {…}, "SFTConfig": {…}}`, the arguments of its two functions.
"""

from typing import Any

from trimtab.migrate._adapter import full, length, lora, quantized
from trimtab.migrate._preference import dpo_loss, objective
from trimtab.migrate._settings import Settings
from trimtab.migrate._sources import Source, held_out, no_sources, write_sources
from trimtab.migrate._training import training

TITLE = "TRL"
DEFAULTS: dict[str, Any] = {"dataset_test_split": None, "bf16": None}
"""What differs from the classes' own: a setting that only a script reads is none."""
UNSLOTH = ("FastLanguageModel", "get_peft_model")
"""Names for the arguments of Unsloth's functions."""
TRAINERS = {"SFTConfig": "sft", "DPOConfig": "dpo", "KTOConfig": "kto"}


def convert(settings: Settings, devices: int) -> None:
    for name in ("hub_token", "accelerator_config"):
        settings.settle(name, "unset", "it is written out by to_dict()")
    _model(settings)
    _objective(settings, TRAINERS[settings.kind])
    given = (
        "max_seq_length" if settings.first("max_seq_length") and "max_length" not in settings.given else "max_length"
    )  # Unsloth's
    most = length(settings, given, "truncate", "as TRL does with longer examples")
    settings.settle("max_seq_length", "unset", "max_length decides")
    if settings.get("truncation_mode") not in (None, "keep_start"):
        settings.settle("truncation_mode", "missing", "a longer example loses its end, not its beginning")
    settings.settle("truncation_mode", "derived", "a longer example loses its end")
    _data(settings)
    packs = settings.on("packing") and most
    training(settings, "per_device_train_batch_size", devices, packed=most if packs else None)


def _model(settings: Settings) -> None:
    name = settings.first("model_name_or_path", "base_model_name_or_path", "model_name")
    revision = settings.given.get("model_revision") or settings.given.get("revision")
    if name:
        value = settings.get(name)
        settings.put(name, f"{value}@{revision}" if revision and revision != "main" else value)
        settings.derive("model_revision", "revision", said="part of the model's name")
    else:
        settings.write("model_name_or_path", "model.name", "smollm2-135m-instruct", "the file names no model: give yours")
    if settings.get("task_type", "lora_task_type") not in (None, "CAUSAL_LM"):
        settings.refuse(str(settings.first("task_type", "lora_task_type")), "models that answer are trained: CAUSAL_LM")
    if settings.get("peft_type") not in (None, "LORA"):
        settings.refuse("peft_type", "LoraConfig is converted")
    adapts = {"r", "lora_alpha", "target_modules", "lora_r", "lora_target_modules", "get_peft_model"} & set(settings.given)
    if settings.on("load_in_16bit"):
        settings.defaults = {**settings.defaults, "load_in_4bit": False}
    if "seed" in settings.given:
        settings.derive("random_state", said="train.seed is the run's")
    if settings.on("full_finetuning"):
        return full(settings, "full_finetuning")
    if settings.on("use_peft") or adapts:
        settings.derive("peft_type", said="method.name is lora")
        settings.write(
            "use_peft",
            "method.name",
            "lora",
            "" if "use_peft" in settings.given else "as the arguments of a LoraConfig are given",
        )
        lora(settings, alpha=1.0)
    else:
        full(settings, "use_peft", "neither a LoraConfig nor use_peft: all weights are trained")
    quantized(settings)


def _objective(settings: Settings, kind: str) -> None:
    if kind == "sft":
        if settings.get("loss_type") not in (None, "nll", "chunked_nll"):
            settings.refuse("loss_type", "supervised fine-tuning has the loss nll")
        settings.derive("loss_type", said="objective: sft")
        return
    objective(settings, settings.kind, kind, "beta", f"as the arguments of a {settings.kind} are given")
    if kind == "dpo":
        dpo_loss(settings, "loss_type")
    elif settings.get("loss_type") not in (None, "kto"):
        settings.refuse("loss_type", "of KTO's losses, kto is there")
    else:
        settings.derive("loss_type", said="objective: kto")


def _data(settings: Settings) -> None:
    listed = settings.get("datasets")
    if settings.get("dataset_name"):
        source = {"path": settings.get("dataset_name"), "subset": settings.get("dataset_config")}
        source["split"] = settings.given.get("dataset_train_split")
        write_sources(settings, "dataset_name", [{key: value for key, value in source.items() if value and value != "train"}])
        settings.derive("dataset_config", "dataset_train_split", said="part of data.train")
    elif isinstance(listed, list):
        write_sources(settings, "datasets", [_source(settings, f"datasets[{n}]", dict(one)) for n, one in enumerate(listed)])
    else:
        no_sources(settings, "dataset_name")
    _held_out(settings)
    if settings.on("assistant_only_loss"):
        settings.put("assistant_only_loss", "assistant")
    elif settings.given.get("completion_only_loss"):
        settings.put("completion_only_loss", "assistant")
        settings.settle("assistant_only_loss", "unset")
    elif settings.given.get("completion_only_loss") is False:
        settings.put("completion_only_loss", "everything")
        settings.settle("assistant_only_loss", "unset")
    elif "assistant_only_loss" in settings.given or "completion_only_loss" not in settings.given:
        said = "only the assistant's messages are targets; of `messages` TRL trains on all tokens: data.train_on=everything for that"
        settings.settle("assistant_only_loss", "derived", said)
    column = settings.get("dataset_text_field")
    if column == "text":
        settings.settle("dataset_text_field", "unset")
    elif column:
        settings.put("dataset_text_field", column)


def _held_out(settings: Settings) -> None:
    """TRL evaluates if its script has a split to do so on, and `eval_strategy` says when."""
    split, name = settings.get("dataset_test_split"), settings.get("dataset_name")
    if settings.on("eval_strategy") and split and name:
        source = {"path": name, "split": split, "subset": settings.get("dataset_config")}
        write_sources(settings, "dataset_test_split", [{key: value for key, value in source.items() if value}], "data.eval")
    elif not settings.on("eval_strategy"):
        held_out(settings, "val_size")
        settings.settle("dataset_test_split", "unset", "eval_strategy is no")


def _source(settings: Settings, where: str, one: dict[str, Any]) -> Source:
    source: Source = {"path": one.pop("path")}
    for theirs, here in (("name", "subset"), ("split", "split"), ("revision", "revision")):
        if one.get(theirs) and one[theirs] != "train":
            source[here] = one[theirs]
        one.pop(theirs, None)
    for key, value in one.items():
        settings.given[f"{where}.{key}"] = value
        if key == "columns":
            settings.settle(f"{where}.columns", "derived", "the format is recognized by its columns; others are not read")
            continue
        settings.settle(f"{where}.{key}", "missing", "a source has no such setting: docs/recipe.md lists its keys")
    return source
