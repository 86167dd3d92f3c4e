"""The known faults of fine-tuning, tried on PEFT, Transformers' Trainer and TRL. Makes the last column of docs/faults.md.

    python benchmarks/peer_faults              # all of them: about a quarter of an hour on a CPU
    python benchmarks/peer_faults A06 C12      # these

Each is tried as a user would run into it, on a random model of two layers, in a new process and folder, and the outcome is measured.
An exception counts as refused, a warning about the fault as warned; a wrong result with neither is silent. Outcomes go to
docs/measured/peer_faults.json, from which `make docs` makes the column.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import HEARD, HERE, TRIALS, Trial, judge

RESULTS = HERE.parents[1] / "docs" / "measured" / "peer_faults.json"
CHAPTERS = ("learning", "shaping", "comparing", "rows", "messages", "packing", "saving", "resuming", "merging", "supply")
PEERS = ("peft", "transformers", "trl")
NOT_TRIED = {
    "A28": "needs a GPU on which torch takes cuDNN for attention (H100, H200)",
    "A29": "needs a GPU: Accelerate refuses float16 training on a CPU",
    "B04": "TRL 1.16 has nothing any more that searches for an answer's marker",
}
"""Faults of tests/fault_catalogue.py that are not tried here, and why."""
LONGEST_S = 120


def trials() -> dict[str, Trial]:
    """Every trial, by the fault's name in the catalogue."""
    for chapter in CHAPTERS:
        importlib.import_module(chapter)
    return dict(sorted(TRIALS.items()))


def one(fault: str) -> None:
    """Try a fault in this process and the folder it runs in, and print what came of it as JSON."""
    result = judge(trials()[fault], Path.cwd())
    heard = dict.fromkeys(line for said in HEARD for line in said.splitlines() if line.strip())
    print("\n" + json.dumps(result | {"heard": list(heard)}))


def apart(fault: str) -> dict[str, Any]:
    """What comes of a fault in a process of its own; or the error that the trial itself ended with."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HOME": f"{folder}/home",
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        (Path(folder) / "work").mkdir()
        try:
            done = subprocess.run(
                [sys.executable, str(HERE), "one", fault], cwd=f"{folder}/work", env=environment, stdin=subprocess.DEVNULL,
                capture_output=True, text=True, timeout=LONGEST_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"error": f"no end after {LONGEST_S} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def keep(results: dict[str, dict[str, str]], known: dict[str, Trial]) -> None:
    """Put results beside those that are there, all at once: a file that is half written is never seen."""
    before = json.loads(RESULTS.read_text(encoding="utf-8"))["faults"] if RESULTS.exists() else {}
    faults = {key: value for key, value in sorted((before | results).items()) if key in known}
    versions = {peer: importlib.metadata.version(peer) for peer in PEERS}
    fresh = RESULTS.with_suffix(".new")
    kept = {"versions": versions, "faults": faults, "not_tried": NOT_TRIED}
    fresh.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    fresh.replace(RESULTS)


def main() -> int:
    if sys.argv[1:2] == ["one"]:
        one(sys.argv[2])
        return 0
    known = trials()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", metavar="ID", choices=[[], *known], help=f"one of {', '.join(known)}")
    failed = 0
    for fault in parser.parse_args().ids or known:
        result = apart(fault)
        if "error" in result:
            failed += 1
            print(f"{fault}: the trial failed: {result['error']}", flush=True)
            continue
        heard = result.pop("heard")
        keep({fault: result}, known)
        print(f"{fault} on {result['peer']}: {result['outcome']}: {result['words']}", flush=True)
        for said in heard:
            print(f"    heard: {said[:160]}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
