"""An adapter on disk: a folder in the format of PEFT or of the `adapters` library (AdapterHub), with Trimtab's manifest.

PEFT reads `adapter_config.json` and `adapter_model.safetensors`; the `adapters` library reads `adapter.safetensors` instead of the
latter. The configuration says which of the two wrote the folder or can read it. `trimtab.json`, written last, holds what PEFT has no
place for: the method as in a recipe, a SHA-256 for every file and tensor, the base model's fingerprint, its stop tokens, the adapter's
origin, and a SHA-256 of all that. By it, any edit, any missing or extra tensor, and any other base model is refused by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.artifacts.tensors import read_tensors, sha256_tensor, write_tensors
from trimtab.core import files
from trimtab.core.errors import ArtifactError, listing
from trimtab.core.hub import at_revision

CONFIG, MANIFEST = "adapter_config.json", "trimtab.json"
PEFT_WEIGHTS, PEFT_PICKLE = "adapter_model.safetensors", "adapter_model.bin"
TEMPLATE, TEMPLATES = "training_template.jinja", "training_templates.json"
"""The chat template that the adapter was trained with, where that is not its base model's own. (The `chat_template.jinja` beside it is the
tokenizer's, for others: it has the switches of training as its defaults.)"""
HUB_WEIGHTS, HUB_PICKLE, HUB_HEAD = "adapter.safetensors", "pytorch_adapter.bin", "head_config.json"
"""The same files of the `adapters` library, and the one it writes for an adapter that has a head."""
FORMAT = 2
"""Version of the manifest; other versions are refused."""

KEYS = {"method", "files", "tensors", "base", "trained", "versions"}


@dataclass(frozen=True)
class Adapter:
    """The content of an adapter folder."""

    config: dict[str, Any]
    """The content of adapter_config.json."""
    tensors: dict[str, Tensor]
    """By the names of PEFT or the `adapters` library."""
    method: dict[str, Any] | None = None
    """The method as in a recipe; None in a folder that another library wrote."""
    base: dict[str, Any] = field(default_factory=dict)
    """The base model it was trained on: `model` (its ModelConfig in training), `fingerprint`, `stop_ids`; empty in another library's folder."""
    trained: dict[str, Any] = field(default_factory=dict)
    """Its origin: step, losses, the data's digest."""
    versions: dict[str, str] = field(default_factory=dict)
    chat_template: str | dict[str, str] | None = None
    """The chat template of its training, or several by name, where that is not the base model's own."""

    @property
    def source(self) -> str:
        """The name of the base model; empty if the folder has none."""
        name = self.config.get("base_model_name_or_path") or self.config.get("model_name") or ""
        return str(self.base["model"]["name"] if self.base else at_revision(name, self.config.get("revision")))

    @property
    def weights(self) -> str:
        """The name of the tensors' file."""
        return HUB_WEIGHTS if _is_adapterhub(self.config) else PEFT_WEIGHTS


def write_adapter(
    folder: Path, adapter: Adapter, *, overwrite: bool = False, write_more: Callable[[Path], None] = lambda _: None
) -> None:
    """Write a new adapter folder atomically, or `overwrite` the files of an existing one.

    Args:
        write_more: Writes other files into the folder it is given, such as a tokenizer's; the manifest lists them, too.

    Raises:
        StorageError: It can't be written.
    """
    with files.updated_folder(folder, last=MANIFEST) if overwrite else files.new_folder(folder) as new:
        write_more(new)
        files.write_json(new / CONFIG, adapter.config)
        write_tensors(new / adapter.weights, adapter.tensors)
        if isinstance(adapter.chat_template, str):
            files.write_text(new / TEMPLATE, adapter.chat_template)
        elif adapter.chat_template is not None:
            files.write_json(new / TEMPLATES, {"chat_template": adapter.chat_template})
        written = sorted(file.relative_to(new).as_posix() for file in new.rglob("*") if file.is_file())
        manifest = {
            "method": adapter.method,
            "files": {name: files.sha256_file(new / name) for name in written},
            "tensors": {name: _describe(tensor) for name, tensor in sorted(adapter.tensors.items())},
            "base": adapter.base,
            "trained": adapter.trained,
            "versions": adapter.versions,
        }
        files.write_manifest(new / MANIFEST, FORMAT, manifest)


