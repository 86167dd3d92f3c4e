"""Benchmarks that look inside a run still find what they name there."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

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
