"""LLaMA-Factory's YAML and JSON files, and the dataset_info.json that their datasets' names stand for."""

from pathlib import Path
from typing import Any

from trimtab.core import files
from trimtab.core.errors import ArtifactError, RecipeError
from trimtab.migrate._adapter import full, length, lora, quantized
from trimtab.migrate._preference import dpo_loss, objective
from trimtab.migrate._settings import Settings
from trimtab.migrate._sources import Source, held_out, no_sources, write_sources
from trimtab.migrate._training import training

TITLE = "LLaMA-Factory"
MULTIMODAL = ("image_max_pixels", "video_max_pixels", "freeze_vision_tower", "freeze_multi_modal_projector", "media_dir")
DEFAULTS = {"lora_target": "all", "lr_scheduler_type": "linear", "dataset_dir": "data", "warmup_steps": 0}
COLUMNS = {
    "prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system", "tools": "tools",
    "messages": "conversations", "chosen": "chosen", "rejected": "rejected", "kto_tag": "kto_tag",
}  # fmt: skip
"""LLaMA-Factory's name of a column in dataset_info.json -> Trimtab's."""


def convert(settings: Settings, devices: int) -> None:
    if "model_class" in settings.given:
        settings.refuse("model_class", "files of LLaMA-Factory's v1 trainer, which has other options, are not converted")
    if not settings.on("do_train"):
        settings.refuse(
            "do_train",
            "it does not train: `trimtab eval RUN` measures and answers, `trimtab merge` exports, `trimtab chat` talks",
        )
    for name in MULTIMODAL:
        if name in settings.given:
            settings.refuse(name, "images, video and audio are not supported: Trimtab trains on text")
    if settings.on("use_kt"):
        settings.refuse("use_kt", "KTransformers holds experts on another device, which Trimtab does not")
    stage = settings.get("stage") or "sft"
    _objective(settings, stage)
    _method(settings)
    said = "LLaMA-Factory cuts texts into blocks" if stage == "pt" else "as LLaMA-Factory does with longer examples"
    most = length(settings, "cutoff_len", "split" if stage == "pt" else "truncate", said)
    _data(settings, stage)
    packs = stage == "pt" or settings.on("packing", "neat_packing")
    training(settings, "per_device_train_batch_size", devices, packed=most if packs else None)
    if (patience := settings.get("early_stopping_steps")) is not None:
        settings.put("early_stopping_steps", int(patience))


def _objective(settings: Settings, stage: str) -> None:
    if stage in ("rm", "ppo"):
        settings.refuse("stage", "Trimtab trains models that answer, on existing examples. TRL has it")
    if stage in ("sft", "pt"):
        settings.put("stage", "sft", "" if stage == "sft" else "on the column `text`, every token of which is a target")
        return
    loss = settings.get("pref_loss") or "sigmoid"
    kind = "kto" if stage == "kto" else loss if loss in ("orpo", "simpo") else "dpo"
    objective(settings, "stage", kind, "pref_beta")
    if kind == "dpo":
        dpo_loss(settings, "pref_loss")
    else:
        settings.derive("pref_loss", said=f"objective.name is {kind}")


def _method(settings: Settings) -> None:
    revision = settings.get("model_revision")
    name = settings.get("model_name_or_path")
    settings.put("model_name_or_path", f"{name}@{revision}" if revision and revision != "main" else name)
    settings.settle("model_revision", "derived", "part of the model's name")
    kind = settings.get("finetuning_type") or "lora"
    if kind == "lora":
        settings.put("finetuning_type", "lora")
        lora(settings, alpha=2.0)
    elif kind == "oft":
        settings.put("finetuning_type", "oft")
        target = settings.get("oft_target") or "all"
        settings.put("oft_target", "all-linear" if target == "all" else [part.strip() for part in str(target).split(",")])
        settings.put("oft_block_size", int(settings.get("oft_block_size") or 32))
    elif kind == "full":
        full(settings, "finetuning_type")
    else:
        settings.refuse(
            "finetuning_type",
            "blocks are not unfrozen by number; method: {name: full, targets: [layers.30, layers.31]} trains some",
        )
    quantized(settings)


