"""SFT, then preference training, for every family of adapters. Makes the tables of docs/preference.md.

    python benchmarks/preference.py measure [METHOD ...] --seeds 0 1        # SFT, then DPO and KTO, each from the same SFT
    python benchmarks/preference.py rates [OBJECTIVE ...] --methods lora ia3    # learning rates, as shares of SFT's

The task is the demo's: an order as a line. SFT trains on the first 160 orders. The next 160 become pairs of the correct line
and one with a single plausible mistake. On orders with other names, cities and items it measures how often the correct line is
preferred, how often it is generated, the divergence from the reference model, and, for forgetting, the loss on English prose from
the documentation that comes with Python. `--jobs N` runs N at a time, each on its share of the cores. Results are added to
docs/preference.json, from which `make docs` makes the tables.
"""

import argparse
import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _apart import keep, run_apart

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "preference.json"
METHODS = ["lora", "bottleneck", "prefix", "ptuning_v2", "ia3"]
SHARES = [0.03, 0.1, 0.3, 1.0]
SFT_ROWS, PAIR_ROWS, PROSE_ROWS, PROSE_CHARACTERS = 160, 160, 48, 900
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def rows_of(name: str) -> list[list[dict[str, str]]]:
    """The messages of each row of the demo."""
    return [json.loads(line)["messages"] for line in (ROOT / "demo" / f"{name}.jsonl").read_text("utf-8").splitlines()]


def spoilt(line: str, others: list[list[str]], rng: random.Random) -> str:
    """A line of the order book with one place wrong; the others are whole lines that wrong values come from."""
    quantity, item, customer, city, day = right = line.split(" | ")
    wrong = {
        0: str(int(quantity) + rng.choice([-1, 1])) if rng.random() < 0.5 else f"{quantity}0",
        1: item.split(" ", 1)[1] if " " in item else rng.choice(others)[1],
        2: "-" if customer == "-" or rng.random() < 0.3 else customer.split(" ")[0],
        3: rng.choice(others)[3] if city == "-" else rng.choice(["-", customer, rng.choice(others)[3]]),
        4: rng.choice(DAYS) if day == "-" else rng.choice(["-", *DAYS]),
    }
    changed = [n for n, value in wrong.items() if value != right[n]]
    place = rng.choice(changed)
    return " | ".join([*right[:place], wrong[place], *right[place + 1 :]])


def pairs(rows: list[list[dict[str, str]]], seed: int) -> list[dict[str, Any]]:
    rng, lines = random.Random(seed), [row[-1]["content"].split(" | ") for row in rows]
    return [
        {"prompt": row[:-1], "chosen": row[-1]["content"], "rejected": spoilt(row[-1]["content"], lines, rng)} for row in rows
    ]


