"""Ablation of the training step's optimizations: a step with all of them, then without each in turn, alternating, on real examples.

    python benchmarks/ablation.py FILE [--rows 8] [--rounds 3] [--targets all-linear] [--rank 8] [--only NAME ...]

Prints for each how many times longer the step takes without it, and the relative difference of the gradients (rounding in float32:
every optimization computes the same function). Results go to docs/measured/ablation.json.
"""

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

import trimtab
from trimtab.core.process import never_keep_freed_memory
from trimtab.data import pack_all, pack_flat
from trimtab.data.order import shuffled
from trimtab.engine import head, pack_logprobs
from trimtab.engine.backends import cpu
from trimtab.engine.backends import torch as torch_backend
from trimtab.engine.patching import unfused
from trimtab.engine.recompute import Level

ROOT = Path(__file__).parents[1]
PACK_TOKENS = 1024


@contextmanager
def instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def torch_attention() -> Iterator[None]:
    with instead(cpu, "attend", torch_backend.attend), instead(cpu, "attend_backward", torch_backend.attend_backward):
        yield


OFF: dict[str, tuple[str, Callable[[], AbstractContextManager[None]]]] = {
    "fused layers": ("each layer is Transformers' own code", unfused),
    "compiled code": (
        "norms, gates and the softmax's sweep in torch, attention in flash calls",
        lambda: instead(cpu, "load_library", lambda: None),
    ),
    "attention in C": ("a flash call for each block of each segment", torch_attention),
    "vocabulary in tiles": ("all logits at once", lambda: instead(head, "TILE", 1 << 40)),
}
PACKS = {
    "shared prefixes": (
        "each example has its own",
        lambda rows, tokens: [pack_flat(pack.rows) for pack in pack_all(rows, tokens)],
    ),
    "packing": ("one example per micro-batch", lambda rows, tokens: [pack_flat([row]) for row in rows]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", nargs="+", default=["all-linear"])
    parser.add_argument("--only", nargs="+", choices=[*OFF, *PACKS, "no gradient checkpointing"])
    asked = parser.parse_args()
    never_keep_freed_memory()
    base = trimtab.load("smollm2-135m-instruct")
    rows = trimtab.rows(asked.data, base)[: 8 * asked.rows]
    rows = [rows[n] for n in shuffled(len(rows), seed=0, epoch=0)][: asked.rows]
    adapter = trimtab.attach(base.model, trimtab.LoRA(rank=asked.rank, alpha=2.0 * asked.rank, targets=asked.targets))
    parameters = list(adapter.parameters().values())
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    adapter.train()

    def step(packs: list[Any], recompute: Level = "none") -> tuple[float, torch.Tensor]:
        started = time.perf_counter()
        for pack in packs:
            (-pack_logprobs(base.model, pack, recompute=recompute).sum() / 1000).backward()
        seconds = time.perf_counter() - started
        gradient = torch.cat([p.grad.flatten() for p in parameters])
        for parameter in parameters:
            parameter.grad = None
        return seconds, gradient

    packs = pack_all(rows, PACK_TOKENS)
    names = asked.only or [*OFF, *PACKS, "no gradient checkpointing"]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    apart: dict[str, float] = {}
    step(packs)
    for _ in range(asked.rounds):
        for name in names:
            on, reference = step(packs)
            with OFF[name][1]() if name in OFF else contextlib.nullcontext():
                other = PACKS[name][1](rows, PACK_TOKENS) if name in PACKS else packs
                off, gradient = step(other, recompute="full" if name == "no gradient checkpointing" else "none")
            times[name].append((on, off))
            apart[name] = float((gradient - reference).norm() / reference.norm())
            print(f"{name:22} {on:6.2f} s on, {off:6.2f} s off, gradients differ by {apart[name]:.1e}", flush=True)
    results = {
        name: {
            "without": (OFF | PACKS)[name][0] if name in OFF or name in PACKS else "every layer is computed twice",
            "gain": statistics.median(off / on for on, off in pairs),
            "pairs": [off / on for on, off in pairs],
            "gradients_apart": apart[name],
        }
        for name, pairs in times.items()
    }
    words = {"rows": asked.rows, "rank": asked.rank, "targets": asked.targets, "load": os.getloadavg()[0]}
    (ROOT / "docs" / "measured" / "ablation.json").write_text(json.dumps({**words, "tricks": results}, indent=1) + "\n")
    for name, one in sorted(results.items(), key=lambda pair: -pair[1]["gain"]):
        print(f"| {name} | {one['without']} | {one['gain']:.2f}x | {one['gradients_apart']:.0e} |")


if __name__ == "__main__":
    main()
