"""Tensors on disk: safetensors, and nothing else."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimtab.errors import ArtifactError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by their names. Raises ArtifactError."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ArtifactError(f"{path}: damaged: {error}. Restore it from a copy.") from None
