"""What a command is given: a run folder, an adapter folder, or a model; turned into a base with or without an adapter."""

from dataclasses import dataclass
from pathlib import Path

from trimtab import files
from trimtab.artifacts import is_adapter, read_adapter
from trimtab.base import Base, ModelConfig
from trimtab.deploy.adapter import load_adapter
from trimtab.errors import ArtifactError, RecipeError
from trimtab.methods import Attached

RUN, ADAPTER = "run.json", "adapter"
"""What makes a folder a run, and where in it the finished adapter is."""


@dataclass
class Target:
    """A base, and the adapter on it if there is one."""

    base: Base
    adapter: Attached | None
    folder: Path | None
    """The adapter's folder."""


def adapter_folder(name: str) -> Path | None:
    """The adapter that a run or adapter folder stands for; None if `name` is neither."""
    path = files.expanded(name)
    if (path / RUN).is_file():
        if not is_adapter(path / ADAPTER):
            raise ArtifactError(
                f"{path} is a run without a finished adapter. What it saved on its way is in {path / 'checkpoints'}."
            )
        return path / ADAPTER
    return path if is_adapter(path) else None


def open_target(name: str, model: str | None = None) -> Target:
    """Load what `name` stands for.

    Args:
        name: A run folder, an adapter folder, or anything that is a model (see ModelConfig).
        model: The base to put the adapter on, instead of the one that it names.
    """
    folder = adapter_folder(name)
    if folder is None:
        if model is not None:
            raise RecipeError(f"{name} is not a run or an adapter folder, so --model {model} says nothing about it.")
        return Target(Base.load(ModelConfig(name=name)), None, None)
    stored = read_adapter(folder)
    source = model or stored.source
    if not source:
        raise RecipeError(f"{folder} does not say which base it was trained on: give it with --model.")
    dtype = stored.base.get("dtype")
    dtype = dtype if dtype in ("float32", "bfloat16") else "auto"
    base = Base.load(ModelConfig(name=source, dtype=dtype, quantize=stored.base.get("quantize", "none")))
    return Target(base, load_adapter(base, folder), folder)
