"""Kill training at random moments, for real, and go on with it each time: python tests/kills.py FOLDER KILLS SEED

The folder holds a model, examples and r.yaml. Each run is a process that is killed (SIGKILL) again and again, until one is left alone or
faster; and there are runs until there have been so many kills. Prints a line of JSON for each kill and each end, which
`test_resume.py` and `make soak` read.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from trimtab.core.errors import TrimtabError
from trimtab.report import RunObserver
from trimtab.run.recipe import Recipe
from trimtab.run.script import run_recipe

_FIRST = """\
model: tiny
data: {train: rows.jsonl, eval: 4}
method: {rank: 2, dropout: 0.2}
train: {epochs: 2, rows_per_step: 4, lr: 2e-2, evaluate_every: 1}
output: run
certify: false
"""
_MIXTURE = "{train: {few: {path: few.jsonl, weight: 2}, many: {path: rows.jsonl, weight: 1, limit: 20}}, eval: 4, seed: 3}"
FEW = [{"prompt": f"What is {n}?", "completion": "a number"} for n in range(7)]
TEXTS = [{"text": f"Is {n} a number? yes " * (n % 5 + 1)} for n in range(20)]
FILES = {"few.jsonl": FEW, "texts.jsonl": TEXTS}
"""What recipes train on beside rows.jsonl."""
RECIPES = {
    "every step is evaluated and saved": _FIRST,
    "saved oftener than evaluated, one checkpoint": _FIRST.replace(
        "evaluate_every: 1", "evaluate_every: 3, save_every: 2, keep: 1"
    ),
    "evaluated oftener than saved, three checkpoints": _FIRST.replace(
        "evaluate_every: 1", "evaluate_every: 2, save_every: 5, keep: 3"
    ),
    "stops early": _FIRST.replace(
        "2e-2, evaluate_every: 1",
        "1e-6, schedule: constant, evaluate_every: 2, save_every: 1, patience: 3, min_improvement: 0.5",
    ),
    "max_steps, wsd": _FIRST.replace(
        "epochs: 2", "max_steps: 11, schedule: wsd, warmup: 2, decay: 4, floor: 0.1, save_every: 1"
    ),
    "a mixture": _FIRST.replace("{train: rows.jsonl, eval: 4}", _MIXTURE),
    "muon": _FIRST.replace("epochs: 2", "epochs: 2, optimizer: muon, weight_decay: 0.01, save_every: 2"),
    "adafactor": _FIRST.replace(
        "epochs: 2", "epochs: 2, optimizer: adafactor, schedule: inverse_sqrt, warmup: 3, save_every: 2"
    ),
    "noise, tokens a step": _FIRST.replace("rows_per_step: 4", "tokens_per_step: 60, neftune: 5, save_every: 2"),
    "a corpus": _FIRST.replace(
        "{train: rows.jsonl, eval: 4}", "{train: texts.jsonl, corpus: true, max_length: 24, eval: 2}"
    ).replace("evaluate_every: 1", "evaluate_every: 3, save_every: 1"),
}
"""Recipes by what is saved with them; each is killed."""
RECIPES["nearly all of it"] = (
    RECIPES["a mixture"]
    .replace(
        "epochs: 2",
        "max_steps: 12, optimizer: muon, schedule: wsd, decay: 0.5, neftune: 5, patience: 4, save_every: 2, keep: 1",
    )
    .replace("evaluate_every: 1", "evaluate_every: 3")
)


def main(folder: str, kills: str, seed: str) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    draw = random.Random(int(seed))
    started = time.monotonic()
    watch = Begun(None)
    run_recipe(Recipe.read(Path("r.yaml"), ["output=spared"]), watch)  # here, so that its children need not import anything
    whole = time.monotonic() - (watch.at or started)
    total, number = 0, -1
    while total < int(kills):
        output, mine, number = f"run-{number + 1}", 0, number + 1
        while True:
            status = _until(output, draw.uniform(0, 0.35 * whole) if mine < 12 else 1e9)
            mine += status == -signal.SIGKILL
            total += status == -signal.SIGKILL
            sys.stdout.write(json.dumps({"run": output, "status": status, **_stands(Path(output))}) + "\n")
            sys.stdout.flush()
            if status != -signal.SIGKILL or _is_done(Path(output)):  # it may have been killed after its end
                break


class Begun(RunObserver):
    """Tells a pipe that a run begins to write."""

    def __init__(self, pipe: int | None) -> None:
        self.pipe, self.at = pipe, 0.0

    def on_plan(self, *_: object) -> None:
        self.at = time.monotonic()
        if self.pipe is not None:
            os.write(self.pipe, b".")


def _until(output: str, seconds: float) -> int:
    """Train in a process that is killed so long after it has begun to write; how it ended: 0, or the signal as a negative number."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            run_recipe(Recipe.read(Path("r.yaml"), [f"output={output}"]), Begun(writing))
        except TrimtabError as error:
            sys.stderr.write(f"{error}\n")
            sys.stderr.flush()
            os._exit(error.exit_code)
        os._exit(0)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _is_done(output: Path) -> bool:
    return (output / "run.json").is_file() and json.loads((output / "run.json").read_text())["status"] == "done"


def _stands(output: Path) -> dict[str, int]:
    """The last step that was logged, and the newest that was saved."""
    log = output / "metrics.jsonl"
    lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")] if log.exists() else []
    saved = [int(path.name.removeprefix("step-")) for path in (output / "states").glob("step-*")]
    if _is_done(output):
        return {"logged": 0, "saved": 0}
    return {"logged": max((json.loads(line)["step"] for line in lines), default=0), "saved": max(saved, default=0)}


if __name__ == "__main__":
    main(*sys.argv[1:])
