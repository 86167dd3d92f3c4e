"""On how many devices, and by which engine: what other tools say of it, and leave to their launchers."""

import json
import re
from pathlib import Path
from typing import Any

from trimtab.migrate._settings import Settings

ENGINES = {0: "ddp", 1: "zero1", 2: "zero2", 3: "zero3"}
"""By the stage of DeepSpeed's ZeRO."""


def engine(settings: Settings, count: int) -> None:
    """`devices`, and `distributed`."""
    if count > 1:
        settings.recipe["devices"] = count
        settings.comments["devices"] = "as --devices says; leave it out for a launcher such as torchrun"
    given = settings.get("deepspeed")
    if settings.on("deepspeed"):
        _deepspeed(settings, given)
    if settings.on("fsdp", "fsdp_config", "fsdp_version"):
        name = settings.first("fsdp", "fsdp_config", "fsdp_version") or "fsdp"
        _write(settings, name, "fsdp")
        settings.derive("fsdp", "fsdp_config", "fsdp_version", said="fsdp divides each decoder layer; what is saved is whole")


def _deepspeed(settings: Settings, given: Any) -> None:
    """A file's name, ms-swift's short name of one, or its content."""
    path = Path(str(given))
    beside = [path, Path(settings.where).parent / path] if not isinstance(given, dict) else []
    found = next((file for file in beside if file.is_file()), None)
    stage = _stage(json.loads(found.read_text(encoding="utf-8")) if found else given)
    if stage is None:
        settings.settle(
            "deepspeed", "missing", "which stage of ZeRO it is was not found: set distributed.engine to zero1, zero2 or zero3"
        )
        return
    if stage == 0 or found is None:
        said = "" if stage == 0 else "with defaults: its file was not found, and would be distributed.config"
        _write(settings, "deepspeed", ENGINES[stage], "" if isinstance(given, dict) else said)
    elif _write(settings, "deepspeed", ENGINES[stage]) == ENGINES[stage]:
        settings.recipe["distributed.config"] = str(found)


def _write(settings: Settings, name: str, engine: str, said: str = "") -> str:
    """The engine, or for full fine-tuning, which is not divided by zero3, fsdp."""
    if engine == "zero3" and "full" in (settings.recipe.get("method"), settings.recipe.get("method.name")):
        engine, said = "fsdp", "zero3 does not train full; fsdp divides weights, gradients and the optimizer's state"
    settings.write(name, "distributed.engine", engine, said)
    return engine


def _stage(given: Any) -> int | None:
    """Of ZeRO, by a configuration or its file's name (ds_z3_config.json, zero2.json, zero3_bf16_cpuoffload_all.json)."""
    if isinstance(given, dict):
        section = given.get("zero_optimization") or {}
        return int(section.get("stage", 0)) if isinstance(section, dict) else None
    named = re.search(r"(?:z|zero|stage)_?-?([0-3])", str(given).lower())
    return int(named[1]) if named else None
