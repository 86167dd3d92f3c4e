"""Training with several processes of one thread each, in turn with one process: how many times as fast, and where the rest goes."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

from at_scale.costs import Shape, work
from at_scale.shares import share_out
from trimtab.core.files import read_json, write_json

RESULTS = Path(__file__).parents[2] / "docs" / "measured" / "scale.json"
MODEL = "smollm2-135m-instruct"
SMOLLM2 = Shape(30, 576, 1536, 9, 576, 192, 49152, 0, 0, 0)


def measure(data: str, processes: int, rows: int, steps: int, rounds: int) -> dict[str, Any]:
    """One process and several, in turn. The first step of each run, which warms up, does not count."""
    found = []
    for number in range(rounds):
        pair = {count: _run(data, count, rows, steps) for count in (1, processes)}
        one, several = pair[1], pair[processes]
        found.append({**_compared(one, several), "load": [one["load"], several["load"]]})
        print(f"round {number + 1}: {json.dumps(found[-1])}", flush=True)
    result = {
        "data": Path(data).name, "processes": processes, "rows_per_step": rows, "steps": steps - 1, "rounds": found,
        "predicted": predicted(data, several), "parameters": several["run"]["trainable_parameters"], "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip
    known = read_json(RESULTS) if RESULTS.exists() else {}
    write_json(RESULTS, known | {f"{processes} processes, {rows} rows a step": result})
    return result


def _run(data: str, processes: int, rows: int, steps: int) -> dict[str, Any]:
    """What `trimtab train` leaves in a run's folder, and the load before it."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = {
            "model": MODEL,
            "data": {"train": str(Path(data).resolve()), "eval": 0},
            "train": {"rows_per_step": rows, "max_steps": steps},
            "certify": False,
            "output": f"{folder}/run",
            **({"devices": processes} if processes > 1 else {}),
        }
        path = Path(folder) / "recipe.yaml"
        path.write_text(json.dumps(recipe))  # which is YAML, too
        load = os.getloadavg()[0]
        command = [sys.executable, "-m", "trimtab", "train", str(path)]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{processes} processes: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        run = json.loads((Path(folder) / "run" / "run.json").read_text())
    trained = [line for line in lines if line["kind"] == "train"]
    return {"lines": trained[1:], "first_loss": trained[0]["loss"], "run": run, "recipe": recipe, "load": round(load, 2)}


def _compared(one: dict[str, Any], several: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second of both, and shares of the several processes' time."""
    alone, together = one["lines"], several["lines"]
    if [line["tokens"] for line in alone] != [line["tokens"] for line in together]:
        sys.exit("One process and several have not trained on the same examples.")
    speeds = [sum(line["tokens"] for line in lines) / sum(line["took"] for line in lines) for lines in (alone, together)]
    took = sum(line["took"] for line in together)
    apart = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(alone, together, strict=True))
    shares = {name: sum(line[name] for line in together) / took for name in ("waited", "communicated")}
    return {"alone": speeds[0], "together": speeds[1], "ratio": speeds[1] / speeds[0], "losses_apart": apart, **shares}


def predicted(data: str, several: dict[str, Any]) -> dict[str, float]:
    """Of the same steps, in the packs that the run had: the share of the time in which processes wait, and the speed of as many alone."""
    import trimtab
    from trimtab.engine import MemoryPlan
    from trimtab.run.recipe import Recipe
    from trimtab.train import TrainingSteps

    recipe, plan = Recipe.parse(several["recipe"]), MemoryPlan.from_plain(several["run"]["plan"])
    assert plan is not None
    steps = TrainingSteps(trimtab.rows(data, trimtab.load(MODEL)), recipe.train, plan)
    total = busiest = packs = 0.0
    for number in range(1, len(several["lines"]) + 1):
        costs = [_work(pack) for pack in steps[number]]
        shared = share_out(costs, recipe.devices)
        total, busiest, packs = total + sum(shared) / recipe.devices, busiest + max(shared), packs + len(costs)
    return {"idle": 1 - total / busiest, "ratio": recipe.devices * total / busiest, "packs": packs / len(several["lines"])}


def _work(pack: Any) -> float:
    """FLOP of a pack."""
    tokens, pairs = len(pack.ids), sum(pack.pairs)
    plain = tokens * work(SMOLLM2, "none", len(pack.predicts) / tokens, 0.0)
    return plain + work(SMOLLM2, "none", 0.0, pairs) - work(SMOLLM2, "none", 0.0, 0.0)  # linear in the pairs


def table() -> str:
    """What was measured, as Markdown."""
    if not RESULTS.exists():
        return "Not measured yet.\n"
    lines = [
        "| | one process | several | ratio | predicted | waited | predicted | communicated | losses differ by | load average |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, result in read_json(RESULTS).items():
        rounds = result["rounds"]

        def middle(key: str, rounds: list[dict[str, Any]] = rounds) -> float:
            return median(one[key] for one in rounds)

        ratios, loads = [one["ratio"] for one in rounds], [load for one in rounds for load in one["load"]]
        lines.append(
            f"| {name} | {middle('alone'):.0f} tokens/s | {middle('together'):.0f} tokens/s | {middle('ratio'):.2f} ({min(ratios):.2f} to "
            f"{max(ratios):.2f}) | {result['predicted']['ratio']:.2f} | {middle('waited'):.1%} | {result['predicted']['idle']:.1%} | "
            f"{middle('communicated'):.2%} | {max(one['losses_apart'] for one in rounds):.0e} | {mean(loads):.1f} |"
        )
    return "\n".join(lines) + "\n"
