"""An adapter on disk: a folder in PEFT's format, or in that of the `adapters` library, with a manifest of ours beside it.

`adapter_config.json` and `adapter_model.safetensors` are what PEFT reads, and the `adapters` library `adapter.safetensors`
instead: the configuration says which of the two has written the folder, or can read it. `trimtab.json`, written last, holds what PEFT
has no place for: the method in our words, a SHA-256 for every file and tensor, the base's fingerprint, its stop tokens,
where the adapter came from, and a SHA-256 over all of that. With it, any edit, missing or extra tensor, or other base is
refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.artifacts.tensors import read_tensors, sha256_tensor, write_tensors
from trimtab.core import files
from trimtab.core.adapterhub import is_adapterhub_config
from trimtab.core.errors import ArtifactError, listing

CONFIG, MANIFEST = "adapter_config.json", "trimtab.json"
PEFTS_WEIGHTS, PEFTS_PICKLE = "adapter_model.safetensors", "adapter_model.bin"
HUBS_WEIGHTS, HUBS_PICKLE, HUBS_HEAD = "adapter.safetensors", "pytorch_adapter.bin", "head_config.json"
"""The same of the `adapters` library (AdapterHub), and what it writes beside an adapter that has a head of its own."""
FORMAT = 2
"""Version of the manifest; a reader refuses one that it does not know."""

KEYS = {"method", "files", "tensors", "base", "trained", "versions"}


@dataclass(frozen=True)
class Adapter:
    """The content of an adapter folder."""

    config: dict[str, Any]
    """PEFT's adapter_config.json, or the `adapters` library's."""
    tensors: dict[str, Tensor]
    """By that library's names."""
    method: dict[str, Any] | None = None
    """The method in our words; None in a folder that another library wrote."""
    base: dict[str, Any] = field(default_factory=dict)
    """The base it was trained on: `model`, its ModelConfig as it was held, `fingerprint` and `stop_ids`; empty in another library's folder."""
    trained: dict[str, Any] = field(default_factory=dict)
    """How it came to be: step, losses, the data's digest."""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The name of the base, as far as the folder says."""
        theirs = self.config.get("base_model_name_or_path") or self.config.get("model_name")
        return str(self.base["model"]["name"] if self.base else theirs or "")

    @property
    def weights(self) -> str:
        """The name of the file that holds the tensors."""
        return HUBS_WEIGHTS if is_adapterhub_config(self.config) else PEFTS_WEIGHTS


def write_adapter(folder: Path, adapter: Adapter, *, over: bool = False) -> None:
    """Write a new adapter folder, whole or not at all; `over` what is there, if that is wanted. Raises StorageError."""
    with files.filled_folder(folder, last=MANIFEST) if over else files.new_folder(folder) as new:
        files.write_json(new / CONFIG, adapter.config)
        write_tensors(new / adapter.weights, adapter.tensors)
        manifest = {
            "method": adapter.method,
            "files": {name: files.sha256_file(new / name) for name in (CONFIG, adapter.weights)},
            "tensors": {name: _description(tensor) for name, tensor in sorted(adapter.tensors.items())},
            "base": adapter.base,
            "trained": adapter.trained,
            "versions": adapter.versions,
        }
        files.write_manifest(new / MANIFEST, FORMAT, manifest)


def is_adapter(folder: Path) -> bool:
    """Whether this looks like an adapter folder, of ours, of PEFT's or of the `adapters` library's."""
    return (folder / CONFIG).is_file()


def read_adapter(folder: Path, *, ours: bool = False) -> Adapter:
    """Read an adapter folder.

    Args:
        ours: It was written by us, so a manifest that is missing is damage.

    Raises:
        ArtifactError: Something is missing, damaged, or not what the manifest says; the message names it.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such adapter folder.")
    config = files.read_json(folder / CONFIG)
    if not isinstance(config, dict) or not (is_adapterhub_config(config) or "peft_type" in config):
        raise ArtifactError(f"{folder / CONFIG}: is not a PEFT adapter configuration (it has no peft_type).")
    tensors = read_tensors(_whole(folder, hubs=is_adapterhub_config(config)))
    if not (folder / MANIFEST).exists() and not ours:
        return Adapter(config, tensors)
    manifest = files.read_manifest(folder / MANIFEST, FORMAT, KEYS)
    if problems := _problems(folder, manifest, tensors):
        raise ArtifactError(
            f"{folder} is not what was saved:\n{listing(problems)}\n"
            f"Restore it from a copy. If the change was meant, delete {MANIFEST}: then it is read as PEFT's, unverified."
        )
    return Adapter(config, tensors, manifest["method"], manifest["base"], manifest["trained"], manifest["versions"])


def _whole(folder: Path, *, hubs: bool) -> Path:
    """The file of the tensors. Raises ArtifactError if it is not there, or if it is not all that the folder holds."""
    weights, pickle = (HUBS_WEIGHTS, HUBS_PICKLE) if hubs else (PEFTS_WEIGHTS, PEFTS_PICKLE)
    if not (folder / weights).is_file():
        how = "save it with use_safetensors=True" if hubs else "save it as safetensors"
        pickled = f" It has {pickle}, a pickle, which is never read: {how}." if (folder / pickle).exists() else ""
        raise ArtifactError(f"{folder} holds no {weights}, so it is not a whole adapter.{pickled}")
    if hubs and (folder / HUBS_HEAD).exists():
        raise ArtifactError(
            f"{folder} holds a head beside the adapter ({HUBS_HEAD}), which Trimtab would not use: save it with with_head=False, "
            "or delete the head's files if it is the base's own."
        )
    return folder / weights


def _problems(folder: Path, manifest: dict[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    expected = manifest["tensors"]
    problems = [f"{name}: missing" for name in expected if name not in tensors]
    problems += [f"{name}: not in the manifest" for name in tensors if name not in expected]
    changed = [name for name in tensors if name in expected and _description(tensors[name]) != expected[name]]
    changed += [name for name, digest in manifest["files"].items() if files.sha256_file(folder / name) != digest]
    return problems + [f"{name}: changed since it was saved" for name in changed]


def _description(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "sha256": sha256_tensor(tensor)}
