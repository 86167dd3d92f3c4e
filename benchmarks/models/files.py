"""Measures of what is read and written: models by name, adapters, merged models."""

import copy
import math
import tempfile
from pathlib import Path

import torch
from models.measuring import TOLERANCE, LeftOut, measure
from models.references import alone, difference
from models.subject import Subject, perturb
from torch import Tensor

import trimtab


@measure("merge")
def merge(subject: Subject) -> float:
    """The LoRA merged, saved, and read by plain Transformers."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        trimtab.merge(subject.lora.base, subject.lora.adapter, Path(folder) / "merged")
        merged = type(subject.pristine).from_pretrained(Path(folder) / "merged").eval()
        return difference(alone(merged, subject.rows), alone(subject.lora.model, subject.rows))


@measure("saved")
def saved(subject: Subject) -> float:
    """The LoRA saved, and loaded again onto another copy."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        trimtab.save_adapter(subject.lora.base, subject.lora.adapter, Path(folder) / "adapter")
        other = subject.base()
        trimtab.load_adapter(other, Path(folder) / "adapter")
        return difference(alone(other.model, subject.rows), alone(subject.lora.model, subject.rows))


@measure("PEFT")
def by_peft(subject: Subject) -> float:
    """The LoRA saved, and loaded onto the model by PEFT; left out where PEFT does not read its own adapters of this model right."""
    from peft import PeftConfig, PeftModel, get_peft_model

    def loaded(folder: Path) -> Tensor:
        return alone(PeftModel.from_pretrained(copy.deepcopy(subject.pristine), folder), subject.rows)

    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        ours, theirs = Path(name) / "ours", Path(name) / "theirs"
        trimtab.save_adapter(subject.lora.base, subject.lora.adapter, ours)
        failure: Exception | None = None
        try:
            deviation = difference(loaded(ours), alone(subject.lora.model, subject.rows))
        except Exception as error:
            deviation, failure = math.inf, error
        if deviation <= TOLERANCE:
            return deviation
        try:
            model = get_peft_model(copy.deepcopy(subject.pristine), PeftConfig.from_pretrained(ours))
            perturb({name: tensor for name, tensor in model.named_parameters() if "lora_" in name})
            model.save_pretrained(str(theirs))
            own = difference(loaded(theirs), alone(model, subject.rows))
        except Exception as error:
            raise LeftOut(f"PEFT cannot load its own adapters of this model: {error}") from error
        if own > TOLERANCE:
            raise LeftOut(f"PEFT loads its own adapters of this model wrongly: off by {own:.2g}")
        if failure is not None:
            raise failure
        return deviation


@measure("by name", trains=False)
def by_name(subject: Subject) -> float:
    """The model saved by plain Transformers, and loaded by the name of its folder."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        subject.pristine.save_pretrained(folder)
        base = trimtab.Base.load_folder(Path(folder), torch.float32, torch.device("cpu"), with_tokenizer=False)
        return difference(alone(base.model, subject.rows), subject.expected)
