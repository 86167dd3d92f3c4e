import os
import signal
import warnings

import pytest
import torch
from worlds import here, trimtab, world  # noqa: F401

import trimtab as package
from trimtab.engine.backends import cpu
from trimtab.engine.backends import torch as torch_backend

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would what tests start
torch.set_num_threads(max(1, (os.cpu_count() or 2) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(scope="session")
def smollm2():
    """The real model, SmolLM2-135M-Instruct; tests must leave it as they found it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = package.load("smollm2-135m-instruct")
    yield base
    base.check_unchanged()


@pytest.fixture(params=[cpu, torch_backend], ids=["cpu", "torch"])
def backend(request, monkeypatch):
    """A back end, which computes whatever it supports within the test."""
    if request.param is torch_backend:
        monkeypatch.setattr(cpu, "load_library", lambda: None)
    elif cpu.load_library() is None:
        pytest.skip("no C compiler here, so the torch back end computes")
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """What a model this small is computed on fastest, beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
