"""The cost of a run's guards: python benchmarks/guards.py [RECIPE]

Runs the recipe (by default the demo's) in a new process, without its certificate, and prints how many seconds each
guard takes. Results go to docs/measured/guards.json.
"""

import json
import os
import sys
import time
from pathlib import Path

from _apart import run_apart
from _timing import Marks, note

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "measured" / "guards.json"
GUARDS = {
    "checks of the data": "run.start:preflight",
    "packed equals unpacked": "run.start:ensure_checked",
    "hash of the base model, before (in parallel with reading the data)": "base.fingerprint:weights_hash",
    "hash of the base model, after": "base.model:Base.check_unchanged",
    "which tensors training has moved": "run.script:Optimizer.digests",
    "NaN or Inf in what is saved": "run.checkpoints:Optimizer.not_finite",
    "log-probabilities of the canaries": "run.checkpoints:Checkpointer.score_canaries",
}
BESIDES = {"the states to resume from": "run.checkpoints:write_state"}
"""Not guards: what it costs to be able to resume."""


def one(path: str) -> None:
    """Run a recipe in this process, and print the seconds that it and its guards took as JSON."""
    started, marks = time.time(), Marks()
    from trimtab.run.recipe import Recipe
    from trimtab.run.script import run_recipe

    asked = json.loads(Path(path).read_text())
    note(GUARDS | BESIDES, marks)
    run = run_recipe(Recipe.read(Path(asked["recipe"]), [f"output={asked['folder']}/run", "certify=false"]))
    seconds = time.time() - started
    of = {name: [end - begin for known, begin, end in marks if known == name] for name in GUARDS | BESIDES}
    spent = {name: {"times": len(each), "seconds": sum(each)} for name, each in of.items()}
    kinds = {"guards": {name: spent[name] for name in GUARDS}, "besides": {name: spent[name] for name in BESIDES}}
    print(json.dumps({"seconds": seconds, "steps": run.record["steps"], **kinds}))


def main() -> None:
    from trimtab.core.files import write_json

    recipe = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "demo" / "recipe.yaml")
    result = run_apart(__file__, lambda folder: {"recipe": recipe, "folder": str(folder)}, 1)
    if "error" in result:
        sys.exit(result["error"])
    for name, guard in (result["guards"] | result["besides"]).items():
        print(f"{name}: {guard['seconds']:.2f} s in {guard['times']} calls, {guard['seconds'] / result['seconds']:.2%}")
    spent = sum(guard["seconds"] for guard in result["guards"].values())
    print(
        f"all guards {spent:.2f} of {result['seconds']:.1f} s, {spent / result['seconds']:.2%}  (load {os.getloadavg()[0]:.1f})"
    )
    write_json(RESULTS, result)


if __name__ == "__main__":
    one(sys.argv[2]) if sys.argv[1:2] == ["one"] else main()
