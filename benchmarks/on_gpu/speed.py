"""How fast the device is, and Trimtab's parts on it."""

import platform
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from on_gpu.machine import SHAPES, Machine, made, tried
from on_gpu.right import drawn, way
from on_gpu.rows import Load, rows

from trimtab.core.attention import without_cudnn
from trimtab.data import pack_all
from trimtab.data.prefix_tree import Segment
from trimtab.engine import generate, pack_logprobs
from trimtab.engine.backends import AttentionInputs, AttentionPlan, Heads, Norm, backend_for
from trimtab.engine.backends import torch as reference
from trimtab.engine.backends.survey import survey


def probe(machine: Machine, _: str) -> dict[str, Any]:
    """The machine and its versions, and which ways are taken on it."""
    import transformers

    names = (
        "triton",
        "peft",
        "accelerate",
        "liger_kernel",
        "flash_attn_interface",
        "flash_attn",
        "bitsandbytes",
        "gguf",
        "datasets",
    )
    found: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "device": str(machine.device), "cuda": torch.version.cuda, "hip": torch.version.hip,
        "there": {name: _version(name) for name in names},
    }  # fmt: skip
    if machine.cuda:
        card = torch.cuda.get_device_properties(machine.device)
        found |= {"card": card.name, "capability": [card.major, card.minor], "memory_gb": card.total_memory / 1e9}
    return found | {"ways": [way._asdict() for way in survey(machine.device)]}


def _version(name: str) -> str | None:
    if find_spec(name) is None:
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "there"


def ceilings(machine: Machine, _: str) -> dict[str, Any]:
    """Products in TFLOP/s, large and of the models' shapes; a copy in TB/s."""
    found = {}
    most, tokens = machine.size(8192, 64), machine.size(8192, 64)
    shapes = {"square": (most, most, most)}
    for name in ("tiny",) if machine.tiny else ("1.5B", "7B"):
        shape = SHAPES[name]
        d, f, v, narrow = (shape[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "num_key_value_heads"))
        narrow *= d // shape["num_attention_heads"]
        each = {
            "q or o": (d, d),
            "k or v": (d, narrow),
            "qkv": (d, d + 2 * narrow),
            "gate or up": (d, f),
            "gate and up": (d, 2 * f),
        }
        each |= {"gate and up, 32 more": (d, 2 * f + 32), "down": (f, d), "32 thin": (d, 32)}
        shapes |= {f"{name} {what}": (tokens, *size) for what, size in each.items()}
        shapes[f"{name} head, 2,048 rows"] = (min(tokens, 2048), d, v)
    for name, (m, k, n) in shapes.items():
        a, b, out = machine.random(m, k), machine.random(n, k), machine.random(m, n)
        seconds = machine.seconds(lambda a=a, b=b, out=out: torch.mm(a, b.T, out=out), budget=0.3)
        found[name] = 2 * m * k * n / seconds / 1e12
    x = machine.random(machine.size(2**30, 2**14))
    y = torch.empty_like(x)
    copied = machine.seconds(lambda: y.copy_(x), budget=0.3)
    return {"tflops": found, "copy_tb_per_s": 2 * x.nbytes / copied / 1e12}


