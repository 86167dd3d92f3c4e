"""Triton's kernels without a GPU: interpreted on the CPU, against float64, and compiled for cards that are not here."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from trimtab.core.process import environment

HERE = Path(__file__).parent
BESIDE = Path(sys.prefix) / "triton"
"""Where `make setup` puts Triton, which does not come with PyTorch for CPUs: libraries that find it would change what they do."""


def problems(script, *arguments, tmp_path):
    if find_spec("triton") is None and not (BESIDE / "triton").is_dir():
        pytest.skip("Triton is not installed: make setup")
    paths = os.pathsep.join([str(HERE.parent / "src"), str(HERE), str(BESIDE)])
    own = {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments], capture_output=True, text=True, env=environment() | own, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kernels_are_the_exact_numbers_rounded_once_and_planted_faults_are_found(tmp_path):
    found = problems("interpreted.py", tmp_path=tmp_path)
    assert len(found) == 5 * 3 + 5 + 4
    assert {name: problem for name, problem in found.items() if problem} == {}


def test_kernels_compile_once_for_packs_of_all_sizes_and_keep_their_numbers_in_registers(tmp_path):
    found = problems("compiled.py", "90", tmp_path=tmp_path)
    assert len(found) == 12
    assert {name: problem for name, problem in found.items() if problem} == {}
