"""The same rows, steps and first weights for every trainer, one process after the other, in turns; and what came of it."""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.base import Base, ModelConfig
from trimtab.bench.floor import least_work, multiplying_rate
from trimtab.core import files
from trimtab.core.errors import RecipeError
from trimtab.core.process import environment, module_command
from trimtab.data import DataConfig, load_data, units
from trimtab.data.example import TokenRow
from trimtab.data.mismatched import with_mismatched
from trimtab.data.order import shuffled
from trimtab.deploy import save_adapter
from trimtab.methods import attach
from trimtab.methods.lora import LoRA
from trimtab.objectives import Objective

OURS = "trimtab"
PEERS: dict[str, dict[str, Any]] = {
    "hf-peft": {"library": "transformers", "recompute": True, "grouped": False},
    "hf-peft-no-recompute": {"library": "transformers", "recompute": False, "grouped": False},
    "hf-peft-grouped": {"library": "transformers", "recompute": False, "grouped": True},
    "trl": {"library": "trl", "recompute": True, "grouped": False},
    "trl-no-recompute": {"library": "trl", "recompute": False, "grouped": False},
}
"""Hugging Face Trainer with PEFT as its tutorials set it (recomputation on), without recomputation, and with batches of similar
length too, which is its best; TRL's SFTTrainer at its defaults, and without recomputation."""
NEEDS = {"transformers": ("transformers", "peft", "accelerate"), "trl": ("trl", "peft", "datasets")}


@dataclass
class Asked:
    """What to compare on what."""

    data: str | None = None
    """Rows; unless given, made-up ones of chat-like lengths."""
    model: str = "smollm2-135m-instruct"
    rows: int = 64
    rows_per_step: int = 8
    rank: int = 8
    targets: tuple[str, ...] = ("all-linear",)
    pairs: int = 3
    objective: str = "sft"
    """What is learned: sft, dpo or kto."""
    against: tuple[str, ...] = ("hf-peft", "hf-peft-no-recompute", "hf-peft-grouped")
    python: str = sys.executable
    """The interpreter that has the peers."""


