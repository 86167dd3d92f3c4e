"""The comparison: the same examples, steps and first weights for every trainer, one process after the other, in turns."""

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
from typing import Any, Literal

import torch
from peers.floor import least_work, multiplying_rate

from trimtab.base import Base, ModelConfig
from trimtab.base.config import resolve_device, resolve_dtype
from trimtab.core import files
from trimtab.core.errors import RecipeError
from trimtab.core.process import environment
from trimtab.data import DataConfig, load_data, row_groups
from trimtab.data.example import TokenRow
from trimtab.data.mismatched import with_mismatched
from trimtab.data.order import shuffled
from trimtab.deploy import save_adapter
from trimtab.methods import attach
from trimtab.methods.lora import LoRA
from trimtab.objectives import Objective

HERE = Path(__file__).parent
TRIMTAB = "trimtab"
PEERS: dict[str, dict[str, Any]] = {
    "hf-peft": {"library": "transformers", "recompute": True, "grouped": False},
    "hf-peft-no-recompute": {"library": "transformers", "recompute": False, "grouped": False},
    "hf-peft-grouped": {"library": "transformers", "recompute": False, "grouped": True},
    "trl": {"library": "trl", "recompute": True, "grouped": False},
    "trl-no-recompute": {"library": "trl", "recompute": False, "grouped": False},
}
"""Hugging Face Trainer with PEFT as its tutorials set it (gradient checkpointing on), without gradient checkpointing, and with
batches of similar length too, which is its best; TRL's trainers at their defaults, and without gradient checkpointing."""
NEEDS = {"transformers": ("transformers", "peft", "accelerate"), "trl": ("trl", "peft", "datasets")}
"""The packages that each library's run imports."""


@dataclass
class Settings:
    """What is compared on what."""

    data: str | None = None
    """The training examples; unless given, random ones of chat-like lengths."""
    model: str = "smollm2-135m-instruct"
    device: str = "auto"
    """Where every run computes, and in which dtype the model is: see ModelConfig."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    rows: int = 64
    """How many examples each run trains on, once."""
    rows_per_step: int = 8
    rank: int = 8
    targets: tuple[str, ...] = ("all-linear",)
    pairs: int = 3
    """How often each trainer runs."""
    objective: str = "sft"
    """sft, dpo or kto."""
    against: tuple[str, ...] = ("hf-peft", "hf-peft-no-recompute", "hf-peft-grouped")
    python: str = sys.executable
    """The interpreter that has the peers."""


def compare(settings: Settings, on_run: Callable[[str, dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Run each trainer `pairs` times, in turns.

    Args:
        on_run: Called with the trainer's name and the result after every run.

    Returns:
        A summary of each trainer: see `summary`.

    Raises:
        RecipeError: A peer is unknown, or not installed where it is looked for; or a run failed.
    """
    if settings.rows % settings.rows_per_step:
        raise RecipeError(
            f"--rows: {settings.rows} examples do not make whole steps of {settings.rows_per_step} (--rows-per-step)."
        )
    for name in settings.against:
        if name not in PEERS:
            raise RecipeError(f"--against: {name!r} is none of {', '.join(PEERS)}.")
        if settings.objective != "sft" and PEERS[name]["library"] != "trl":
            raise RecipeError(f"--against: {name} has no {settings.objective}; trl and trl-no-recompute have.")
        _check_installed(settings.python, PEERS[name]["library"])
    asked = ModelConfig(name=settings.model, device=settings.device, dtype=settings.dtype)
    device = resolve_device(asked)
    place = {"device": device.type, "dtype": str(resolve_dtype(asked, device)).removeprefix("torch.")}
    base = Base.load(ModelConfig(name=settings.model, device="cpu", dtype=place["dtype"]))  # the device is for the runs
    objective = Objective.pick(settings.objective)
    rows = load_rows(settings, base, objective)
    objective = objective.resolve_auto(rows)
    method = LoRA(rank=settings.rank, alpha=2.0 * settings.rank, targets=settings.targets)
    with tempfile.TemporaryDirectory() as folder:
        spec = {**prepare(settings, base, rows, method, Path(folder)), "objective": objective.plain(), **place}
        steps = [rows[at : at + settings.rows_per_step] for at in range(0, len(rows), settings.rows_per_step)]
        work = least_work(base.model, steps, method) if settings.objective == "sft" else None
        tokens = sum(row.full_length for row in rows if row.side != "mismatched")
        done: dict[str, list[dict[str, Any]]] = {TRIMTAB: [], **{name: [] for name in settings.against}}
        for number in range(settings.pairs):
            for name, results in done.items():
                before = multiplying_rate(base.model, device=device)
                result = _run(name, spec, settings.python, Path(folder), device)
                rate = max(before, multiplying_rate(base.model, device=device))
                result |= {
                    "trainer": name,
                    "round": number + 1,
                    "tokens_per_s": tokens / result["seconds"],
                    "rows_per_min": 60 * settings.rows / result["seconds"],
                    "gemm_rate": rate,
                    "gemm_floor_fraction": work / rate / result["seconds"] if work is not None else None,
                    "load": os.getloadavg()[0],
                }
                results.append(result)
                on_run(name, result)
    return [summary(name, results, done[TRIMTAB]) for name, results in done.items()]


