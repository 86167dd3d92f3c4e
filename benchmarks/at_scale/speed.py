"""Training with several processes of one thread each, in turn with one process: how many times as fast, and where the rest goes."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

from at_scale.shares import share_out
from trimtab.core.files import read_json, write_json

RESULTS = Path(__file__).parents[2] / "docs" / "measured" / "scale.json"
MODEL = "smollm2-135m-instruct"


def measure(data: str, processes: int, rows: int, steps: int, rounds: int) -> dict[str, Any]:
    """One process and several, in turn. The first step of each run, which warms up, does not count."""
    found = []
    for number in range(rounds):
        one, several = (_run(data, count, rows, steps) for count in (1, processes))
        sending = _exchange(processes, several["run"]["trainable_parameters"])
        found.append({**compared(one, several, sending), "load": [one["load"], several["load"]]})
        print(f"round {number + 1}: {json.dumps(found[-1])}", flush=True)
    result = {
        "rows": Path(data).name, "steps": steps - 1, "rounds": found, "predicted": predicted(data, one, several, processes),
        "gradients": 4 * several["run"]["trainable_parameters"], "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip
    known = read_json(RESULTS) if RESULTS.exists() else {}
    write_json(RESULTS, known | {f"{processes} processes, {rows} examples a step of {Path(data).name}": result})
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
        }
        path = Path(folder) / "recipe.yaml"
        path.write_text(json.dumps(recipe))  # which is YAML, too
        load = round(os.getloadavg()[0], 2)
        _said(processes, "trimtab", "train", str(path))
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        run = json.loads((Path(folder) / "run" / "run.json").read_text())
    return {"lines": [line for line in lines if line["kind"] == "train"][1:], "run": run, "recipe": recipe, "load": load}


def _said(processes: int, *words: str) -> str:
    """What a module prints, run by so many processes of one thread each."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)} in {processes} processes: exit code {done.returncode}\n{done.stderr[-4000:]}")
    return done.stdout


def _exchange(processes: int, parameters: int) -> float:
    """Seconds of a step in which the gradients are summed."""
    return float(_said(processes, "at_scale.exchange", str(parameters)).strip().splitlines()[-1])


def compared(one: dict[str, Any], several: dict[str, Any], sending: float) -> dict[str, Any]:
    """Tokens a second of both, and shares of the several processes' time.

    Args:
        sending: Seconds of a step in which the gradients are summed, if nobody has to be waited for.
    """
    alone, together = one["lines"], several["lines"]
    if [line["tokens"] for line in alone] != [line["tokens"] for line in together]:
        sys.exit("One process and several have not trained on the same examples.")
    speeds = [sum(line["tokens"] for line in lines) / sum(line["took"] for line in lines) for lines in (alone, together)]
    took, waited = (sum(line[name] for line in together) for name in ("took", "waited"))
    apart = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(alone, together, strict=True))
    shares = {"sending": sending * len(together) / took, "waiting": (waited - sending * len(together)) / took}
    return {"alone": speeds[0], "together": speeds[1], "ratio": speeds[1] / speeds[0], "losses_apart": apart, **shares}


def predicted(data: str, one: dict[str, Any], several: dict[str, Any], processes: int) -> dict[str, float]:
    """Of the same steps, in the packs that the runs had: how many times as fast; the first process's share of waiting; packs a step; and how
    much more there is to compute, because packs that are smaller share fewer prefixes."""
    import trimtab
    from trimtab.engine import PackCost

    base = trimtab.load(MODEL)
    rows, cost = trimtab.rows(data, base), PackCost(base.model)
    alone = sum(sum(map(cost, packs)) for packs in _packs(rows, one))
    total = busiest = first = count = 0.0
    for packs in _packs(rows, several):
        costs = [cost(pack) for pack in packs]
        work = share_out(costs, processes)
        total, busiest, first, count = total + sum(work), busiest + max(work), first + work[0], count + len(costs)
    shares = {"waiting": 1 - first / busiest, "more": total / alone - 1, "packs": count / len(several["lines"])}
    return {"ratio": alone / busiest, **shares}


def _packs(rows: list[Any], run: dict[str, Any]) -> list[list[Any]]:
    """Of each step but the first."""
    from trimtab.engine import MemoryPlan
    from trimtab.run.recipe import Recipe
    from trimtab.train import TrainingSteps

    plan = MemoryPlan.from_plain(run["run"]["plan"])
    assert plan is not None
    steps = TrainingSteps(rows, Recipe.parse(run["recipe"]).train, plan)
    return [steps[number] for number in range(1, len(run["lines"]) + 1)]


def table() -> str:
    """What was measured, as Markdown."""
    if not RESULTS.exists():
        return "Not measured yet.\n"
    lines = [
        "| | one process | several | ratio | predicted | rank 0 waits | predicted | more to compute | sum of gradients | losses differ by "
        "| load average |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    return "\n".join([*lines, *(_line(name, result) for name, result in read_json(RESULTS).items())]) + "\n"


def _line(name: str, result: dict[str, Any]) -> str:
    rounds, expected = result["rounds"], result["predicted"]
    ratios, loads = [one["ratio"] for one in rounds], [load for one in rounds for load in one["load"]]
    middle = {key: median(one[key] for one in rounds) for key in ("alone", "together", "ratio", "waiting", "sending")}
    return (
        f"| {name} | {middle['alone']:.0f} tokens/s | {middle['together']:.0f} tokens/s | {middle['ratio']:.2f} ({min(ratios):.2f} to "
        f"{max(ratios):.2f}) | {expected['ratio']:.2f} | {middle['waiting']:.1%} | {expected['waiting']:.1%} | {expected['more']:.1%} | "
        f"{result['gradients'] / 1e6:.0f} MB, {middle['sending']:.2%} | {max(one['losses_apart'] for one in rounds):.0e} | {mean(loads):.1f} |"
    )
