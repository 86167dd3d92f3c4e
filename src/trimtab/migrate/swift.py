"""The arguments of ms-swift's `swift sft`, `swift pt` and `swift rlhf` as YAML or JSON."""

import json
from typing import Any

from trimtab.migrate._adapter import full, length, lora, quantized
from trimtab.migrate._preference import dpo_loss, objective
from trimtab.migrate._settings import NOTHING, Settings
from trimtab.migrate._sources import Source, held_out, no_sources, write_sources
from trimtab.migrate._training import training

TITLE = "ms-swift"
DEFAULTS = {
    "lr_scheduler_type": "cosine",
    "truncation_strategy": "delete",
    "target_modules": ["all-linear"],
    "num_train_epochs": 3.0,
}
MULTIMODAL = ("max_pixels", "vit_lr", "aligner_lr", "norm_bbox")
BATCH = 16
"""Accumulation makes so many examples a step, unless it is given."""
COLUMNS = {"query": "prompt", "response": "completion", "rejected_response": "rejected"}
"""ms-swift's names of columns -> Trimtab's, where they differ."""
LONGER = {"delete": "drop", "right": "truncate", "split": "split", "left": "drop"}
BETA = {"simpo": 2.0}
"""The default of beta, where it is not 0.1."""


def convert(settings: Settings, devices: int) -> None:
    for name in MULTIMODAL:
        if settings.on(name):
            settings.refuse(name, "images, video and audio are not supported: Trimtab trains on text")
    if settings.get("task_type") not in (None, "causal_lm"):
        settings.refuse("task_type", "models that answer are trained: causal_lm")
    settings.settle("task_type", "unset")
    _objective(settings)
    _method(settings)
    strategy = str(settings.get("truncation_strategy"))
    said = "as ms-swift does with longer examples"
    if strategy == "left":
        said = "left is not there: a longer example loses no beginning, so it is dropped"
    most = length(settings, "max_length", LONGER.get(strategy, "drop"), said)
    settings.settle("truncation_strategy", "key" if most else "derived", said, "data.overlong", LONGER.get(strategy, "drop"))
    _data(settings)
    packs = settings.on("packing") and most
    if not settings.get("gradient_accumulation_steps"):
        each = int(settings.get("per_device_train_batch_size") or 1)
        settings.defaults = {**settings.defaults, "gradient_accumulation_steps": -(-BATCH // (each * devices))}
    training(settings, "per_device_train_batch_size", devices, packed=most if packs else None)
    if "train.optimizer" not in settings.recipe:
        settings.write("adam_beta2", "train.optimizer", {"name": "adamw", "betas": [0.9, settings.get("adam_beta2")]})
    for name in ("weight_decay", *(() if settings.recipe["method.name"] == "full" else ("lora_dropout",))):
        if name not in settings.given and not (name == "lora_dropout" and "method.dropout" in settings.recipe):
            settings.put(name, settings.get(name))
    for name in ("model_name", "model_author"):
        settings.settle(name, "missing", "placeholders in examples are not filled in: write the name into them")


def _objective(settings: Settings) -> None:
    kind = settings.given.get("rlhf_type")
    if kind in NOTHING:
        return
    if kind not in ("dpo", "kto", "orpo", "simpo", "cpo"):
        settings.refuse(
            "rlhf_type", "Trimtab trains on existing examples, not on answers generated or judged during training. TRL has it"
        )
    beta = BETA.get(kind, 0.1)
    if settings.given.get("beta") is None:
        settings.defaults = {**settings.defaults, "beta": beta}
    objective(settings, "rlhf_type", kind, "beta")
    if kind == "dpo":
        dpo_loss(settings, "loss_type")
    else:
        settings.derive("loss_type", said=f"objective.name is {kind}")


def _method(settings: Settings) -> None:
    name = settings.first("model", "model_id_or_path") or "model"
    revision = settings.get("model_revision")
    settings.put(name, f"{settings.get(name)}@{revision}" if revision else settings.get(name), like="model_name_or_path")
    settings.settle("model_revision", "derived", "part of the model's name")
    tuner = settings.first("tuner_type", "train_type", "sft_type") or "tuner_type"
    kind = settings.get(tuner) or "lora"
    full_rate, rate = 1e-5, 1e-4
    if kind == "lora":
        settings.write(tuner, "method.name", "lora")
        if regex := settings.given.get("target_regex"):
            settings.write(
                "target_regex", "method.targets", regex, "a regular expression: of PEFT's, the whole path must match"
            )
            settings.settle("target_modules", "unset", "target_regex decides")
        targets = settings.recipe.get("method.targets")
        lora(settings, alpha=4.0)
        if targets:
            settings.recipe["method.targets"] = targets
        weights = settings.given.get("init_weights")
        if weights in ("eva", "gaussian", "pissa"):
            settings.put("init_weights", weights)
        elif str(weights).lower() == "true":
            settings.settle("init_weights", "unset")
        elif weights not in NOTHING:
            settings.settle("init_weights", "missing", f"{weights} is not there: method.init has eva, gaussian and pissa")
        if settings.given.get("lorap_lr_ratio"):
            settings.put("lorap_lr_ratio", float(settings.get("lorap_lr_ratio")))
    elif kind == "full":
        full(settings, tuner)
        rate = full_rate
    else:
        settings.refuse(tuner, "lora and full are converted; `trimtab methods` lists the methods that are there")
    if settings.given.get("learning_rate") is None:
        settings.defaults = {**settings.defaults, "learning_rate": rate}
    if settings.given.get("quant_bits"):
        bits = int(settings.get("quant_bits"))
        if settings.get("quant_method") not in (None, "bnb") or bits not in (4, 8):
            settings.refuse("quant_bits", "bnb's 4 bits (nf4) and 8 (int8) are there")
        settings.put("quant_bits", "nf4" if bits == 4 else "int8")
        settings.derive("quant_method", said="bitsandbytes quantizes")
    else:
        quantized(settings)


def _data(settings: Settings) -> None:
    names = _listed(settings.get("dataset"))
    columns = settings.given.get("columns")
    columns = json.loads(columns) if isinstance(columns, str) and columns.strip() else columns
    named = {COLUMNS.get(theirs, theirs): own for own, theirs in (columns or {}).items()}
    if columns:
        settings.settle("columns", "key", "", "data.columns", named)
        settings.recipe["data.columns"] = named
    if names:
        weights = [float(one) for one in _listed(settings.get("interleave_prob"))]
        sources = [
            {**source, **({"weight": weights[n]} if n < len(weights) else {})}
            for n, name in enumerate(names)
            for source in _sources(settings, "dataset", name, together=bool(weights))
        ]
        write_sources(settings, "dataset", sources)
        if weights:
            settings.settle("interleave_prob", "key", "", "data.train.NAME.weight", weights)
    else:
        no_sources(settings, "dataset")
    if held := _listed(settings.get("val_dataset")):
        write_sources(
            settings,
            "val_dataset",
            [source for name in held for source in _sources(settings, "val_dataset", name)],
            "data.eval",
        )
        settings.settle("split_dataset_ratio", "unset", "val_dataset is evaluated")
    else:
        held_out(settings, "split_dataset_ratio")
    scale = str(settings.given.get("loss_scale") or "default").partition("+")[0]
    if scale in ("last_round", "all"):
        settings.write("loss_scale", "data.train_on", "last" if scale == "last_round" else "everything")
    elif scale == "default":
        settings.derive("loss_scale", said="the assistant's turns are targets, with weight 1")
    else:
        settings.settle("loss_scale", "missing", f"{scale} is not there: give messages a weight of their own")


def _listed(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else str(value).split() if value not in NOTHING else []


def _sources(settings: Settings, setting: str, name: str, *, together: bool = False) -> list[Source]:
    """`HF::path:subset/subset#count`, of which all but the path may be missing: a source for each subset, unless they are counted together."""
    hub, _, rest = name.partition("::") if name[:4] in ("HF::", "MS::") else ("", "", name)
    if hub == "MS":
        settings.refuse(
            setting,
            f"{name} is ModelScope's: download it, and give the file, or its name on the Hugging Face hub as HF::org/name",
        )
    path, _, limit = rest.partition("#")
    path, _, subset = path.partition(":") if "://" not in path and path[1:3] != ":\\" else (path, "", "")
    subsets = subset.split("/") if subset else []
    if (limit or together) and len(subsets) > 1:
        settings.refuse(setting, f"{name} counts several subsets together: give each as a data set of its own")
    limited = {"limit": int(limit)} if limit else {}
    return [{"path": path, "subset": one, **limited} for one in subsets] or [{"path": path, **limited}]
