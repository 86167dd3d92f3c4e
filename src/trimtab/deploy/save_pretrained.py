"""Adapters within other trainers: a model that has some saves them alone, where its own `save_pretrained` is called."""

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from trimtab.artifacts import write_adapter, write_tensors
from trimtab.base import Fingerprint, model_fingerprint, nearest_config
from trimtab.base.fingerprint import own_weights
from trimtab.core.errors import RecipeError, UnsupportedModel
from trimtab.core.files import filled_folder
from trimtab.core.wrapping import Wrapper
from trimtab.deploy.provenance import as_stored
from trimtab.methods import Attached, Method, Sample, adapters, replace_method
from trimtab.methods import attach as put_on

CHECKPOINT, RESUMED_FROM = "checkpoint-", "model.safetensors"
"""How Hugging Face's Trainer names what it resumes from, and the file there that it reads into any model but PEFT's."""
_fingerprints: WeakKeyDictionary[nn.Module, Fingerprint] = WeakKeyDictionary()
"""Of models that have saved an adapter: their weights are frozen, and hashing them again would take its time at every save."""


def attach(model: nn.Module, method: Method, seed: int = 0, *, name: str = "default", sample: Sample | None = None) -> Attached:
    """Freeze `model` and put the method's layers on it, in place. Of several adapters, only the new one is switched on.

    The model computes, trains and generates with it wherever it is used, in Hugging Face's Trainer and TRL too. Its
    `save_pretrained` then writes the adapters alone, as PEFT's does: one called "default" into the folder, others into folders in it.

    Args:
        model: Any Transformers causal language model; within a Base or not.
        seed: Decides the adapter's first values, with the method, the model and the sample alone.
        name: What to call it among others on the same model.
        sample: What methods that start from real text or from data start from.

    Raises:
        NoSuchModule: A target that names nothing in this model.
        RecipeError: The model has an adapter of that name already, or the method starts from data and there is no sample.
    """
    adapter = put_on(model, method, seed, name=name, sample=sample)
    save_alone(model)
    return adapter


def save_alone(model: nn.Module) -> None:
    """Let the model save its adapters alone, as long as it has any."""
    if hasattr(model, "save_pretrained"):
        replace_method(model, "save_pretrained", _save_pretrained)


def _save_pretrained(
    model: Any, save_directory: Path | str, is_main_process: bool = True, *_: Any, push_to_hub: bool = False, **__: Any
) -> None:
    """What `PreTrainedModel.save_pretrained` is called with; what it says of the model's own files says nothing here.

    Raises:
        StorageError: They can't be written.
        UnsupportedModel: Their numbers are spread over several processes.
        RecipeError: An adapter's name is no name of a folder, or they are to go to the hub.
    """
    if push_to_hub:
        raise RecipeError("push_to_hub: save the adapter first, then push the model (model.push_to_hub), or the folder.")
    if not is_main_process:
        return
    if model not in _fingerprints:
        _fingerprints[model] = model_fingerprint(model)
    facts = {"fingerprint": _fingerprints[model], "stop_ids": []}
    first = next(p for p in own_weights(model).values() if p.is_floating_point())
    held = nearest_config(
        getattr(model.config, "_name_or_path", "") or type(model).__name__, first.dtype, str(first.device), "none", {}
    )
    for name, adapter in adapters(model).items():
        if not name or Path(name).name != name:
            raise RecipeError(f"An adapter is called {name!r}, which is no name of a folder to save it in.")
        if any(hasattr(p, "_local_tensor") or p.is_meta or p.numel() == 0 for p in adapter.parameters().values()):
            raise UnsupportedModel(
                "An adapter's numbers are spread over processes (FSDP, DeepSpeed), and can't be saved from one."
            )
        folder = Path(save_directory) if name == "default" else Path(save_directory) / name
        write_adapter(folder, as_stored(adapter, held, facts, {}), over=True)
    if Path(save_directory).name.startswith(CHECKPOINT):
        with filled_folder(Path(save_directory), last=RESUMED_FROM) as new:
            write_tensors(new / RESUMED_FROM, _of_adapters(model))


def _of_adapters(model: nn.Module) -> dict[str, Tensor]:
    """What the model's own state has of adapters, by the names that it has there; what layers share under the first of them."""
    found: dict[int, tuple[str, Tensor]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, Wrapper):
            for name, tensor in layer.state_dict(keep_vars=True).items():
                if not name.startswith("base."):
                    found.setdefault(id(tensor), (f"{path}.{name}", tensor))
    return dict(found.values())
