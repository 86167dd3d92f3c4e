"""The time from the command to a run's first optimizer step, and its parts.

    python benchmarks/startup.py [RECIPE]

Measured with an empty cache folder (the model is converted, the C code compiled), then with a filled one. The run ends after its
first step. With the permission to do so, the system's file cache is emptied before the first run. Results go to docs/measured/startup.json.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from _timing import Marks, note

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "measured" / "startup.json"
PARTS = {
    "load": "run.start:Base.load", "packing check": "run.start:ensure_checked", "data": "run.start:load_data", "attach": "run.start:attach",
    "checks": "run.start:preflight", "plan": "run.start:memory_of",
}  # fmt: skip


def one(recipe: str, folder: str) -> None:
    """A run up to its first step, in this process; prints the start and end of each part in seconds since the command."""
    started = float(os.environ["STARTED"])
    marks: Marks = [("python", started, time.time())]
    before = time.time()
    from trimtab.run import script
    from trimtab.run.recipe import Recipe

    marks.append(("import", before, time.time()))
    note(PARTS, marks)
    train = script.train

    def first(*arguments: Any) -> Any:
        before = time.time()
        for _ in train(*arguments):
            marks.append(("first step", before, time.time()))
            print(json.dumps([(name, begin - started, end - started) for name, begin, end in marks]))
            sys.stdout.flush()
            os._exit(0)
        yield None

    script.train = first
    script.run_recipe(Recipe.read(Path(recipe), [f"output={folder}/run"]))


def main() -> None:
    recipe = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "demo" / "recipe.yaml")
    results = {}
    with tempfile.TemporaryDirectory() as cache:
        for what in ("cold", "warm"):
            if what == "cold":
                with suppress(OSError):
                    os.sync()
                    Path("/proc/sys/vm/drop_caches").write_text("3")
            with tempfile.TemporaryDirectory() as folder:
                environment = {**os.environ, "XDG_CACHE_HOME": cache, "STARTED": repr(time.time())}
                command = [sys.executable, __file__, "one", recipe, folder]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
            marks = json.loads(done.stdout.strip().splitlines()[-1])
            results[what] = {"in all": marks[-1][2], **{name: end - begin for name, begin, end in marks}}
            said = ", ".join(f"{name} {seconds:.2f}" for name, seconds in results[what].items())
            print(f"{what}: {said}  (load {os.getloadavg()[0]:.1f})", flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    one(*sys.argv[2:]) if sys.argv[1:2] == ["one"] else main()
