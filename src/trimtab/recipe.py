"""The recipe: everything that decides a run's result, in one file that repeats it."""

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, SerializeAsAny

from trimtab.base import ModelConfig
from trimtab.config import Config
from trimtab.data import DataConfig
from trimtab.methods import Method
from trimtab.methods.lora import LoRA
from trimtab.objectives import Objective
from trimtab.objectives.sft import SFT
from trimtab.train import TrainConfig


def _named(raw: Any) -> Any:
    return {"name": raw} if isinstance(raw, str) else raw


def _as_path(raw: Any) -> Any:
    return Path(raw) if isinstance(raw, str) and raw else raw


class Recipe(Config):
    """Everything that decides a run's result."""

    model: Annotated[ModelConfig, BeforeValidator(_named)] = Field(default_factory=lambda: ModelConfig(name="smollm2-135m-instruct"))
    """The base: a folder, a GGUF file, a hub name, or `smollm2-135m-instruct`."""
    data: DataConfig
    """What to learn from."""
    method: Annotated[SerializeAsAny[Method], BeforeValidator(Method.pick)] = Field(default_factory=LoRA)
    """Which adapter to train."""
    objective: Annotated[SerializeAsAny[Objective], BeforeValidator(Objective.pick)] = Field(default_factory=SFT)
    """What makes an answer good."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """How to train."""
    output: Annotated[Path, BeforeValidator(_as_path)] = Path("runs/run")
    """The run's folder, a new one."""

    def to_yaml(self) -> str:
        """The recipe with every default written out and every local path absolute, so it repeats the run from anywhere."""
        plain = self.plain()
        plain["output"] = str(self.output.absolute())
        plain["model"]["name"] = _absolute(self.model.name)
        plain["data"]["train"] = [_absolute(name) for name in self.data.train]
        if isinstance(self.data.eval, str):
            plain["data"]["eval"] = _absolute(self.data.eval)
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name