def is_adapter(folder: Path) -> bool:
    """Whether this looks like an adapter folder of Trimtab, PEFT or the `adapters` library."""
    return (folder / CONFIG).is_file()


def read_adapter(folder: Path, *, ours: bool = False) -> Adapter:
    """Read an adapter folder.

    Args:
        ours: Trimtab wrote it, so a missing manifest is an error.

    Raises:
        ArtifactError: A file or tensor is missing, damaged, or differs from the manifest; the message names it.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such adapter folder.")
    config = files.read_json(folder / CONFIG)
    if not isinstance(config, dict) or not (_is_adapterhub(config) or "peft_type" in config):
        raise ArtifactError(f"{folder / CONFIG}: is not a PEFT adapter configuration (it has no peft_type).")
    tensors = read_tensors(_find_weights(folder, hub=_is_adapterhub(config)))
    if not (folder / MANIFEST).exists() and not ours:
        return Adapter(config, tensors)
    manifest = files.read_manifest(folder / MANIFEST, FORMAT, KEYS)
    if problems := _problems(folder, manifest, tensors):
        raise ArtifactError(
            f"{folder} has changed since it was saved:\n{listing(problems)}\n"
            f"Restore it from a copy. If the change is intended, delete {MANIFEST}: then the folder is read as PEFT's, unverified."
        )
    template: str | dict[str, str] | None = None
    if TEMPLATE in manifest["files"]:
        template = (folder / TEMPLATE).read_text(encoding="utf-8")
    elif TEMPLATES in manifest["files"]:
        template = files.read_json(folder / TEMPLATES)["chat_template"]
    return Adapter(config, tensors, manifest["method"], manifest["base"], manifest["trained"], manifest["versions"], template)


def _is_adapterhub(config: Mapping[str, Any]) -> bool:
    """Whether the `adapters` library wrote a configuration: its `version` says so."""
    return str(config.get("version", "")).startswith("adapters.")


def _find_weights(folder: Path, *, hub: bool) -> Path:
    """The tensors' file. Raises ArtifactError if it is missing, or if the folder holds more than an adapter."""
    weights, pickle = (HUB_WEIGHTS, HUB_PICKLE) if hub else (PEFT_WEIGHTS, PEFT_PICKLE)
    if not (folder / weights).is_file():
        advice = "save it with use_safetensors=True" if hub else "save it as safetensors"
        pickled = f" It has {pickle}, a pickle, which is never read: {advice}." if (folder / pickle).exists() else ""
        raise ArtifactError(f"{folder} holds no {weights}, so the adapter is incomplete.{pickled}")
    if hub and (folder / HUB_HEAD).exists():
        raise ArtifactError(
            f"{folder} holds a head beside the adapter ({HUB_HEAD}), which Trimtab would not use: save it with with_head=False, "
            "or delete the head's files if it is the base model's own."
        )
    return folder / weights


def _problems(folder: Path, manifest: dict[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    expected = manifest["tensors"]
    problems = [f"{name}: missing" for name in expected if name not in tensors]
    problems += [f"{name}: not in the manifest" for name in tensors if name not in expected]
    changed = [name for name in tensors if name in expected and _describe(tensors[name]) != expected[name]]
    for name, digest in manifest["files"].items():
        if not (folder / name).is_file():
            problems.append(f"{name}: missing")
        elif files.sha256_file(folder / name) != digest:
            changed.append(name)
    return problems + [f"{name}: changed since it was saved" for name in changed]


def _describe(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "sha256": sha256_tensor(tensor)}
