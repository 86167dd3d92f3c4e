"""The number of steps that small data needs: the same tasks with 20, 60, 200 and 1,000 examples and different numbers of epochs.

    python benchmarks/small_data.py measure orders=demo/train.jsonl commands=rows.jsonl … [--jobs 2]

The last 40 examples of each file are never trained on. Their loss, and how many of the first 20 of them the best adapter answers
exactly and stops at EOS, go to docs/measured/small_data.json.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _apart import keep, run_apart

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "measured" / "small_data.json"
TEST, ANSWERED, LONGEST = 40, 20, 520
SIZES = {
    20: ((2, 16), (16, 16), (4, 4)),
    60: ((2, 16), (2, 4), (4, 4)),
    200: ((2, 16), (2, 6), (4, 13)),
    1000: ((1, 16), (2, 16)),
}
"""By the number of examples, the epochs that are tried, and how many of them a step has."""


def one(asked: dict[str, Any]) -> dict[str, Any]:
    """One run: its losses on the held-out rows, and how many of those it answers exactly."""
    from trimtab.data import load_examples
    from trimtab.deploy import load_model
    from trimtab.evaluate import score
    from trimtab.run.recipe import Recipe
    from trimtab.run.script import run_recipe

    folder = Path(asked["folder"])
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked[name]))
    test = str(folder / "test.jsonl")
    recipe = {
        "data": {"train": str(folder / "train.jsonl"), "eval": test, "bad_rows": "skip"},
        "train": {**asked["settings"], "evaluate_every": 1000},
        "certify": False,
        "output": str(folder / "run"),
    }
    run = run_recipe(Recipe.parse(recipe))
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "eval"}
    target = load_model(str(run.folder))
    scored = score(target.base, load_examples(test)[0][:ANSWERED])
    return {
        "steps": run.record["steps"],
        "base": losses.pop(0),
        "best": run.record["best"]["eval_loss"],
        "best_step": run.record["best"]["step"],
        "last": run.record["last"]["eval_loss"],
        "losses": losses,
        "exact": scored["exact_match"],
        "stopped": scored["stopped"],
        "seconds": run.record["seconds"],
    }


def rows_of(task: str) -> tuple[str, list[dict[str, Any]]]:
    name, _, source = task.partition("=")
    text = Path(source).read_text(encoding="utf-8")
    return name, json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]


def measure(tasks: list[str], jobs: int) -> None:
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    todo = []
    for name, rows in map(rows_of, tasks):
        rows = [row for row in rows if len(json.dumps(row)) < LONGEST]
        train, test = rows[:-TEST], rows[-TEST:]
        for size, tried in SIZES.items():
            for epochs, rows_per_step in tried:
                key = f"{epochs} epochs, {rows_per_step} a step"
                if size <= len(train) and key not in known.get(name, {}).get(str(size), {}):
                    given = {
                        "train": train[:size],
                        "test": test,
                        "settings": {"epochs": epochs, "rows_per_step": rows_per_step},
                    }
                    todo.append((size * epochs, name, str(size), key, given))

    def run(number: int) -> None:
        _, name, size, key, asked = todo[number]
        keep(RESULTS, name, size, key, run_apart(__file__, lambda folder: {**asked, "folder": str(folder)}, jobs))

    todo.sort(key=lambda each: each[0])
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, range(len(todo))))


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(one(json.loads(Path(sys.argv[2]).read_text()))))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("command", choices=["measure"])
        parser.add_argument("tasks", nargs="+", metavar="NAME=FILE")
        parser.add_argument("--jobs", type=int, default=1)
        arguments = parser.parse_args()
        measure(arguments.tasks, arguments.jobs)
