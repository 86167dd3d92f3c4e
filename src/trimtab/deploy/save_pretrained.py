"""Adapters in other trainers: `save_pretrained` of a model with adapters saves the adapters alone."""

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from trimtab.artifacts import write_adapter, write_tensors
from trimtab.base import Fingerprint, model_fingerprint, nearest_config
from trimtab.base.fingerprint import own_weights
from trimtab.core.errors import RecipeError, UnsupportedModel
from trimtab.core.files import updated_folder
from trimtab.core.wrapping import Wrapper
from trimtab.deploy.provenance import adapter_contents
from trimtab.methods import Attached, Method, Sample, adapters, replace_method
from trimtab.methods import attach as attach_layers

CHECKPOINT, RESUMED_FROM = "checkpoint-", "model.safetensors"
"""Hugging Face Trainer's name of a checkpoint, and the file in it that it loads into a model, unless that is PEFT's."""
_fingerprints: WeakKeyDictionary[nn.Module, Fingerprint] = WeakKeyDictionary()
"""Of models that have saved an adapter. Their weights are frozen, so they are hashed only once."""


def attach(model: nn.Module, method: Method, seed: int = 0, *, name: str = "default", sample: Sample | None = None) -> Attached:
    """Freeze `model` and attach the method's layers, in place. Of several adapters, only the new one is active.

    The model computes, trains and generates with it, in Hugging Face's Trainer and TRL too. Its `save_pretrained` then writes the
    adapters alone, as PEFT's does: the one named "default" into the folder, others into subfolders.

    Args:
        model: Any Transformers causal language model, of a Base or not.
        seed: Determines the adapter's initial values, together with the method, the model and the sample.
        name: Distinguishes it from other adapters on the same model.
        sample: Examples and the tokenizer, for methods initialized from text or data.

    Raises:
        NoSuchModule: A target matches no module of this model.
        RecipeError: The model has an adapter of that name, or the method is initialized from data and there is no sample.
    """
    adapter = attach_layers(model, method, seed, name=name, sample=sample)
    save_adapters_alone(model)
    return adapter


def save_adapters_alone(model: nn.Module) -> None:
    """Replace the model's `save_pretrained` by one that saves its adapters alone, while it has any."""
    if hasattr(model, "save_pretrained"):
        replace_method(model, "save_pretrained", _save_pretrained)


def _save_pretrained(
    model: Any, save_directory: Path | str, is_main_process: bool = True, *_: Any, push_to_hub: bool = False, **__: Any
) -> None:
    """Has the arguments of `PreTrainedModel.save_pretrained`; those about the model's own files are ignored.

    Raises:
        StorageError: The adapters can't be written.
        UnsupportedModel: Their parameters are sharded over several processes.
        RecipeError: An adapter's name is no valid folder name, or `push_to_hub` is set.
    """
    if push_to_hub:
        raise RecipeError("push_to_hub: save the adapter first, then push the model (model.push_to_hub), or the folder.")
    if not is_main_process:
        return
    if model not in _fingerprints:
        _fingerprints[model] = model_fingerprint(model)
    facts = {"fingerprint": _fingerprints[model], "stop_ids": []}
    first = next(p for p in own_weights(model).values() if p.is_floating_point())
    config = nearest_config(
        getattr(model.config, "_name_or_path", "") or type(model).__name__, first.dtype, str(first.device), "none", {}
    )
    for name, adapter in adapters(model).items():
        if not name or Path(name).name != name:
            raise RecipeError(f"The adapter name {name!r} is no valid folder name, so it cannot be saved.")
        if any(hasattr(p, "_local_tensor") or p.is_meta or p.numel() == 0 for p in adapter.parameters().values()):
            raise UnsupportedModel(
                "An adapter's parameters are sharded over processes (FSDP, DeepSpeed), and can't be saved from one."
            )
        folder = Path(save_directory) if name == "default" else Path(save_directory) / name
        write_adapter(folder, adapter_contents(adapter, config, facts, {}), overwrite=True)
    if Path(save_directory).name.startswith(CHECKPOINT):
        with updated_folder(Path(save_directory), last=RESUMED_FROM) as new:
            write_tensors(new / RESUMED_FROM, _adapter_tensors(model))


def _adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors by their names in the model's state; a tensor shared by layers only under its first name."""
    named: dict[int, tuple[str, Tensor]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, Wrapper):
            for name, tensor in layer.state_dict(keep_vars=True).items():
                if not name.startswith("base."):
                    named.setdefault(id(tensor), (f"{path}.{name}", tensor))
    return dict(named.values())