def compare(asked: Asked, say: Callable[[str, dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Each trainer `pairs` times, in turns. Calls `say` after every run; returns a summary of each trainer: see `summary`.

    Raises:
        RecipeError: A peer that is not known, or not installed where it is looked for; a run that failed.
    """
    if asked.rows % asked.rows_per_step:
        raise RecipeError(f"--rows: {asked.rows} rows do not make whole steps of {asked.rows_per_step} (--rows-per-step).")
    for name in asked.against:
        if name not in PEERS:
            raise RecipeError(f"--against: {name!r} is none of {', '.join(PEERS)}.")
        if asked.objective != "sft" and PEERS[name]["library"] != "trl":
            raise RecipeError(f"--against: {name} has no {asked.objective}; trl and trl-no-recompute have.")
        _check_installed(asked.python, PEERS[name]["library"])
    base = Base.load(ModelConfig(name=asked.model))
    objective = Objective.pick(asked.objective)
    rows = _rows(asked, base, objective)
    objective = objective.settled(rows)
    method = LoRA(rank=asked.rank, alpha=2.0 * asked.rank, targets=asked.targets)
    with tempfile.TemporaryDirectory() as folder:
        spec = {**_prepare(asked, base, rows, method, Path(folder)), "objective": objective.plain()}
        steps = [rows[at : at + asked.rows_per_step] for at in range(0, len(rows), asked.rows_per_step)]
        work = least_work(base.model, steps, method) if asked.objective == "sft" else None
        tokens = sum(row.shown for row in rows if row.side != "mismatched")
        done: dict[str, list[dict[str, Any]]] = {OURS: [], **{name: [] for name in asked.against}}
        for number in range(asked.pairs):
            for name, results in done.items():
                before = multiplying_rate(base.model)
                result = _run(name, spec, asked.python, Path(folder))
                rate = max(before, multiplying_rate(base.model))
                result |= {
                    "trainer": name,
                    "round": number + 1,
                    "tokens_per_s": tokens / result["seconds"],
                    "rows_per_min": 60 * asked.rows / result["seconds"],
                    "gemm_rate": rate,
                    "gemm_floor_fraction": work / rate / result["seconds"] if work is not None else None,
                    "load": os.getloadavg()[0],
                }
                results.append(result)
                say(name, result)
    return [summary(name, results, done[OURS]) for name, results in done.items()]


def summary(name: str, results: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of a trainer's runs; how many times as fast Trimtab is, and how much of the memory it takes, by the pair."""
    pairs = [theirs["seconds"] / our["seconds"] for theirs, our in zip(results, ours, strict=True)]
    same = not PEERS.get(name, {}).get("grouped")  # else its batches are others
    distances = [abs(a - b) / abs(b) for a, b in zip(results[0]["losses"], ours[0]["losses"], strict=True)] if same else []
    return {
        "trainer": name,
        "tokens_per_s": statistics.median(one["tokens_per_s"] for one in results),
        "rows_per_min": statistics.median(one["rows_per_min"] for one in results),
        "peak_rss_gb": statistics.median(one["peak_gb"] for one in results),
        "gemm_floor_fraction": None
        if results[0]["gemm_floor_fraction"] is None
        else statistics.median(one["gemm_floor_fraction"] for one in results),
        "losses": results[0]["losses"],
        "trimtab_is_faster": statistics.median(pairs),
        "pairs": pairs,
        "trimtab_memory": statistics.median(our["peak_gb"] / one["peak_gb"] for one, our in zip(results, ours, strict=True)),
        "loss_distance": max(distances) if distances else None,
        "runs": [{key: value for key, value in one.items() if key != "losses"} for one in results],
    }


def _rows(asked: Asked, base: Base, objective: Objective) -> list[TokenRow]:
    """The rows in the order in which they are learned."""
    if asked.data is None and asked.objective != "sft":
        raise RecipeError(f"--objective {asked.objective}: give rows with --data; none are made up for it.")
    if asked.data is None:
        rows = list(_made_up(asked.rows, base.model.config.get_text_config().vocab_size))
    else:
        config = DataConfig(train=(asked.data,), eval=0.0)
        rows = load_data(config, base, base.context_length, 0, objective.data_kind).train
    whole = units(rows)[: asked.rows]
    if len(whole) < asked.rows:
        raise RecipeError(
            f"--rows: {asked.data} has {len(whole):,} rows, not {asked.rows:,}. Ask for as many as it has, or fewer."
        )
    chosen = [rows[n] for unit in shuffled(len(whole), seed=0, epoch=0) for n in whole[unit]]
    return with_mismatched(chosen, 0, base.context_length) if objective.estimates_kl else chosen


def _made_up(count: int, vocabulary: int) -> Iterator[TokenRow]:
    """Random tokens in rows of chat-like lengths (median 160, up to 600), three quarters of each to be learned, nothing shared."""
    draw = random.Random(0)
    for number in range(count):
        length = min(600, max(24, round(draw.lognormvariate(5.08, 0.6))))
        ids = [draw.randrange(vocabulary) for _ in range(length)]
        yield TokenRow(ids, list(range(length // 4, length)), f"made up {number}", length)


def _prepare(asked: Asked, base: Base, rows: list[TokenRow], method: LoRA, folder: Path) -> dict[str, Any]:
    """What every run reads; the model as a folder that Transformers can open, and the first weights."""
    base.model.save_pretrained(folder / "model")
    if base.tokenizer is not None:
        base.tokenizer.save_pretrained(folder / "model")
    base = Base.load(ModelConfig(name=str(folder / "model")))
    adapter = attach(base.model, method)
    save_adapter(base, adapter, folder / "start")
    adapter.detach()
    return {
        "model": str(folder / "model"),
        "start": str(folder / "start"),
        "scratch": str(folder / "scratch"),
        "rows": [{"ids": row.ids, "learned": list(row.target_indices), "side": row.side} for row in rows],
        "rows_per_step": asked.rows_per_step,
        "lr": 2e-4,
    }


def _check_installed(python: str, library: str) -> None:
    asks = f"import importlib.util as u; print(*[n for n in {NEEDS[library]!r} if not u.find_spec(n)])"
    try:
        missing = subprocess.run(
            [python, "-c", asks], capture_output=True, text=True, check=True, timeout=60, env=_safe()
        ).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise RecipeError(f"--python: {python} can't be run: {error}") from None
    if missing:
        raise RecipeError(
            f"--against: {library} needs {', '.join(missing)}, which {python} does not have. Install them in an environment of their own "
            "(pip install peft trl accelerate) and name its interpreter with --python."
        )


def _safe() -> dict[str, str]:
    """For an interpreter that may be another one: it does not import what lies in the folder that it is run in (from 3.11 on)."""
    return environment() | {"PYTHONSAFEPATH": "1"}


def _run(name: str, spec: dict[str, Any], python: str, folder: Path) -> dict[str, Any]:
    path = folder / f"{name}.json"
    files.write_json(path, {**spec, **PEERS.get(name, {})})
    command = module_command("trimtab.bench.ours") if name == OURS else [python, str(Path(__file__).with_name("peers.py"))]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False, env=_safe())
    if done.returncode:
        raise RecipeError(f"{name} failed: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
