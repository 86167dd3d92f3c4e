"""`deterministic()`: modes are set within the block alone, and what cannot be had is refused by name."""

import os

import pytest
import torch

from trimtab.core import determinism
from trimtab.core.determinism import deterministic
from trimtab.core.errors import RecipeError


def modes():
    filling = torch.utils.deterministic.fill_uninitialized_memory
    return torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark, filling


def test_modes_are_set_within_the_block_alone(monkeypatch):
    monkeypatch.delenv(determinism.WORKSPACE, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = modes()
    with deterministic(False):
        assert modes() == before
        assert determinism.WORKSPACE not in os.environ
    with deterministic():
        assert modes() == (2, False, False)
        assert os.environ[determinism.WORKSPACE] == ":4096:8"
        with deterministic():
            assert modes() == (2, False, False)
        assert modes() == (2, False, False)
    assert modes() == before
    with pytest.raises(ValueError, match="else"), deterministic():
        raise ValueError("something else")
    assert modes() == before


def test_other_errors_stay_as_they_are():
    with pytest.raises(RuntimeError, match="size of tensor"), deterministic():
        torch.ones(2) + torch.ones(3)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_process_that_has_used_cublas_without_a_fixed_workspace_is_refused(monkeypatch):
    """PyTorch reads the variable once, at its first matrix product."""
    monkeypatch.delenv(determinism.WORKSPACE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RecipeError, match="Set CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts"), deterministic():
        pass
    monkeypatch.setenv(determinism.WORKSPACE, ":16:8")
    with deterministic():
        assert os.environ[determinism.WORKSPACE] == ":16:8"


def test_what_cublas_refuses_is_said():
    with pytest.raises(RecipeError, match=r"train\.deterministic: a matrix product by cuBLAS"), deterministic():
        raise RuntimeError(
            "Deterministic behavior was enabled with …, but this operation is not deterministic because it uses CuBLAS"
        )
