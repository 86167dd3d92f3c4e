"""Train on a disk that fails, then go on: LD_PRELOAD=SHIM python tests/failing_disk.py FOLDER [SHARE]

The folder holds a model and r.yaml; the shim is failing_disk.c. Each run is a process of its own, for whose n-th call that
writes (or for it and all that follow) the disk fails, for every n, or for one in SHARE; then it goes on with the run, while the
disk fails for another call, and then on a disk that works. Prints a line of JSON for each, which `test_failing_disk.py` reads.
"""

import ctypes
import errno
import json
import os
import sys
from pathlib import Path

import torch

from trimtab.core.errors import TrimtabError
from trimtab.run.recipe import Recipe
from trimtab.run.script import run_recipe

REASONS = (errno.ENOSPC, errno.EIO, errno.EACCES)
SHIM = ctypes.CDLL(None)


def main(folder: str, share: str = "1") -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    run_recipe(Recipe.read(Path("r.yaml"), ["output=spared"]))  # here, so that its children need not import anything
    at = 1
    while True:
        line = _tried(at, stays=bool(at // int(share) % 2))
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        if line["calls"] < at:
            break
        at += int(share)


def _tried(at: int, stays: bool) -> dict[str, object]:
    output = f"cut-{at}"
    first = _apart(output, at, stays)
    done = _is_done(output)
    again = [_apart(output, n, False) for n in (1 + at * 7 % 40, 0) if not _is_done(output)]
    return {"run": output, "stays": stays, **first, "done": done, "again": [(one["status"], one["said"]) for one in again]}


def _is_done(output: str) -> bool:
    path = Path(output) / "run.json"
    return path.is_file() and json.loads(path.read_text())["status"] == "done" and not (Path(output) / "states").exists()


def _apart(output: str, at: int, stays: bool) -> dict[str, object]:
    """Train in a process of its own; how it ended, what it said, which call failed and how many there were."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        said, status = "", 0
        (ctypes.c_char * 256).in_dll(SHIM, "disk_path").value = output.encode()
        ctypes.c_int.in_dll(SHIM, "disk_error").value = REASONS[at % 3]
        ctypes.c_int.in_dll(SHIM, "disk_stays").value = stays
        ctypes.c_long.in_dll(SHIM, "disk_at").value = at
        try:
            run_recipe(Recipe.read(Path("r.yaml"), [f"output={output}"]))
        except TrimtabError as error:
            said, status = str(error), error.exit_code
        except BaseException as error:
            said, status = repr(error), 99
        failed = (ctypes.c_char * 64).in_dll(SHIM, "disk_failed").value.decode()
        calls = ctypes.c_long.in_dll(SHIM, "disk_calls").value
        os.write(writing, json.dumps({"status": status, "said": said, "failed": failed, "calls": calls}).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = json.loads(pipe.read())
    os.waitpid(pid, 0)
    return told


if __name__ == "__main__":
    main(*sys.argv[1:])
