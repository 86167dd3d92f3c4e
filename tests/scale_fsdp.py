"""The whole matrix of tests/test_fsdp.py, for `make scale`: every method, families of models, three processes, unequal passes."""

import pytest
from families import FAMILIES
from kinds import KINDS
from sharded import run_group
from test_fsdp import check_equal, trained

from trimtab.distributed.fsdp import REFUSED
from trimtab.methods import Method

METHODS = [name for name in Method.names() if name not in REFUSED]
"""The folder's: a new method is compared here, or refused by name."""


@pytest.fixture(scope="module")
def by_method(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    return *trained([{"method": name, "moved": True, "dtype": "float64"} for name in METHODS], folder), folder


@pytest.mark.parametrize("number", range(len(METHODS)), ids=METHODS)
def test_every_method_in_float64(number, by_method):
    check_equal(*by_method, number, 1e-10, 1e-9)


MODELS = [*FAMILIES, *KINDS]


@pytest.fixture(scope="module")
def by_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return *trained([{"family": name, "steps": 4} for name in MODELS], folder), folder


@pytest.mark.parametrize("number", range(len(MODELS)), ids=MODELS)
def test_every_kind_of_model(number, by_model):
    check_equal(*by_model, number)


OBJECTIVES = [{"objective": name, "family": family} for name in ("sft", "dpo", "kto") for family in ("llama", "llama-tied")]


@pytest.fixture(scope="module")
def by_objective(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objectives")
    return *trained(OBJECTIVES, folder, size=3), folder


@pytest.mark.parametrize("number", range(len(OBJECTIVES)), ids=map(str, OBJECTIVES))
def test_three_processes(number, by_objective):
    check_equal(*by_objective, number)


def test_unequal_passes_end_by_an_error_and_do_not_hang():
    results = run_group([{"engine": "fsdp", "steps": 2, "broken": "passes", "seconds": 6}], 2, timeout=120)
    assert all(isinstance(result, str) for result in results)
    assert "RuntimeError" in results[0]
