"""How far a method's defaults are from the best of a small search: the held-out loss by task, size of the data, method and objective.

    python benchmarks/regret.py measure                              # the demo's task, LoRA, 100 examples
    python benchmarks/regret.py measure orders commands=TRAIN.jsonl,TEST.jsonl answers=FILE.json --sizes 100 300 --methods lora oft \
        --rates 0.5 1 2 --epochs auto 1 4 --budget 3600              # what is known is not measured again
    python benchmarks/regret.py table                                # that of docs/methods.md; `make docs` puts it there

A task is `orders` (the demo's, which a clone has) or NAME=TRAIN[,TEST]; without TEST, the file's last examples are held out. Rates are
multiples of what `lr: auto` means; `auto` epochs are the default's. One process trains everything, one adapter after the other on one
base, and adds a line to docs/measured/regret.jsonl for each, so that it can be interrupted and continued.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "measured" / "regret.jsonl"
TEST, LONGEST = 100, 256
"""So many examples are held out, and so many tokens each row has at most: the run has to end."""
SAME = ("model", "task", "size", "objective", "method", "seed")
"""What a default and the search share."""
TRIED = ("lr", "epochs", "rows_per_step")
"""What they differ in."""


@dataclass(frozen=True)
class Task:
    name: str
    train: str
    test: str | None

    @classmethod
    def of(cls, word: str) -> "Task":
        if word == "orders":
            return cls(word, str(ROOT / "demo" / "train.jsonl"), str(ROOT / "demo" / "test.jsonl"))
        name, _, files = word.partition("=")
        train, _, test = files.partition(",")
        if not train:
            raise SystemExit(f"{word}: expected orders, or NAME=TRAIN[,TEST].")
        return cls(name, train, test or None)

    def rows(self, base: Any, kind: str) -> tuple[list[list[Any]], list[Any]]:
        """The token rows of each example to train on, and the rows that are held out."""
        from trimtab import api
        from trimtab.data import row_groups

        def usable(source: str) -> list[list[Any]]:
            rows = api.rows(source, base, kind, bad_rows="skip")
            groups = [[rows[n] for n in group] for group in row_groups(rows)]
            return [group for group in groups if max(len(row.ids) for row in group) <= LONGEST]

        train = usable(self.train)
        test = usable(self.test)[:TEST] if self.test else train[len(train) - min(TEST, len(train) // 3) :]
        return train if self.test else train[: len(train) - len(test)], [row for group in test for row in group]


def defaults(method: Any, objective: Any, size: int, model: Any) -> dict[str, Any]:
    """The learning rate, epochs and rows of a step that a recipe without them has."""
    from types import SimpleNamespace

    from trimtab.train import TrainConfig, peak_learning_rate

    epochs, rows_per_step = TrainConfig().epochs_and_rows(size)
    base: Any = SimpleNamespace(model=SimpleNamespace(config=model))
    rate, _ = peak_learning_rate(TrainConfig(), base, method, objective, rows_per_step)
    return {"lr": rate, "epochs": epochs, "rows_per_step": rows_per_step}


def trial(
    base: Any, method: Any, objective: Any, rows: tuple[list[Any], list[Any]], seed: int, tried: dict[str, Any]
) -> dict[str, Any]:
    """Train a new adapter, and its loss on the held-out rows at the end."""
    from trimtab.evaluate.scores import score_loss
    from trimtab.methods import attach, max_row_length
    from trimtab.run.start import prepare_objective, sample
    from trimtab.train import TrainConfig, TrainingSteps, peak_learning_rate, plan_training_memory, train

    started, config = time.perf_counter(), TrainConfig(**tried, seed=seed)
    adapter = attach(base.model, method, seed, sample=sample(base, rows[0]))
    try:
        most = max_row_length(base.model, base.context_length)
        objective, (learned, held_out), _ = prepare_objective(objective, base, adapter, rows, seed, most)
        memory = plan_training_memory(base, config, learned)
        steps = TrainingSteps(learned, config, memory)
        rate, _ = peak_learning_rate(config, base, method, objective, steps.rows_per_step)
        losses = [step.loss for step in train(base, adapter, objective, steps, config, rate, memory)]
        scored = score_loss(base, held_out, objective=objective)
    finally:
        adapter.detach()
    return {
        "steps": len(steps), "loss": round(scored.loss, 5), "train_loss": round(sum(losses[-8:]) / len(losses[-8:]), 4),
        "seconds": round(time.perf_counter() - started, 1), "sums": [round(x, 3) for x in scored.sums], "counts": scored.counts,
    }  # fmt: skip


def measure(asked: argparse.Namespace) -> None:
    from methods import settings_of

    from trimtab import api
    from trimtab.core.errors import TrimtabError
    from trimtab.methods import Method
    from trimtab.objectives import Objective

    started, base = time.perf_counter(), api.load(asked.model)
    known = {tuple(line[key] for key in SAME + TRIED) for line in results()}
    for word, name in ((task, objective) for objective in asked.objectives for task in asked.tasks):
        task, objective = Task.of(word), Objective.pick({"name": name})
        groups, held_out = task.rows(base, objective.data_kind)
        for size, method_word in ((size, method) for size in asked.sizes for method in asked.methods):
            if size > len(groups):
                print(f"{task.name}: has {len(groups)} examples to train on, so {size} are left out.", flush=True)
                continue
            method = Method.pick(settings_of(method_word))
            rows = [row for group in groups[:size] for row in group]
            own = defaults(method, objective, size, base.model.config)
            for tried in grid(own, asked):
                cell = dict(zip(SAME, (asked.model, task.name, size, name, method_word, asked.seed), strict=True)) | tried
                if tuple(cell[key] for key in SAME + TRIED) in known:
                    continue
                if time.perf_counter() - started > asked.budget:
                    return
                try:
                    cell |= trial(base, method, objective, (rows, held_out), asked.seed, tried)
                except TrimtabError as error:
                    cell |= {"error": str(error).splitlines()[0]}
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(cell) + "\n")
                print({key: value for key, value in cell.items() if key not in ("sums", "counts")}, flush=True)


def grid(own: dict[str, Any], asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is tried: the rates around the default's, each with all numbers of epochs."""
    for epochs in asked.epochs:
        for rate in asked.rates:
            for rows in asked.rows:
                yield {
                    "lr": float(f"{own['lr'] * rate:.2e}"),
                    "epochs": own["epochs"] if epochs == "auto" else float(epochs),
                    "rows_per_step": own["rows_per_step"] if rows == "auto" else int(rows),
                }


