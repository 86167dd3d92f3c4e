"""Benchmarks that look inside a run still find what they name there."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from trimtab.methods import LearningRateContext, Method

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def last_line(script, *words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STARTED": repr(time.time())}
    command = [sys.executable, str(BENCHMARKS / script), "one", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_part_of_the_start_is_seen(here):
    parts = [name for name, _, _ in last_line("startup.py", "r.yaml", "new")]
    assert parts == ["python", "import", "load", "packing check", "data", "attach", "checks", "plan", "first step"]


def test_every_guard_is_seen(here):
    (here / "asked.json").write_text(json.dumps({"recipe": "r.yaml", "folder": "new"}))
    found = last_line("guards.py", "asked.json")
    assert [name for name, guard in (found["guards"] | found["besides"]).items() if not guard["times"]] == []


def regret():
    spec = importlib.util.spec_from_file_location("regret", BENCHMARKS / "regret.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["regret"] = module
    spec.loader.exec_module(module)
    return module


MODEL = SimpleNamespace(model_type="llama", hidden_size=2000, get_text_config=lambda: MODEL)


def tried(lr, sums, **more):
    cell = {
        "model": "m",
        "task": "t",
        "size": 100,
        "objective": "sft",
        "method": "lora",
        "seed": 0,
        "epochs": 2.0,
        "rows_per_step": 4,
    }
    return cell | {"lr": lr, "loss": sum(sums) / 6, "sums": sums, "counts": [1, 2, 3]} | more


def test_the_regret_is_of_todays_default_against_the_best_that_was_tried(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    table, default = regret().table, tried(5e-4, [2.0, 2.0, 2.0])
    *_, line = table([default, tried(1e-3, [1.0, 2.0, 2.0]), tried(1e-3, [0.5, 0.5, 0.5], task="other")], MODEL).splitlines()
    assert line == "| t | 100 | sft | `lora` | 0.0005, 2 × 4: 1 | 0.001, 2 × 4: 0.8333 (of 2) | 20.0% | 0.0% to 120.0% |"
    *_, line = table([default, tried(1e-3, [3.0, 2.0, 2.0])], MODEL).splitlines()
    assert "| 0.0% |" in line  # the default is the best
    assert "100" not in table([tried(4e-4, [1.0, 2.0, 2.0]), tried(1e-3, [1.0, 1.0, 1.0])], MODEL)  # no default was measured
    assert "100" not in table([default, tried(1e-3, [1.0, 1.0, 1.0]) | {"error": "NaN"}], MODEL)


@pytest.mark.parametrize(
    ("method", "rows", "rate", "rule"),
    [
        ("lora", 4, 5e-4, "5e-4·(2000/2000)^0.781, at most 2e-3"),
        ("lora", 16, 5e-4, "5e-4·(2000/2000)^0.781, at most 2e-3"),
        ("oft", 4, 2.5e-4, "1e-3·(4 examples per step/16), at most 1e-3"),
        ("prefix", 4, 2.5e-4, "1e-3·(4 examples per step/16), at most 1e-3"),
        ("oft", 64, 1e-3, "1e-3·(64 examples per step/16), at most 1e-3"),
        ("bitfit", 8, 5e-3, "1e-2·(8 examples per step/16), at most 1e-2"),
        ("miss", 4, 3e-4, "the best of a search for miss"),
    ],
)
def test_the_learning_rates_rule_says_what_it_depends_on(method, rows, rate, rule):
    assert Method.member(method)().learning_rate(LearningRateContext("llama", 2000, rows)) == (rate, rule)


def test_other_families_have_a_rate_of_their_own():
    assert Method.member("dora")().learning_rate(LearningRateContext("gemma", 640, 4)) == (3e-4, "3e-4 for this architecture")
