"""How much memory a pack's activations take, measured, and what therefore fits at a time: a planner instead of a flag."""

import math
import random
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from trimtab.data.example import Sequence
from trimtab.data.pack import pack_flat
from trimtab.engine.forward import pack_logprobs
from trimtab.errors import RecipeError

Recompute = Literal["auto", "none", "full"]
FLAT = 1024
"""Tokens at a time from which more are hardly faster: see docs/performance.md."""
SHARE = 0.7
"""Of the memory that is free, what activations may take; the rest is for what a step needs for a moment, and for others."""


class Memory(NamedTuple):
    """What is computed at a time."""

    pack_tokens: int
    """Tokens in a pack, at most."""
    most_kept: float
    """Packs of more tokens keep the inputs of layers alone, and compute the layers again in the backward pass."""
    kept: float
    """Bytes that the largest pack keeps for its backward pass."""
    words: str


def plan_memory(
    model: Any, longest: int, pack_tokens: int | Literal["auto"], recompute: Recompute, free: float | None = None
) -> Memory:
    """Choose how many tokens are computed at a time, and which packs are recomputed, so that they fit.

    Args:
        model: With what is trained on it.
        longest: Tokens of the longest row, which no pack can cut.
        free: Bytes that may be taken; measured unless given.

    Raises:
        RecipeError: Not even the longest row alone fits, with recomputation.
    """
    device = next(model.parameters()).device
    free = free_memory(device) if free is None else free
    per_token = bytes_per_token(model)
    config = model.config.get_text_config()
    inputs = config.num_hidden_layers * config.hidden_size * next(model.parameters()).element_size()
    recomputed = inputs + per_token / config.num_hidden_layers
    fits = math.floor(SHARE * free / per_token) if math.isfinite(free) else math.inf
    tokens = pack_tokens if pack_tokens != "auto" else int(max(16, min(FLAT, fits)))
    most_kept = {"auto": fits, "none": math.inf, "full": 0}[recompute]
    largest = max(tokens, longest)
    if recompute != "none" and largest > most_kept and largest * recomputed > SHARE * free:
        raise RecipeError(
            f"A pack of {largest:,} tokens needs {largest * recomputed / 1e9:.2f} GB for its activations, even computed again layer by layer, "
            f"and {free / 1e9:.2f} GB are free. Lower data.max_length{'' if pack_tokens == 'auto' else ' or train.pack_tokens'}."
        )
    needs = min(largest, most_kept) * per_token
    again = (
        "nothing is computed twice"
        if largest <= most_kept
        else f"packs of more than {most_kept:,.0f} tokens are computed twice"
    )
    again = "every pack is computed twice" if recompute == "full" else again
    room = f", of {free / 1e9:.1f} GB free" if math.isfinite(free) else ""
    return Memory(
        tokens, most_kept, needs, f"{tokens:,} tokens at a time, up to {needs / 1e9:.2f} GB of activations{room}; {again}"
    )


def bytes_per_token(model: Any) -> float:
    """What a token of a pack keeps for the backward pass, measured on two short packs of made-up tokens."""
    few, more = 4, 24
    return (_kept(model, more) - _kept(model, few)) / (more - few)


def _kept(model: Any, tokens: int) -> int:
    """Bytes that a pack of one row keeps for the backward pass, besides weights."""
    vocabulary = model.config.get_text_config().vocab_size
    draw = random.Random(0)
    row = Sequence([draw.randrange(vocabulary) for _ in range(tokens + 1)], list(range(1, tokens + 1)), "made up")
    device = next(model.parameters()).device
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[Any, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage, storage.nbytes())  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pack_logprobs(model, pack_flat([row]).to(device))
    return sum(size for _, size in kept.values())


def free_memory(device: torch.device) -> float:
    """Bytes that this process may still take, by the device or by the operating system and the container; inf if they don't say."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + held)
    found = [math.inf]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(float(lines["MemAvailable"].split()[0]) * 1024)
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        group = Path("/sys/fs/cgroup")
        if (group / limit).exists() and (most := (group / limit).read_text().strip()) != "max":
            found.append(float(most) - float((group / used).read_text()))
    return max(0.0, min(found))
