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
    "AdapterLayer": "methods",
    "Attached": "methods",
    "Base": "base",
    "BitFit": "methods.bitfit",
    "BottleneckAdapter": "methods.bottleneck",
    "CPO": "objectives.cpo",
    "DPO": "objectives.dpo",
    "DoRA": "methods.dora",
    "Full": "methods.full",
    "Generation": "engine",
    "IA3": "methods.ia3",
    "KTO": "objectives.kto",
    "LayerNormTuning": "methods.layernorm",
    "LoRA": "methods.lora",
    "Method": "methods",
    "MiSS": "methods.miss",
    "OFT": "methods.oft",
    "ORPO": "objectives.orpo",
    "Objective": "objectives",
    "PTuning": "methods.ptuning",
    "PTuningV2": "methods.ptuning_v2",
    "PrefixTuning": "methods.prefix",
    "PromptTuning": "methods.prompt",
    "Recipe": "run.recipe",
    "RunObserver": "report",
    "SFT": "objectives.sft",
    "SimPO": "objectives.simpo",
    "Tokens": "methods.tokens",
    "TrainConfig": "train",
    "TrimtabError": "core.errors",
    "activate": "methods",
    "active": "methods",
    "adapters": "methods",
    "answer": "api",
    "answers": "api",
    "attach": "deploy",
    "combine": "methods",
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
    "score_loss": "evaluate",
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
    from trimtab.api import answer, answers, fit, load, method, rows, stream
    from trimtab.base import Base
    from trimtab.core.errors import TrimtabError
    from trimtab.deploy import attach, load_adapter, merge, sample, save_adapter
    from trimtab.engine import Generation, generate
    from trimtab.evaluate import score, score_loss
    from trimtab.methods import AdapterLayer, Attached, Method, activate, active, adapters, combine
    from trimtab.methods.bitfit import BitFit
    from trimtab.methods.bottleneck import BottleneckAdapter
    from trimtab.methods.dora import DoRA
    from trimtab.methods.full import Full
    from trimtab.methods.ia3 import IA3
    from trimtab.methods.layernorm import LayerNormTuning
    from trimtab.methods.lora import LoRA
    from trimtab.methods.miss import MiSS
    from trimtab.methods.oft import OFT
    from trimtab.methods.prefix import PrefixTuning
    from trimtab.methods.prompt import PromptTuning
    from trimtab.methods.ptuning import PTuning
    from trimtab.methods.ptuning_v2 import PTuningV2
    from trimtab.methods.tokens import Tokens
    from trimtab.objectives import Objective
    from trimtab.objectives.cpo import CPO
    from trimtab.objectives.dpo import DPO
    from trimtab.objectives.kto import KTO
    from trimtab.objectives.orpo import ORPO
    from trimtab.objectives.sft import SFT
    from trimtab.objectives.simpo import SimPO
    from trimtab.report import RunObserver
    from trimtab.run.recipe import Recipe
    from trimtab.run.script import run_recipe
    from trimtab.train import TrainConfig
