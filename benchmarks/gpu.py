"""One call of at most 9 minutes on a machine with a GPU and no network: is it exact there, how fast is it, and how fast are peers?

    make gpu-deps                                        # beforehand, where there is a network: wheels that the machine lacks
    python3 -m pip install --no-index --no-deps --target deps .gpu-deps/*.whl
    PYTHONPATH=deps:src python3 benchmarks/gpu.py --out OUT --minutes 9

Models have random weights, made on the device. Every part prints one line of JSON, and adds it to OUT/gpu.jsonl; one that fails
says why, and the others go on: in a new process, if it has broken the device's state. Parts for which no time is left are skipped,
and say so. `--tiny` runs all of it on small shapes, on a CPU too: for a look before the machine is there.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

PARTS = {  # in order of worth: seconds that each takes, about
    "probe": 15, "ceilings": 15, "attention": 25, "passes": 10, "layers": 30, "trap": 5, "deterministic": 15, "micro": 45,
    "1.5B ours": 70, "1.5B peers": 80, "7B ours": 70, "7B peers": 90, "profile": 25, "decoding": 20,
}  # fmt: skip
BROKEN = 70
"""The exit code of a process whose device computes no more."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder for gpu.jsonl")
    parser.add_argument("--minutes", type=float, default=9.0, help="after so many it ends (default: 9)")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--device", help="unless given, the accelerator, or else the CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # given to the processes that run the parts
    words = parser.parse_args()
    if words.until is not None:
        return _run(words)
    words.out.mkdir(parents=True, exist_ok=True)
    lines, until = words.out / "gpu.jsonl", time.time() + 60 * words.minutes
    left = list(words.only)
    while left:
        options = [*(["--tiny"] if words.tiny else []), *(["--device", words.device] if words.device else [])]
        command = [sys.executable, __file__, "--out", str(words.out), "--until", repr(until), *options, "--only", *left]
        child = subprocess.Popen(command, env={**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"})  # for `deterministic`
        try:
            child.wait(timeout=max(1.0, until + 10 - time.time()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        said = {json.loads(line)["part"] for line in lines.read_text().splitlines()} if lines.exists() else set()
        rest = [name for name in left if name not in said]
        if rest and child.returncode == 1:  # nothing can be imported, say
            for name in rest:
                _say(lines, {"part": name, "error": "its process could not begin: see what it printed"})
            rest = []
        elif rest and child.returncode != BROKEN:
            _say(lines, {"part": rest.pop(0), "error": f"its process ended with exit code {child.returncode}"})
        left = rest
    return 0


def _run(words: argparse.Namespace) -> int:
    """The parts in this process, until one breaks the device."""
    for name in words.only:
        started = time.time()
        if started + (0 if words.tiny else PARTS[name]) > words.until:
            _say(words.out / "gpu.jsonl", {"part": name, "skipped": f"{words.until - started:.0f} s are left for it"})
            continue
        from on_gpu import parts  # which imports torch
        from on_gpu.machine import Machine

        until = words.until if words.tiny else min(words.until, started + 1.25 * PARTS[name])
        machine = Machine.found(words.device, words.tiny, until, words.out)
        try:
            found = getattr(parts, parts.NAMES[name])(machine, name)
        except Exception as error:  # whatever it is, the other parts go on
            found = {"error": f"{type(error).__name__}: {error}"[:1000]}
        broken = "error" in found and "CUDA error" in found["error"]
        _say(words.out / "gpu.jsonl", {"part": name, "seconds": round(time.time() - started, 1), **found})
        if broken:
            return BROKEN
        machine.clear()
    return 0


def _say(lines: Path, found: dict) -> None:
    line = json.dumps(found)
    print(line, flush=True)
    with lines.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