def prose() -> list[dict[str, str]]:
    """English that nobody trains on: pieces of Python's reference, which the standard library has as text."""
    from pydoc_data.topics import topics

    pieces = [text[:PROSE_CHARACTERS] for _, text in sorted(topics.items()) if len(text) >= PROSE_CHARACTERS]
    return [{"text": text} for text in random.Random(0).sample(pieces, PROSE_ROWS)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def scored(folder: Path, data: dict[str, str], *, preferred: bool) -> dict[str, Any]:
    """What an adapter is worth: by answers, by prose, and by pairs if it has learned from preferences."""
    from trimtab.data import SourceReport, load_examples, tokenize_examples
    from trimtab.deploy import load_model
    from trimtab.evaluate import score, score_loss
    from trimtab.evaluate.reference import add_reference_logprobs, divergence
    from trimtab.objectives import Objective

    target = load_model(str(folder))
    base, adapter = target.base, target.adapter
    assert adapter is not None
    answers = score(base, load_examples(data["test"])[0])
    text = tokenize_examples(load_examples(data["prose"])[0], base, SourceReport(("prose",)))
    found = {"exact_match": answers["exact_match"], "loss": answers["loss"], "prose_loss": score_loss(base, text).loss}
    with adapter.disabled():
        found["base_prose_loss"] = score_loss(base, text).loss
    if preferred:  # by pairs, whatever it has learned from
        start = str(folder.parent / "sft")
        both = tokenize_examples(load_examples(data["test_pairs"], kind="pairs")[0], base, SourceReport(("pairs",)))
        told = score_loss(
            base, add_reference_logprobs(base, adapter, start, both, 4096).rows, 4096, Objective.pick("dpo")
        ).measures
        found |= {
            "accuracy": told["accuracy"],
            "margin": told["margin"],
            "divergence": divergence(base, adapter, start, both, 4096),
        }
    return found


def one(path: str) -> None:
    """SFT and what follows it, in this process; prints what each stage gave as JSON."""
    from trimtab.run.recipe import Recipe
    from trimtab.run.script import run_recipe

    asked = json.loads(Path(path).read_text())
    folder, method, seed = Path(path).parent, asked["method"], asked["seed"]
    train, test = rows_of("train"), rows_of("test")
    data = {
        "sft": write(folder / "sft.jsonl", [{"messages": row} for row in train[:SFT_ROWS]]),
        "pairs": write(folder / "pairs.jsonl", pairs(train[SFT_ROWS:][:PAIR_ROWS], seed=1)),
        "test": write(folder / "test.jsonl", [{"messages": row} for row in test]),
        "test_pairs": write(folder / "test_pairs.jsonl", pairs(test, seed=2)),
        "prose": write(folder / "prose.jsonl", prose()),
    }
    once = {"epochs": 1, "rows_per_step": 8, "seed": seed, "evaluate_every": 1000}
    sft = {"data": {"train": data["sft"], "eval": 0}, "method": method, "train": once, "output": str(folder / "sft")}
    run_recipe(Recipe.parse(sft))
    results = {"sft": scored(folder / "sft", data, preferred=False)}
    for name, rate in asked["after"]:
        output = folder / f"{name}-{rate}"
        stage = {
            "data": {"train": data["pairs"], "eval": 0}, "objective": name, "start": str(folder / "sft"), "output": str(output),
            "train": once if rate is None else {**once, "lr": rate},
        }  # fmt: skip
        state = run_recipe(Recipe.parse(stage)).state
        results[f"{name}@{rate}" if rate is not None else name] = {
            **scored(output, data, preferred=True),
            "lr": state["peak_lr"],
            "seconds": state["seconds"],
        }
    print(json.dumps(results))


def run(method: str, seed: int, after: list[tuple[str, float | None]], jobs: int) -> dict[str, Any]:
    return run_apart(__file__, lambda _: {"method": method, "seed": seed, "after": after}, jobs)


def measure(method: str, seed: int, jobs: int) -> None:
    keep(RESULTS, "measured", method, str(seed), run(method, seed, [("dpo", None), ("kto", None)], jobs))


def rates(objective: str, method: str, shares: list[float], jobs: int) -> None:
    """Learning rates as shares of the one that the method has for supervised training on this model."""
    from trimtab.methods import LearningRateContext, Method

    whole, _ = Method.pick(method).learning_rate(LearningRateContext("llama", 576, 8))
    result = run(method, 0, [(objective, float(f"{whole * share:.2e}")) for share in shares], jobs)
    if "error" not in result:
        found = [one for name, one in result.items() if name != "sft"]
        result = {"sft": result["sft"], **{f"{share:g}": one for share, one in zip(shares, found, strict=True)}}
    keep(RESULTS, "rates", objective, method, result)


def main() -> None:
    from trimtab.objectives import Objective

    if sys.argv[1:2] == ["one"]:
        return one(sys.argv[2])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "rates"])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--methods", nargs="+", default=["lora"], help="whose learning rates (rates)")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    given = parser.parse_args()
    with ThreadPoolExecutor(given.jobs) as pool:
        if given.what == "measure":
            done = [pool.submit(measure, name, seed, given.jobs) for seed in given.seeds for name in given.names or METHODS]
        else:
            names = given.names or [name for name in Objective.names() if name != "sft"]
            done = [pool.submit(rates, name, method, given.shares, given.jobs) for method in given.methods for name in names]
        for each in done:
            each.result()


if __name__ == "__main__":
    main()
