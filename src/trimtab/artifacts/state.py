"""Where training stands, on disk: a folder for each step that was saved, from which a run goes on as if nothing had happened.

`state.safetensors` holds the tensors; `state.json`, written last, the step, what the run knows of itself, a SHA-256 of the
tensors' file and one over all of that.
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
    """Where training stood after a step."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    """JSON data."""


def write_state(states: Path, state: State) -> Path:
    """Write a new folder in `states`, whole or not at all, and read it back. Raises StorageError, or ArtifactError for a bad disk."""
    folder = states / f"step-{state.step:06d}"
    if folder.exists():  # of a run that went on from an earlier one
        files.remove_folder(folder)
    with files.new_folder(folder) as new:
        write_tensors(new / TENSORS, state.tensors)
        digest = files.sha256_file(new / TENSORS)  # before it is compared: what differs then or later is noticed
        if changed := changed_tensor(new / TENSORS, state.tensors):
            raise ArtifactError(f"{folder / TENSORS}: {changed} is not what was written. The disk is bad.")
        files.write_manifest(new / MANIFEST, FORMAT, {"step": state.step, "facts": state.facts, "tensors": digest})
    _manifest(folder)
    return folder


def read_state(folder: Path) -> State:
    """Raises ArtifactError if it is not what was written."""
    manifest = _manifest(folder)
    return State(manifest["step"], read_tensors(folder / TENSORS), manifest["facts"])


def _manifest(folder: Path) -> dict[str, Any]:
    """What state.json says, if it and the tensors' file are what was written. Raises ArtifactError."""
    manifest = files.read_manifest(folder / MANIFEST, FORMAT, KEYS)
    if not (folder / TENSORS).is_file() or files.sha256_file(folder / TENSORS) != manifest["tensors"]:
        raise ArtifactError(f"{folder / TENSORS}: is missing, or changed since it was saved.")
    return manifest


def saved_states(states: Path) -> list[Path]:
    """The folders of states, the newest first."""
    return sorted(states.glob("step-*"), reverse=True)


def newest_state(states: Path, damaged: Callable[[str], None]) -> State | None:
    """The newest one that is whole; `damaged` is told of each newer one."""
    for folder in saved_states(states):
        try:
            return read_state(folder)
        except ArtifactError as error:
            damaged(str(error))
    return None
