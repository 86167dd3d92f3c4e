"""Every adapter method on the real model: a search of learning rates, then two tasks. Makes the tables of docs/methods.md.

    python benchmarks/methods.py search  [METHOD ...]               # the demo task, half an epoch, a grid of learning rates each
    python benchmarks/methods.py measure [METHOD ...] --nl2cmd FOLDER   # the demo task and nl2cmd, with each method's defaults
    python benchmarks/methods.py speed   [METHOD ...]               # tokens/s and memory: a quarter of an epoch, one run at a time

A METHOD may have settings: `lora:rank=8,init=pissa`. Every run has a new process. `--jobs N` runs N of them at a time, each on its
share of the cores; quality does not depend on it. `speed` needs an otherwise idle machine. Results are added to docs/methods.json,
from which `make docs` makes the tables.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _apart import keep, run_apart

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "methods.json"
GRID = {
    "lora": [3e-4, 1e-3, 3e-3], "dora": [3e-4, 1e-3, 3e-3], "miss": [3e-4, 1e-3, 3e-3], "oft": [1e-3, 3e-3, 1e-2],
    "bottleneck": [3e-4, 1e-3, 3e-3], "full": [3e-5, 1e-4, 3e-4], "ia3": [3e-3, 1e-2, 3e-2, 1e-1],
    "bitfit": [1e-3, 3e-3, 1e-2, 3e-2], "layernorm": [1e-3, 3e-3, 1e-2, 3e-2], "tokens": [1e-3, 3e-3, 1e-2],
    "prefix": [3e-4, 1e-3, 3e-3], "ptuning_v2": [1e-3, 3e-3, 1e-2, 3e-2], "prompt": [1e-2, 3e-2, 1e-1, 3e-1],
    "ptuning": [3e-4, 1e-3, 3e-3, 1e-2],
}  # fmt: skip
WIDE = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
"""Learning rates that are tried for a method; the second for one that is new here."""
EXTRA = {"tokens": {"tokens": ["<|im_start|>", "<|im_end|>"]}}
"""What a method cannot do without."""
SPEED = ("tokens_per_s", "peak_gb")
"""What depends on the machine."""


def settings_of(word: str) -> dict[str, Any]:
    import yaml

    name, _, rest = word.partition(":")
    given = {key: yaml.safe_load(value) for key, _, value in (part.partition("=") for part in rest.split(",") if part)}
    return {"name": name, **EXTRA.get(name, {}), **given}


def recipe_of(task: str, method: dict[str, Any], output: Path, nl2cmd: Path | None, **train: Any) -> dict[str, Any]:
    if task == "demo":
        data = {"train": str(ROOT / "demo" / "train.jsonl"), "eval": 24}
        return {"data": data, "method": method, "train": {"epochs": 1, "rows_per_step": 8, **train},
                "output": str(output), "certify": False}  # fmt: skip
    assert nl2cmd is not None, "give --nl2cmd FOLDER"
    data = {"train": str(nl2cmd / "nl2cmd_train.jsonl"), "eval": 100}
    return {"data": data, "method": method, "train": {"epochs": 1, **train}, "output": str(output), "certify": False}


def one(path: str) -> None:
    """Carry a recipe out, in this process, and print what it took and gave as JSON."""
    from peers.run_peer import peak_gb

    from trimtab.data import load_examples
    from trimtab.deploy import load_model
    from trimtab.evaluate import score
    from trimtab.run.recipe import Recipe
    from trimtab.run.script import run_recipe

    asked = json.loads(Path(path).read_text())
    run = run_recipe(Recipe.read(Path(asked["recipe"])))
    memory = peak_gb()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"][1:]  # the first warms caches up
    result = {
        "parameters": run.record["trainable_parameters"],
        "positions": run.record["positions"],
        "lr": run.record["peak_lr"],
        "steps": run.record["steps"],
        "tokens_per_s": sum(line["tokens"] for line in steps) / sum(line["took"] for line in steps),
        "peak_gb": memory,
        "held_out_loss": run.record["best"]["eval_loss"],
        "base_loss": next(line["loss"] for line in lines if line["kind"] == "eval" and line["step"] == 0),
    }
    if asked.get("test"):
        target = load_model(str(run.folder))
        examples, _ = load_examples(asked["test"])
        scores = score(target.base, examples)
        result |= {
            key: scores[key] for key in ("rows", "loss", "loss_interval", "exact_match", "exact_match_interval", "stopped")
        }
    print(json.dumps(result))


def run(task: str, word: str, test: str | None, nl2cmd: Path | None, jobs: int, **train: Any) -> dict[str, Any]:
    def asked(folder: Path) -> dict[str, Any]:
        recipe = folder / "recipe.yaml"
        recipe.write_text(json.dumps(recipe_of(task, settings_of(word), folder / "run", nl2cmd, **train)))
        return {"recipe": str(recipe), "test": test}

    return run_apart(__file__, asked, jobs)


def search(word: str, rate: float, jobs: int) -> None:
    result = run("demo", word, None, None, jobs, lr=rate, epochs=0.5, evaluate_every=1000)
    keep(RESULTS, "search", word, f"{rate:g}", result if "error" in result else {"held_out_loss": result["held_out_loss"]})


def measure(word: str, task: str, nl2cmd: Path | None, jobs: int) -> None:
    test = ROOT / "demo" / "test.jsonl" if task == "demo" else (nl2cmd or Path()) / "nl2cmd_test.jsonl"
    result = run(task, word, str(test), nl2cmd, jobs)
    keep(RESULTS, "measured", word, task, {key: value for key, value in result.items() if key not in SPEED})


def speed(word: str) -> None:
    result = run("demo", word, None, None, 1, epochs=0.25, evaluate_every=1000)
    keep(RESULTS, "measured", word, "speed", result if "error" in result else {key: result[key] for key in SPEED})


def main() -> None:
    from trimtab.methods import Method

    if sys.argv[1:2] == ["one"]:
        return one(sys.argv[2])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["search", "measure", "speed"])
    parser.add_argument("methods", nargs="*", metavar="METHOD")
    parser.add_argument("--rates", nargs="+", type=float)
    parser.add_argument("--tasks", nargs="+", choices=["demo", "nl2cmd"], default=["demo", "nl2cmd"])
    parser.add_argument("--nl2cmd", type=Path, help="the folder with nl2cmd_train.jsonl and nl2cmd_test.jsonl")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (search and measure)")
    arguments = parser.parse_args()
    words, jobs = arguments.methods or Method.names(), arguments.jobs
    if arguments.what == "speed":
        for word in words:
            speed(word)
        return None
    with ThreadPoolExecutor(jobs) as pool:
        if arguments.what == "search":
            pairs = [(word, rate) for word in words for rate in arguments.rates or GRID.get(word.partition(":")[0], WIDE)]
            done = [pool.submit(search, word, rate, jobs) for word, rate in pairs]
        else:
            pairs = [(word, task) for task in arguments.tasks for word in words]
            done = [pool.submit(measure, word, task, arguments.nl2cmd, jobs) for word, task in pairs]
        for each in done:
            each.result()


if __name__ == "__main__":
    main()
