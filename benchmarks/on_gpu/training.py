"""Training end to end: the same rows, first weights and steps by Trimtab and by PEFT, in one process after the other."""

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from on_gpu.machine import Machine, made, tried
from on_gpu.rows import LOADS, TINY, Load, rows, tokens
from peers.floor import least_work, multiplying_rate
from safetensors.torch import load_file, save_file

from trimtab.base import Base
from trimtab.data import pack_all
from trimtab.data.example import TokenRow
from trimtab.engine import check_packing, describe_layers
from trimtab.methods import attach
from trimtab.methods.lora import LoRA
from trimtab.objectives.sft import SFT
from trimtab.train import TrainConfig, plan_training_memory, train

METHOD = LoRA(rank=16, alpha=32.0, targets=["all-linear"])
RATE = 2e-4
DENSE = 989e12
"""FLOP/s of an H100's or H200's bfloat16 products, by its makers."""
WARM = 3
ROWS = 8
"""Of a peer's micro-batch; fewer where they do not fit."""


def _start(machine: Machine, size: str) -> Path:
    """The file with the adapter that every trainer begins with."""
    return machine.out / f"start {size}.safetensors"


def _steps(machine: Machine, load: Load, vocabulary: int, count: int) -> list[list[TokenRow]]:
    return [rows(load, vocabulary, seed, machine.size(600, 60)) for seed in range(count)]


def _timed(machine: Machine, losses: Iterable[float], sizes: list[int], until: float) -> dict[str, Any]:
    """Of steps as they are taken, up to a time; the first few are left out."""
    times, seen = [time.perf_counter()], list[float]()
    for loss in losses:
        machine.wait()
        times.append(time.perf_counter())
        seen.append(loss)
        if len(seen) > WARM and time.time() > until:
            break
    took = [after - before for before, after in itertools.pairwise(times)]
    rates = [size / seconds for size, seconds in zip(sizes[WARM:], took[WARM:], strict=False)]
    return {"tokens_per_s": statistics.median(rates), "steps": len(took), "first_step_s": took[0], "median_step_s":
            statistics.median(took[WARM:]), "losses": seen, **machine.peak()}  # fmt: skip


def ours(machine: Machine, name: str) -> dict[str, Any]:
    size = name.split()[0]
    base = Base(made(machine, size))
    adapter = attach(base.model, METHOD)
    save_file({name: p.detach().cpu() for name, p in adapter.parameters().items()}, _start(machine, size))
    started = time.perf_counter()
    check_packing(base.model)
    found: dict[str, Any] = {"check_s": time.perf_counter() - started, "layers": describe_layers(base.model)}
    rate, loads = multiplying_rate(base.model, machine.size(8192, 32), 3), TINY if machine.tiny else LOADS
    for number, load in enumerate(loads):
        machine.clear()
        steps = _steps(machine, load, base.model.config.vocab_size, WARM + machine.size(10, 2))
        until = time.time() + 0.8 * machine.left / (len(loads) - number)
        result = tried(partial(_ours, machine, base, adapter, steps, until))
        if "error" in result:
            found[load.name] = result
            continue
        measured = steps[WARM : result["steps"]]
        work = least_work(base.model, measured, METHOD) / len(measured)
        result |= {"tflops": work / result["median_step_s"] / 1e12, "of_products": work / rate / result["median_step_s"]}
        found[load.name] = result | {"mfu_of_989": work / DENSE / result["median_step_s"]}
    return found


def _ours(machine: Machine, base: Base, adapter: Any, steps: list[list[TokenRow]], until: float) -> dict[str, Any]:
    config = TrainConfig(schedule="constant", warmup=0.0, epochs=1.0)
    started = time.perf_counter()
    memory = plan_training_memory(base, config, [row for step in steps for row in step])
    planned = time.perf_counter() - started
    machine.clear()
    packs = [pack_all(step, memory.pack_tokens) for step in steps]
    losses = (step.loss for step in train(base, adapter, SFT(), packs, config, RATE, memory))
    result = _timed(machine, losses, tokens(steps), until)
    counted = _waits(machine, lambda: list(train(base, adapter, SFT(), packs[:2], config, RATE, memory)))
    facts = {"plan_s": planned, "plan": memory.summary, "packs_a_step": len(packs[WARM]), "waits_in_2_steps": counted}
    return result | facts


def _waits(machine: Machine, function: Callable[[], Any]) -> dict[str, int] | None:
    """Where the host waited for the device, and how often."""
    if not machine.cuda:
        function()
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{'/'.join(w.filename.split('/')[-2:])}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return {place: places.count(place) for place in sorted(set(places))}


PEERS: dict[str, dict[str, bool]] = {
    "PEFT": {}, "PEFT, by length": {"by_length": True}, "PEFT, gradient checkpointing": {"recompute": True},
    "PEFT and Liger, by length": {"liger": True, "by_length": True},
    "PEFT and Liger, by length, gradient checkpointing": {"liger": True, "by_length": True, "recompute": True},
}  # fmt: skip