def summary(name: str, results: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of a trainer's runs; by the pair, how many times as fast Trimtab is, and which part of the memory it takes."""
    pairs = [theirs["seconds"] / our["seconds"] for theirs, our in zip(results, ours, strict=True)]
    same = not PEERS.get(name, {}).get("grouped")  # else its batches are others
    distances = [abs(a - b) / abs(b) for a, b in zip(results[0]["losses"], ours[0]["losses"], strict=True)] if same else []

    def middle(key: str) -> float:
        return statistics.median(result[key] for result in results)

    return {
        "trainer": name,
        "tokens_per_s": middle("tokens_per_s"),
        "rows_per_min": middle("rows_per_min"),
        "peak_rss_gb": middle("peak_gb"),
        "gemm_floor_fraction": None if results[0]["gemm_floor_fraction"] is None else middle("gemm_floor_fraction"),
        "losses": results[0]["losses"],
        "trimtab_is_faster": statistics.median(pairs),
        "pairs": pairs,
        "trimtab_memory": statistics.median(
            our["peak_gb"] / theirs["peak_gb"] for theirs, our in zip(results, ours, strict=True)
        ),
        "loss_distance": max(distances) if distances else None,
        "runs": [{key: value for key, value in result.items() if key != "losses"} for result in results],
    }


def load_rows(settings: Settings, base: Base, objective: Objective) -> list[TokenRow]:
    """The examples as tokens, in the order in which every run trains on them."""
    if settings.data is None and settings.objective != "sft":
        raise RecipeError(f"--objective {settings.objective}: give examples with --data; none are made up for it.")
    if settings.data is None:
        rows = list(_random_rows(settings.rows, base.model.config.get_text_config().vocab_size))
    else:
        config = DataConfig(train=(settings.data,), eval=0.0)
        rows = load_data(config, base, base.context_length, 0, objective.data_kind).train
    whole = row_groups(rows)[: settings.rows]
    if len(whole) < settings.rows:
        raise RecipeError(
            f"--rows: {settings.data} has {len(whole):,} examples, not {settings.rows:,}. Ask for as many as it has, or fewer."
        )
    chosen = [rows[n] for unit in shuffled(len(whole), seed=0, epoch=0) for n in whole[unit]]
    return with_mismatched(chosen, 0, base.context_length) if objective.estimates_kl else chosen


def _random_rows(count: int, vocabulary: int) -> Iterator[TokenRow]:
    """Random tokens in rows of chat-like lengths (median 160, up to 600), three quarters of each trained on, no shared prefix."""
    draw = random.Random(0)
    for number in range(count):
        length = min(600, max(24, round(draw.lognormvariate(5.08, 0.6))))
        ids = [draw.randrange(vocabulary) for _ in range(length)]
        yield TokenRow(ids, list(range(length // 4, length)), f"made up {number}", length)


def prepare(settings: Settings, base: Base, rows: list[TokenRow], method: LoRA, folder: Path) -> dict[str, Any]:
    """What every run reads: the model as a folder that Transformers can open, the first weights, and the tokens."""
    base.model.save_pretrained(folder / "model")
    if base.tokenizer is not None:
        base.tokenizer.save_pretrained(folder / "model")
    base = Base.load(ModelConfig(name=str(folder / "model"), device="cpu", dtype=_name_of(base)))
    adapter = attach(base.model, method)
    save_adapter(base, adapter, folder / "start")
    adapter.detach()
    return {
        "model": str(folder / "model"),
        "start": str(folder / "start"),
        "scratch": str(folder / "scratch"),
        "rows": [{"ids": row.ids, "targets": list(row.target_indices), "side": row.side} for row in rows],
        "rows_per_step": settings.rows_per_step,
        "lr": 2e-4,
        "device": "cpu",
        "dtype": _name_of(base),
    }


def _name_of(base: Base) -> Any:
    return str(next(base.model.parameters()).dtype).removeprefix("torch.")


def _check_installed(python: str, library: str) -> None:
    program = f"import importlib.util as u; print(*[n for n in {NEEDS[library]!r} if not u.find_spec(n)])"
    try:
        missing = subprocess.run(
            [python, "-c", program], capture_output=True, text=True, check=True, timeout=60, env=_safe_environment()
        ).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise RecipeError(f"--python: {python} can't be run: {error}") from None
    if missing:
        raise RecipeError(
            f"--against: {library} needs {', '.join(missing)}, which {python} does not have. Install them in an environment of their own "
            "(pip install peft trl accelerate) and name its interpreter with --python."
        )


def _safe_environment() -> dict[str, str]:
    """For an interpreter that may be another one: it does not import what lies in the folder that it is run in (from 3.11 on)."""
    return environment() | {"PYTHONSAFEPATH": "1"}


def only(device: torch.device, visible: str | None) -> dict[str, str]:
    """The environment in which a process sees no other CUDA device: Trainer would train on all of them.

    Args:
        visible: CUDA_VISIBLE_DEVICES here.
    """
    if device.type != "cuda":
        return {}
    number = device.index or 0
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[number] if visible else str(number)}


def _run(name: str, spec: dict[str, Any], python: str, folder: Path, device: torch.device) -> dict[str, Any]:
    path = folder / f"{name}.json"
    files.write_json(path, {**spec, **PEERS.get(name, {})})
    command = [sys.executable, str(HERE), "one"] if name == TRIMTAB else [python, str(HERE / "run_peer.py")]
    own = _safe_environment() | only(device, os.environ.get("CUDA_VISIBLE_DEVICES"))
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False, env=own)
    if done.returncode:
        raise RecipeError(f"{name} failed: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
