"""How long a run takes from the command to its first optimizer step, and where the time goes.

    python benchmarks/startup.py [RECIPE]

With an empty cache folder (the model is converted, the C code compiled), then twice with a full one. The run ends after its
first step. Where this may, the system's file cache is emptied before the first.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PARTS = {"load": "preflight.Base.load", "check": "preflight.check_packing", "data": "preflight.load_data", "attach": "preflight.attach",
         "proof": "run.preflight", "plan": "run.planned_memory"}  # fmt: skip


def one(recipe: str, folder: str) -> None:
    """A run up to its first step, in this process; prints seconds since the command for each part's start and end."""
    started = float(os.environ["STARTED"])
    marks: list[tuple[str, float, float]] = [("python", started, time.time())]
    before = time.time()
    from trimtab import preflight, run
    from trimtab.config import read
    from trimtab.recipe import Recipe

    marks.append(("import", before, time.time()))

    def timed(name: str, function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            before = time.time()
            result = function(*arguments, **named)
            marks.append((name, before, time.time()))
            return result

        return call

    for name, where in PARTS.items():
        *owners, attribute = where.split(".")
        place = functools.reduce(getattr, owners[1:], {"run": run, "preflight": preflight}[owners[0]])
        setattr(place, attribute, timed(name, getattr(place, attribute)))
    train = run.train

    def first(*arguments: Any) -> Any:
        before = time.time()
        for _ in train(*arguments):
            marks.append(("first step", before, time.time()))
            print(json.dumps([(name, begin - started, end - started) for name, begin, end in marks]))
            sys.stdout.flush()
            os._exit(0)
        yield None

    run.train = first
    run.run_recipe(read(Recipe, Path(recipe), [f"output={folder}/run"]))


def main() -> None:
    recipe = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "demo" / "recipe.yaml")
    with tempfile.TemporaryDirectory() as cache:
        for what in ("cold", "warm", "warm again"):
            if what == "cold":
                with suppress(OSError):
                    os.sync()
                    Path("/proc/sys/vm/drop_caches").write_text("3")
            with tempfile.TemporaryDirectory() as folder:
                environment = {**os.environ, "XDG_CACHE_HOME": cache, "STARTED": repr(time.time())}
                command = [sys.executable, __file__, "one", recipe, folder]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
            marks = json.loads(done.stdout.strip().splitlines()[-1])
            parts = ", ".join(f"{name} {end - begin:.2f}" for name, begin, end in marks)
            print(f"{what}: {marks[-1][2]:.2f} s to the first step taken: {parts}  (load {os.getloadavg()[0]:.1f})", flush=True)


if __name__ == "__main__":
    one(*sys.argv[2:]) if sys.argv[1:2] == ["one"] else main()
