"""A process of ours tells the libraries what they read as they are imported, and a user's own word stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.core.process import ALLOCATOR, OPENMP_WAIT, environment

NAMES = (*OPENMP_WAIT, "KMP_BLOCKTIME")
OURS = " ".join(OPENMP_WAIT.values())

NOTES = """
import os, sys
def hook(event, args):
    if event == "import" and args[0] == "torch" and "torch" not in sys.modules:
        with open(os.environ["NOTES"], "a") as file:
            file.write(" ".join(os.environ.get(name, "unset") for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")) + "\\n")
sys.addaudithook(hook)
"""
"""Writes down what OpenMP would be told, in each process, at the moment before torch is imported."""
LIBRARY = """
import torch
from trimtab.certify import certificate
from trimtab.core.errors import NotCertified
try:
    certificate._measure_in_new_process({"folder": "nowhere", "model": None})
except NotCertified:
    pass
"""


@pytest.fixture
def noted(here):
    """Runs Python in the world, with an environment that says nothing of waiting but what is given."""
    (here / "sitecustomize.py").write_text(NOTES)
    plain = {name: value for name, value in os.environ.items() if name not in NAMES}
    found = os.pathsep.join([str(here), *filter(None, [plain.get("PYTHONPATH")])])
    plain |= {"OMP_NUM_THREADS": "1", "NOTES": "notes.txt", "PYTHONPATH": found}

    def run(*words, **given):
        done = subprocess.run([sys.executable, *words], env=plain | given, capture_output=True, text=True, check=True)
        return Path("notes.txt").read_text().splitlines(), done.stderr

    return run


def test_threads_soon_sleep_while_they_wait_in_a_command_and_in_its_certificates_process(noted):
    words = ("-m", "trimtab", "train", "r.yaml", "output=new", "certify=true", "train.epochs=4")
    at_import, said = noted(*words, OMP_DISPLAY_ENV="verbose")
    assert at_import == [OURS, OURS]
    assert said.count("OMP_WAIT_POLICY = 'PASSIVE'") == 1, "torch and the compiled operations share one OpenMP"
    assert said.count("GOMP_SPINCOUNT = '1000'") == 1


def test_a_process_that_imported_torch_before_is_left_alone_and_its_certificates_is_not(noted):
    """The negative control, too: this is what a command's own process would be like."""
    assert noted("-c", LIBRARY)[0] == ["unset unset", OURS]


def test_what_the_user_says_of_waiting_stays(noted):
    assert noted("-m", "trimtab", "methods", "tiny", OMP_WAIT_POLICY="active")[0] == ["active unset"]


@pytest.mark.parametrize("name", NAMES)
def test_one_word_of_the_users_about_waiting_is_enough(name, monkeypatch):
    for other in NAMES:
        monkeypatch.delenv(other, raising=False)
    assert OPENMP_WAIT.items() <= environment().items()
    monkeypatch.setenv(name, "7")
    assert {key: value for key, value in environment().items() if key in NAMES} == {name: "7"}
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    assert environment()["TRANSFORMERS_VERBOSITY"] == "info"


@pytest.mark.parametrize("name", [None, *ALLOCATOR])
def test_the_allocator_of_a_device_grows_its_segments_unless_a_user_says_something_of_it(name, monkeypatch):
    for other in ALLOCATOR:
        monkeypatch.delenv(other, raising=False)
    if name is not None:
        monkeypatch.setenv(name, "max_split_size_mb:64")
    given = {other: value for other, value in environment().items() if other in ALLOCATOR}
    ours = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if sys.platform == "linux" else {}
    assert given == ({name: "max_split_size_mb:64"} if name is not None else ours)