def micro(machine: Machine, _: str) -> dict[str, Any]:
    """Passes in GB/s, attention in TFLOP/s, the head in microseconds a target."""
    found: dict[str, Any] = {"passes_gb_per_s": {}, "attention": {}, "head": {}}
    tokens = machine.size(8192, 32)
    for n, f in ((64, 96),) if machine.tiny else ((1536, 8960), (3584, 18_944)):
        found["passes_gb_per_s"][f"{n}, {f}"] = _passes(machine, tokens, n, f)
    loads = {
        "rows of 180": [(180, None)] * (tokens // 180), "rows of 1k": [(1024, None)] * (tokens // 1024),
        "rows of 4k": [(4096, None)] * (tokens // 4096), "2,000 and 32 of 200": [(2000, None)] + [(200, 0)] * 32,
    }  # fmt: skip
    for name, lengths in ({"rows of 16": [(16, None)] * 2} if machine.tiny else loads).items():
        found["attention"][name] = tried(partial(_attention, machine, lengths))
    found["attention"]["PyTorch's causal attention, 2 of 4k"] = _causal(machine)
    found["head"] = _head(machine)
    return found


def _passes(machine: Machine, tokens: int, n: int, f: int) -> dict[str, Any]:
    x, dy, g, u, dh = (machine.random(tokens, width) for width in (n, n, f, f, f))
    norm, result, size = Norm(machine.random(n), 0.0, 1e-6), {}, x.element_size()
    logits = machine.random(machine.size(2048, 8), machine.size(151_936, 211))
    top, total = (torch.full((len(logits),), fill, device=machine.device) for fill in (-3e38, 0.0))
    for name, backend in (("ours", backend_for(x)), ("torch", reference)):
        _, rstd = backend.rms_norm(x, norm)
        calls = {  # and how many numbers each reads and writes
            "norm": (2 * x.numel(), lambda b=backend: b.rms_norm(x, norm)),
            "norm backward": (4 * x.numel(), lambda b=backend, r=rstd: b.rms_norm_backward(dy, x, norm, r, dy)),
            "gate": (3 * g.numel(), lambda b=backend: b.gate(g, u, "silu")),
            "gate backward": (6 * g.numel(), lambda b=backend: b.gate_backward_(dh, g, u, "silu")),
            "softmax": (3 * logits.numel(), lambda b=backend: b.softmax_tile_(logits, top.clone(), total.clone())),
        }
        result[name] = {what: size * count / machine.seconds(call, 3, 0.2) / 1e9 for what, (count, call) in calls.items()}
    return result


def _attention(
    machine: Machine,
    lengths: list[tuple[int, int | None]],
) -> dict[str, Any]:
    segments, at, heads = [], 0, Heads(2, 2, 16) if machine.tiny else Heads(4, 7, 128)
    for length, parent in lengths:
        segments.append(Segment(at, at + length, -1 if parent is None else parent))
        at += length
    plan = AttentionPlan(tuple(segments), heads, heads.size**-0.5)
    inputs, dout = drawn(plan)
    on_device = AttentionInputs(*(t.to(machine.device, machine.dtype) for t in inputs))
    gradient, backend = dout.to(machine.device, machine.dtype), backend_for(on_device.q)
    pairs = sum(n * (n + 1) // 2 + (lengths[p][0] * n if p is not None else 0) for n, p in lengths)
    work = 4 * plan.heads.groups * plan.heads.per_group * plan.heads.size * pairs

    def both() -> None:
        _, saved = backend.attend(on_device, plan, True)
        backend.attend_backward(gradient, saved, plan)

    forward = machine.seconds(lambda: backend.attend(on_device, plan, False), 3, 0.3)
    whole = machine.seconds(both, 3, 0.3)
    rates = {"forward_tflops": work / forward / 1e12, "both_tflops": 3.5 * work / whole / 1e12}
    return {"way": way(machine, on_device.q, plan), "forward_ms": 1e3 * forward, "both_ms": 1e3 * whole, **rates}


def _causal(machine: Machine) -> dict[str, Any]:
    length = machine.size(4096, 16)
    q, k, v, dout = (machine.random(2, 28, length, 128).requires_grad_() for _ in range(4))

    def both() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(dout)

    with without_cudnn():
        whole = machine.seconds(both, 3, 0.3)
    return {"both_ms": 1e3 * whole, "both_tflops": 3.5 * 4 * 2 * 28 * 128 * length * (length + 1) / 2 / whole / 1e12}


def _head(machine: Machine) -> dict[str, Any]:
    """log p of 4,096 targets and the gradient, by a model of one thin layer; and by logits and cross-entropy."""
    model = made(machine, "7B", layers=1, intermediate_size=64, num_attention_heads=1, num_key_value_heads=1, head_dim=16)
    model.model.embed_tokens.weight.requires_grad_()  # so that there is a backward pass
    (pack,) = pack_all(rows(Load("one", 1, machine.size(4097, 40)), model.config.vocab_size, 0), 10**6)
    pack, targets = pack.to(machine.device), machine.size(4096, 39)

    def ours() -> None:
        pack_logprobs(model, pack).sum().backward()

    hidden, weight = machine.random(targets, model.config.hidden_size).requires_grad_(), model.lm_head.weight
    wanted = torch.randint(len(weight), (targets,), device=machine.device)

    def theirs() -> None:
        F.cross_entropy((hidden @ weight.T).float(), wanted, reduction="sum").backward()

    return {name: 1e6 * machine.seconds(call, 3, 0.3) / targets for name, call in (("ours_us", ours), ("logits_us", theirs))}


def decoding(machine: Machine, _: str) -> dict[str, Any]:
    """Tokens a second of greedy generation, for one prompt and for 32."""
    model, found = made(machine, "1.5B"), {}
    for count in (1, 32):
        prompts = [row.ids[:100] for row in rows(Load("prompts", count), model.config.vocab_size, 0)]
        new = machine.size(64, 4)
        generate(model, prompts, [], max_new_tokens=2)
        seconds = machine.seconds(lambda p=prompts, n=new: generate(model, p, [], max_new_tokens=n), 2, 0.1)
        found[f"{count} prompts"] = {"tokens_per_s": count * new / seconds, "ms_a_step": 1e3 * seconds / new}
    return found
