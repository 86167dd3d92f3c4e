"""Trimtab: fine-tune large language models by training a few small adapters on a frozen model.

    import trimtab

    base = trimtab.load("smollm2-135m-instruct")              # or trimtab.Base(model, tokenizer), with a model you hold
    rows = trimtab.rows("train.jsonl", base)
    adapter = trimtab.attach(base.model, trimtab.LoRA(rank=16))
    for step in trimtab.fit(base, adapter, rows, epochs=2):
        print(step.number, step.loss)
    trimtab.save_adapter(base, adapter, "my-adapter")         # PEFT loads it too
    print(trimtab.answer(base, "Show the ten largest files here."))
    trimtab.merge(base, adapter, "my-model")

Importing this package imports nothing heavy; each name is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Attached": "methods",
    "Base": "base",
    "LoRA": "methods.lora",
    "Recipe": "run.recipe",
    "SFT": "objectives.sft",
    "TrainConfig": "train",
    "TrimtabError": "core.errors",
    "activate": "methods",
    "active": "methods",
    "adapters": "methods",
    "answer": "api",
    "attach": "deploy",
    "fit": "api",
    "generate": "engine",
    "load": "api",
    "load_adapter": "deploy",
    "merge": "deploy",
    "method": "api",
    "rows": "api",
    "run_recipe": "run.script",
    "sample": "deploy",
    "save_adapter": "deploy",
    "score": "evaluate",
    "stream": "api",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    return getattr(importlib.import_module(f"trimtab.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from trimtab.api import answer, fit, load, method, rows, stream
    from trimtab.base import Base
    from trimtab.core.errors import TrimtabError
    from trimtab.deploy import attach, load_adapter, merge, sample, save_adapter
    from trimtab.engine import generate
    from trimtab.evaluate import score
    from trimtab.methods import Attached, activate, active, adapters
    from trimtab.methods.lora import LoRA
    from trimtab.objectives.sft import SFT
    from trimtab.run.recipe import Recipe
    from trimtab.run.script import run_recipe
    from trimtab.train import TrainConfig