def results() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()] if RESULTS.exists() else []


def table(lines: list[dict[str, Any]], model: Any) -> str:
    """Each default beside the best of what was tried in its place."""
    shown = [
        "| task | examples | objective | method | default: rate, epochs × a step: loss | best of the search | above it | 95 % interval |",
        "|---|--:|---|---|---|---|--:|---|",
    ]
    for (_, task, size, objective, method, seed), default, tried in compared(lines, model):
        best = min(tried, key=lambda line: line["loss"])
        above, (low, high) = paired_difference_of(default, best)
        name = f"`{method}`" + (f", seed {seed}" if seed else "")
        shown.append(
            f"| {task} | {size:,} | {objective} | {name} | {_told(default)} | {_told(best)} (of {len(tried)}) "
            f"| {above / best['loss']:.1%} | {low / best['loss']:.1%} to {high / best['loss']:.1%} |"
        )
    return "\n".join(shown) + "\n"


def compared(lines: list[dict[str, Any]], model: Any) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], list[dict[str, Any]]]]:
    """What the tries of a cell share, what today's default gave, and all that was tried; cells without the default are left out."""
    from methods import settings_of

    from trimtab.methods import Method
    from trimtab.objectives import Objective

    cells = defaultdict[tuple[Any, ...], list[dict[str, Any]]](list)
    for line in lines:
        if "error" not in line:
            cells[tuple(line[key] for key in SAME)].append(line)
    for key, tried in sorted(cells.items()):
        _, _, size, objective, method, _ = key
        own = defaults(Method.pick(settings_of(method)), Objective.pick({"name": objective}), size, model)
        default = next((line for line in tried if {name: line[name] for name in TRIED} == own), None)
        if default is not None and len(tried) > 1:
            yield key, default, tried


def paired_difference_of(default: dict[str, Any], best: dict[str, Any]) -> tuple[float, tuple[float, float]]:
    from trimtab.evaluate import paired_difference

    return paired_difference(default["sums"], best["sums"], best["counts"])


def _told(line: dict[str, Any]) -> str:
    return f"{line['lr']:g}, {line['epochs']:g} × {line['rows_per_step']}: {line['loss']:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "table"])
    parser.add_argument("tasks", nargs="*", metavar="TASK", default=["orders"])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--sizes", nargs="+", type=int, default=[100])
    parser.add_argument("--methods", nargs="+", default=["lora"], help="with settings as in benchmarks/methods.py")
    parser.add_argument("--objectives", nargs="+", default=["sft"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1, 0.5, 2])
    parser.add_argument("--epochs", nargs="+", default=["auto", "1", "4"])
    parser.add_argument("--rows", nargs="+", default=["auto"], help="of a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which nothing new is started")
    asked = parser.parse_args()
    if asked.what == "measure":
        measure(asked)
    else:
        from trimtab import api

        print(table(results(), api.load(asked.model).model.config), end="")


if __name__ == "__main__":
    main()
