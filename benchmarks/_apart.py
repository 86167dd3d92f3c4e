"""Shared by benchmarks: run something in a new process, and store its result."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.core.files import read_json, write_json

_KEEPING = threading.Lock()
"""Held while a result is written."""


def run_apart(script: str, asked: Callable[[Path], dict[str, Any]], jobs: int) -> dict[str, Any]:
    """What `script one ASKED.json` prints as its last line; or the error that it ended with.

    Args:
        asked: From a folder that the run may fill, and that is gone afterwards, to what the script finds in ASKED.json.
        jobs: How many runs there are at a time: each has its share of the cores.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "asked.json"
        path.write_text(json.dumps(asked(Path(folder))))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, script, "one", str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["?"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def keep(results: Path, kind: str, word: str, key: str, result: dict[str, Any]) -> None:
    """Add a result to a file of them, and print it."""
    with _KEEPING:
        known = read_json(results) if results.exists() else {}
        known.setdefault(kind, {}).setdefault(word, {})[key] = result
        write_json(results, known)
        shown = {k: round(v, 5) if isinstance(v, float) else v for k, v in result.items()}
        print(f"{kind} {word} {key}: {json.dumps(shown)}", flush=True)