def _data(settings: Settings, stage: str) -> None:
    names = _split(settings.get("dataset"))
    if names:
        write_sources(settings, "dataset", _weighted(settings, [_source(settings, name, stage) for name in names]))
    else:
        no_sources(settings, "dataset")
    if settings.get("eval_dataset"):
        sources = [_source(settings, name, stage) for name in _split(settings.get("eval_dataset"))]
        write_sources(settings, "eval_dataset", sources, "data.eval")
    held_out(settings, "val_size")
    if settings.on("mask_history"):
        settings.put("mask_history", "last")
    elif settings.on("train_on_prompt"):
        settings.put("train_on_prompt", "everything")
    if settings.given.get("enable_thinking") is not None:
        settings.put("enable_thinking", bool(settings.get("enable_thinking")))
    settings.derive("dataset_dir", said="the paths of data.train begin with it")


def _split(value: Any) -> list[str]:
    listed = value if isinstance(value, list) else str(value or "").split(",")
    return [name.strip() for name in listed if str(name).strip()]


def _weighted(settings: Settings, sources: list[Source]) -> list[Source]:
    limit, probabilities = settings.get("max_samples"), settings.get("interleave_probs")
    if limit:
        sources = [{**source, "limit": min(int(limit), source.get("limit", int(limit)))} for source in sources]
        settings.settle("max_samples", "key", "of each source", "data.train.NAME.limit", int(limit))
    if probabilities:
        weights = [float(one) for one in _split(probabilities)]
        sources = [{**source, "weight": weight} for source, weight in zip(sources, weights, strict=False)]
        settings.settle("interleave_probs", "key", "", "data.train.NAME.weight", weights)
        settings.derive("mix_strategy", said="sources with weights are sampled by them")
    else:
        settings.derive("mix_strategy", said="sources without weights are concatenated")
    return sources


def _source(settings: Settings, name: str, stage: str) -> Source:
    """The source that a dataset's name stands for."""
    if name.startswith("REMOTE:"):
        return {"path": name.removeprefix("REMOTE:")}
    folder = settings.get("dataset_dir")
    if folder == "ONLINE":
        return {"path": name}
    place = next(
        (at for at in (Path(folder), Path(settings.where).parent / folder) if (at / "dataset_info.json").is_file()), None
    )
    if place is None:
        said = f"{name} is a name in {folder}/dataset_info.json, which is not here: give the file or dataset that it stands for"
        settings.comments.setdefault("data.train", said)
        return {"path": name}
    return _entry(place, name, stage)


def _entry(folder: Path, name: str, stage: str) -> Source:
    place = folder / "dataset_info.json"
    try:
        known = files.read_json(place)
    except ArtifactError as error:
        raise RecipeError(str(error)) from None
    entry = known.get(name) if isinstance(known, dict) else None
    if not isinstance(entry, dict):
        raise RecipeError(f"{place}: no dataset is called {name}. Known: {', '.join(known)}.")
    path = entry.get("file_name")
    path = str(folder / path) if path else entry.get("hf_hub_url") or entry.get("ms_hub_url")
    if path is None:
        raise RecipeError(f"{place}: {name} is made by a script, which is never run: give data.train=FILE with its examples.")
    source: Source = {"path": path}
    for theirs, here in (("subset", "subset"), ("split", "split"), ("num_samples", "limit")):
        if entry.get(theirs) and not (theirs == "split" and entry[theirs] == "train"):
            source[here] = entry[theirs]
    columns = {("text" if stage == "pt" and theirs == "prompt" else COLUMNS[theirs]): column
               for theirs, column in entry.get("columns", {}).items() if theirs in COLUMNS}  # fmt: skip
    if columns.get("conversations") and entry.get("tags", {}).get("role_tag") == "role":
        columns["messages"] = columns.pop("conversations")
    columns = {here: column for here, column in columns.items() if here != column}
    return {**source, "columns": columns} if columns else source