def peers(machine: Machine, name: str) -> dict[str, Any]:
    found, loads = dict[str, Any](), TINY if machine.tiny else LOADS
    order = sorted(PEERS, key=lambda peer: not PEERS[peer].get("liger"))  # their best first, in case time is short
    for number, peer in enumerate(order):
        settings = dict(PEERS[peer])
        by_length = settings.pop("by_length", False)
        for at, load in enumerate(loads):
            key, runs = f"{peer}: {load.name}", (len(order) - number) * len(loads) - at
            if machine.left < (0 if machine.tiny else 5):
                found[key] = {"skipped": "no time is left"}
                continue
            until = time.time() + 0.6 * machine.left / runs
            found[key] = tried(partial(_peers_run, machine, name.split()[0], load, by_length, until, **settings))
            machine.clear()
    return found


def _peers_run(machine: Machine, size: str, load: Load, by_length: bool, until: float, **settings: bool) -> dict[str, Any]:
    model = _peer(machine, size, **settings)
    steps = _steps(machine, load, model.config.vocab_size, WARM + machine.size(5, 2))
    return _fitting(machine, model, steps, by_length, until)


def _peer(machine: Machine, size: str, recompute: bool = False, liger: bool = False) -> Any:
    """The model with the adapter on it that Trimtab began with, if that part ran before."""
    import peft

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2
    model: Any = made(machine, size)
    if liger:
        apply_liger_kernel_to_qwen2(model=model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    if (start := _start(machine, size)).exists():
        own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, value in load_file(start).items():
            path, _, factor = name.rpartition(".")
            with torch.no_grad():
                own.pop(f"base_model.model.{path}.lora_{factor}.default.weight").copy_(value)
        assert not own, f"PEFT adapts more than Trimtab: {next(iter(own))}"
    if recompute:
        own = model.base_model.model
        enable = getattr(own, "activation_checkpointing_enable", None) or own.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def _fitting(machine: Machine, model: Any, steps: list[list[TokenRow]], by_length: bool, until: float) -> dict[str, Any]:
    """With micro-batches of as many rows as fit."""
    each = min(ROWS, len(steps[0]))
    while True:
        machine.clear()
        try:
            return _timed(machine, _losses(model, steps, each, by_length), tokens(steps), until) | {"rows": each}
        except torch.OutOfMemoryError:
            if each == 1:
                raise
            model.zero_grad(set_to_none=True)
            each //= 2


def _losses(model: Any, steps: list[list[TokenRow]], each: int, by_length: bool) -> Iterable[float]:
    """Of each step of a plain loop: padded micro-batches, gradients summed, the loss a mean over the step's targets."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    for step in steps:
        ordered = sorted(step, key=lambda row: -len(row.ids)) if by_length else step
        items, total = sum(len(row.target_indices) for row in step), torch.zeros((), device=device)
        for at in range(0, len(ordered), each):
            batch = _batch(ordered[at : at + each], device)
            with torch.autocast(device.type, torch.bfloat16):  # as Trainer's bf16: LoRA's matrices are float32
                loss = model(**batch, num_items_in_batch=items).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield float(total)


def _batch(part: list[TokenRow], device: torch.device) -> dict[str, torch.Tensor]:
    longest = max(len(row.ids) for row in part)
    ids, mask, labels = (torch.full((len(part), longest), fill) for fill in (0, 0, -100))
    for n, row in enumerate(part):
        ids[n, : len(row.ids)], mask[n, : len(row.ids)] = torch.tensor(row.ids), 1
        targets = torch.tensor(list(row.target_indices))
        labels[n, targets] = ids[n, targets]
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def profile(machine: Machine, _: str) -> dict[str, Any]:
    """The kernels of one step of the 7B, by time."""
    from torch.profiler import ProfilerActivity, schedule
    from torch.profiler import profile as profiler

    base = Base(made(machine, "7B"))
    adapter = attach(base.model, METHOD)
    load = (TINY if machine.tiny else LOADS)[0]
    steps = _steps(machine, load, base.model.config.vocab_size, 4)
    config = TrainConfig(schedule="constant", warmup=0.0, epochs=1.0)
    memory = plan_training_memory(base, config, [row for step in steps for row in step])
    packs, times = [pack_all(step, memory.pack_tokens) for step in steps], [time.perf_counter()]
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if machine.cuda else [])]
    with profiler(activities=kinds, schedule=schedule(wait=2, warmup=1, active=1), acc_events=True) as recorded:
        for _step in train(base, adapter, SFT(), packs, config, RATE, memory):
            machine.wait()
            times.append(time.perf_counter())
            recorded.step()
    key = "self_device_time_total" if machine.cuda else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: -getattr(event, key))
    kernels = [event for event in events if not machine.cuda or event.device_type == torch.autograd.DeviceType.CUDA]
    launches = sum(event.count for event in events if "LaunchKernel" in event.key)
    total = sum(getattr(event, key) for event in kernels)
    top = [[event.key[:90], event.count, round(getattr(event, key) / 1e3, 3)] for event in kernels[:25]]
    return {"step_ms": 1e3 * (times[3] - times[2]), "kernels_ms": total / 1e3, "launches": launches, "top_ms": top}
