"""benchmarks/gpu.py before there is a GPU: its parts on tiny shapes, and what it does when one fails or there is no time."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gpu
import pytest
import torch
from on_gpu import parts, right, training
from on_gpu.machine import Machine

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def machine(tmp_path):
    return Machine.found("cpu", True, math.inf, tmp_path)


def lines(folder):
    return [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


def asked(folder, *only, until=math.inf):
    return SimpleNamespace(only=only, until=until, out=folder, tiny=True, device="cpu")


def test_there_is_a_function_for_every_part():
    assert parts.NAMES.keys() == gpu.PARTS.keys()
    assert all(callable(getattr(parts, name)) for name in parts.NAMES.values())
    assert sum(gpu.PARTS.values()) <= 9 * 60


def test_small_parts_say_what_they_found(tmp_path):
    assert gpu._run(asked(tmp_path, "ceilings", "passes", "trap", "micro")) == 0
    ceilings, passes, trap, micro = lines(tmp_path)
    assert min(*ceilings["tflops"].values(), ceilings["copy_tb_per_s"]) > 0
    assert max(apart for case in passes["distances"].values() for apart in case.values()) < 4e-3
    assert trap["nan_as_trimtab_calls_it"] == 0
    assert min(case["both_ms"] for case in micro["attention"].values()) > 0
    assert micro["head"].keys() == {"ours_us", "logits_us"}


def test_layers_by_hand_are_about_as_near_to_float64_as_transformers(machine, monkeypatch):
    monkeypatch.setattr(right, "FAMILIES", {"Qwen2": {}})
    exact = right.layers(machine, "layers")["Qwen2"]
    assert max(exact[what]["ratio"] for what in ("logprobs", "gradients")) < 2
    computed = right.pack_logprobs
    monkeypatch.setattr(right, "pack_logprobs", lambda *given: 1.01 * computed(*given))
    assert right.layers(machine, "layers")["Qwen2"]["logprobs"]["ratio"] > 10
    assert right.distance(torch.tensor([math.nan]), torch.ones(1)) == math.inf


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's use of Transformers
def test_trimtab_and_peft_train_the_same(machine, monkeypatch):
    monkeypatch.setattr(training, "TINY", training.TINY[:1])
    monkeypatch.setattr(training, "WARM", 1)
    monkeypatch.setattr(training, "PEERS", {"PEFT": {}, "PEFT and Liger": {"liger": True}})
    (ours,) = (found for found in training.ours(machine, "1.5B ours").values() if isinstance(found, dict) and "losses" in found)
    peers = training.peers(machine, "1.5B peers")
    theirs = peers["PEFT: chat, 8 rows"]
    assert "liger_kernel" in peers["PEFT and Liger: chat, 8 rows"]["error"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=2e-4)
    assert len({round(loss, 4) for loss in ours["losses"]}) == 3
    assert min(found["tokens_per_s"] for found in (ours, theirs)) > 0


def test_a_part_that_fails_is_said_and_a_broken_device_ends_the_process(tmp_path, monkeypatch):
    def failing(message):
        def part(*_):
            raise RuntimeError(message)

        return part

    monkeypatch.setattr(parts, "trap", failing("no such thing"))
    monkeypatch.setattr(parts, "micro", failing("CUDA error: an illegal memory access was encountered"))
    assert gpu._run(asked(tmp_path, "trap", "ceilings", "micro", "passes")) == gpu.BROKEN
    said = lines(tmp_path)
    assert [line["part"] for line in said] == ["trap", "ceilings", "micro"]
    assert said[0]["error"] == "RuntimeError: no such thing"


def test_parts_without_time_are_skipped_and_said(tmp_path):
    command = [sys.executable, str(Path(gpu.__file__)), "--out", str(tmp_path / "out"), "--minutes", "0"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert [line["part"] for line in lines(tmp_path / "out")] == list(gpu.PARTS)
    assert all("are left for it" in line["skipped"] for line in lines(tmp_path / "out"))
