import os
import warnings

import pytest
import torch

import trimtab

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(max(1, (os.cpu_count() or 2) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(scope="session")
def smollm2():
    """The real model, SmolLM2-135M-Instruct; tests must leave it as they found it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = trimtab.load("smollm2-135m-instruct")
    yield base
    base.check_unchanged()
