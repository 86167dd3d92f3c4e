"""Operations that give the same bits every time, on devices where the fast ones sum in whatever order their threads arrive."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trimtab.core.errors import RecipeError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""Of cuBLAS, which otherwise may use several workspaces, and another algorithm with each."""


@contextmanager
def deterministic(on: bool = True) -> Iterator[None]:
    """Within the block, PyTorch's deterministic algorithms, the slower backward pass of flash attention among them; then as before.

    Args:
        on: Without it, the block changes nothing.

    Raises:
        RecipeError: An operation has no such algorithm, or cuBLAS was started without a fixed workspace.
    """
    if not on:
        yield
        return
    if WORKSPACE not in os.environ and torch.cuda.is_initialized():
        raise RecipeError(
            f"train.deterministic: CUDA is in use by this process, without a fixed workspace for cuBLAS. Set {WORKSPACE}=:4096:8 "
            "before Python starts."
        )
    os.environ.setdefault(WORKSPACE, ":4096:8")
    settings: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark, settings.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    torch.backends.cudnn.benchmark = False
    settings.fill_uninitialized_memory = False  # a pass over each new tensor, of which none is read before it is written
    try:
        yield
    except RuntimeError as error:
        if "determinis" not in str(error):
            raise
        what = str(error).partition(" does not have")[0] if " does not have" in str(error) else "a matrix product by cuBLAS"
        raise RecipeError(
            f"train.deterministic: {what} has no deterministic algorithm here. Set it to false, or train without this operation."
        ) from error
    finally:
        torch.set_deterministic_debug_mode(before[0])
        torch.backends.cudnn.benchmark, settings.fill_uninitialized_memory = before[1:]
