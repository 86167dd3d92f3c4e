"""Training states on disk: a folder per saved step, from which a run resumes exactly.

`state.safetensors` holds the tensors; `state.json`, written last, holds the step, the run's progress, a SHA-256 of the
tensors' file and one of all that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.artifacts.tensors import changed_tensor, read_tensors, write_tensors
from trimtab.core import files
from trimtab.core.errors import ArtifactError

TENSORS, MANIFEST = "state.safetensors", "state.json"
FORMAT = 2
KEYS = {"step", "facts", "tensors"}


@dataclass(frozen=True)
class State:
    """The state of training after a step."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    """JSON data."""


def write_state(states: Path, state: State) -> Path:
    """Write a new folder in `states` atomically, and read it back. Raises StorageError, or ArtifactError for a faulty disk."""
    folder = states / f"step-{state.step:06d}"
    if folder.exists():  # of a run that resumed from an earlier state
        files.remove_folder(folder)
    with files.new_folder(folder) as new:
        write_tensors(new / TENSORS, state.tensors)
        digest = files.sha256_file(new / TENSORS)  # before the comparison, so that a later change is detected, too
        if changed := changed_tensor(new / TENSORS, state.tensors):
            raise ArtifactError(f"{folder / TENSORS}: {changed} differs from what was written. The disk is faulty.")
        files.write_manifest(new / MANIFEST, FORMAT, {"step": state.step, "facts": state.facts, "tensors": digest})
    _read_manifest(folder)
    return folder


def read_state(folder: Path) -> State:
    """Read a state's folder. Raises ArtifactError if it was changed."""
    manifest = _read_manifest(folder)
    return State(manifest["step"], read_tensors(folder / TENSORS), manifest["facts"])


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The content of state.json. Raises ArtifactError if it or the tensors' file was changed."""
    manifest = files.read_manifest(folder / MANIFEST, FORMAT, KEYS)
    if not (folder / TENSORS).is_file() or files.sha256_file(folder / TENSORS) != manifest["tensors"]:
        raise ArtifactError(f"{folder / TENSORS}: is missing, or changed since it was saved.")
    return manifest


def saved_states(states: Path) -> list[Path]:
    """The folders of states, newest first."""
    return sorted(states.glob("step-*"), reverse=True)


def newest_state(states: Path, on_damaged: Callable[[str], None]) -> State | None:
    """The newest undamaged state; `on_damaged` receives the error of each newer one."""
    for folder in saved_states(states):
        try:
            return read_state(folder)
        except ArtifactError as error:
            on_damaged(str(error))
    return None
