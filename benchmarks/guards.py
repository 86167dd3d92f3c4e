"""What a run's guards cost: python benchmarks/guards.py [RECIPE]

Carries the recipe out (the demo's, unless given) in a process of its own, without its certificate, and says how many seconds of
it each guard takes. Results go to docs/measured/guards.json.
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
    "the data's proof": "run:preflight",
    "whether packing changes anything": "preflight:check_packing",
    "a hash of the base, before (beside reading the data)": "base.fingerprint:weights_hash",
    "a hash of the base, afterwards": "base.model:Base.check_unchanged",
    "what training has moved": "run:Optimizer.digests",
    "whether values are numbers, before they are saved": "saving:Optimizer.not_finite",
    "rows by which the adapter is recognized": "run:_seen",
}
BESIDES = {"all that the run goes on from": "saving:write_state"}
"""What is no guard: the price of being able to go on."""


def one(path: str) -> None:
    """Carry a recipe out, in this process, and print what it and its guards took as JSON."""
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
    print(json.dumps({"seconds": seconds, "steps": run.state["steps"], **kinds}))


def main() -> None:
    from trimtab.core.files import write_json

    recipe = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "demo" / "recipe.yaml")
    result = run_apart(__file__, lambda folder: {"recipe": recipe, "folder": str(folder)}, 1)
    if "error" in result:
        sys.exit(result["error"])
    for name, guard in (result["guards"] | result["besides"]).items():
        print(f"{name}: {guard['seconds']:.2f} s in {guard['times']} times, {guard['seconds'] / result['seconds']:.2%}")
    spent = sum(guard["seconds"] for guard in result["guards"].values())
    print(
        f"guards in all {spent:.2f} of {result['seconds']:.1f} s, {spent / result['seconds']:.2%}  (load {os.getloadavg()[0]:.1f})"
    )
    write_json(RESULTS, result)


if __name__ == "__main__":
    one(sys.argv[2]) if sys.argv[1:2] == ["one"] else main()
