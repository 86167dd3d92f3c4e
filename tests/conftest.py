import os
import warnings

import pytest
import torch
from worlds import here, trimtab, world  # noqa: F401

import trimtab as package
from trimtab.engine.fused import kernels

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(max(1, (os.cpu_count() or 2) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(scope="session")
def smollm2():
    """The real model, SmolLM2-135M-Instruct; tests must leave it as they found it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = package.load("smollm2-135m-instruct")
    yield base
    base.check_unchanged()


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch):
    """The operations by hand: compiled, or in torch."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "_library", lambda: None)
    elif kernels._library() is None:
        pytest.skip("no C compiler here, so the torch versions are used")
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """What a model this small is computed on fastest, beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
