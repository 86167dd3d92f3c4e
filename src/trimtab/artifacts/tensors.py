"""Tensors on disk, in safetensors files."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimtab.core.errors import ArtifactError


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file. Raises the exceptions of safetensors: call it within `files.storage_errors`.

    Raises:
        ArtifactError: A tensor has no numbers, or those of one process alone: a share of it would be read back as all there is.
    """
    for name, tensor in tensors.items():
        if not tensor.numel() or type(tensor.detach()) is not Tensor:
            raise ArtifactError(
                f"{path.name}: {name} ({type(tensor).__name__}, shape {tuple(tensor.shape)}) is not whole on this process, and is not saved. "
                "This is a fault of the engine that divides weights between processes."
            )
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name. Raises ArtifactError."""
    with _open(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def changed_tensor(path: Path, tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that differs from the one in `path` in any bit, if any does. Raises ArtifactError."""
    for name, tensor in tensors.items():
        with _open(path) as file:  # reopened for each, as tensors read stay in memory while it is open
            read = file.get_tensor(name)
        if (read.shape, read.dtype) != (tensor.shape, tensor.dtype) or not torch.equal(_bytes(read), _bytes(tensor)):
            return name
    return None


def sha256_tensor(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values, as hex."""
    return hashlib.sha256(_bytes(tensor).numpy().data).hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ArtifactError(f"{path}: damaged: {error}. Restore it from a copy.") from None
