"""Is it exact on this device? Each thing compared with float64, beside what Transformers or PyTorch themselves are off by."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from on_gpu.machine import Machine, tried
from torch import Tensor

import trimtab
from trimtab.base import Base
from trimtab.core.attention import without_cudnn
from trimtab.data import pack_all
from trimtab.data.example import TokenRow
from trimtab.data.prefix_tree import Segment
from trimtab.engine import describe_layers, pack_logprobs
from trimtab.engine.backends import AttentionInputs, AttentionPlan, Heads, Norm, backend_for
from trimtab.engine.backends import torch as reference
from trimtab.methods import attach
from trimtab.methods.lora import LoRA

TREES = {
    "rows": ((0, 180, -1), (180, 181, -1), (181, 700, -1)),
    "tree": ((0, 24, -1), (24, 170, 0), (170, 180, 1), (180, 500, 0), (500, 501, -1), (501, 640, 4)),
    "prefix": ((0, 1000, -1), *((1000 + 64 * n, 1064 + 64 * n, 0) for n in range(8))),
}
HEADS = {"12/2 of 128": Heads(2, 6, 128), "14/2 of 64": Heads(2, 7, 64), "4/4 of 80": Heads(4, 1, 80)}


def attention(machine: Machine, _: str) -> dict[str, Any]:
    """The back end's attention against float64: ‖Δ‖/‖ref‖ of the result and of each gradient, in each case."""
    found = dict[str, dict[str, Any]]()
    for tree, (heads, shape), virtual, window in product(TREES, HEADS.items(), (0, 5), (None, 100)):
        if machine.tiny and (heads != "14/2 of 64" or tree == "prefix"):
            continue
        segments = tuple(Segment(*each) for each in TREES[tree])
        plan = AttentionPlan(segments, shape, shape.size**-0.5, window=window, virtual=virtual)
        case = tried(partial(_attention, machine, plan)) if machine.left > 3 else {"skipped": "no time is left"}
        found[f"{tree}, {heads}, {virtual} virtual, window {window}"] = case
    apart = [value for case in found.values() for value in case.values() if isinstance(value, float)]
    ways = sorted({case["way"] for case in found.values() if "way" in case})
    failed = sum("error" in case for case in found.values())
    return {"worst": max(apart, default=None), "ways": ways, "failed": failed, "cases": found}


def drawn(plan: AttentionPlan) -> tuple[list[Tensor], Tensor]:
    """The tensors of AttentionInputs, and a gradient."""
    draw, tokens, heads = torch.Generator().manual_seed(0), plan.segments[-1].end, plan.heads
    wide, narrow = heads.groups * heads.per_group * heads.size, heads.groups * heads.size
    q, k, v, dout = (torch.randn(tokens, width, generator=draw) for width in (wide, narrow, narrow, wide))
    angles = torch.randn(tokens, heads.size // 2, generator=draw).repeat(1, 2)
    virtual = [torch.randn(heads.groups, plan.virtual, heads.size, generator=draw) for _ in range(2)] if plan.virtual else []
    return [q, k, v, angles.cos(), angles.sin(), *virtual], dout


def _attention(machine: Machine, plan: AttentionPlan) -> dict[str, Any]:
    inputs, dout = drawn(plan)
    ours = AttentionInputs(*(t.to(machine.device, machine.dtype) for t in inputs))
    own_gradient = dout.to(machine.device, machine.dtype)
    place = machine.device if machine.cuda else "cpu"  # others may have no float64
    exact, exact_gradient = (
        AttentionInputs(*(t.to(place).double() for t in ours if t is not None)),
        own_gradient.to(place).double(),
    )
    results = []
    for backend, tensors, gradient in ((backend_for(ours.q), ours, own_gradient), (reference, exact, exact_gradient)):
        out, saved = backend.attend(tensors, plan, True)
        results.append([out, *backend.attend_backward(gradient, saved, plan)])
    names = ("out", "dq", "dk", "dv", "dvirtual_k", "dvirtual_v")
    apart = {name: distance(a, b) for name, a, b in zip(names, *results, strict=False) if a is not None and b is not None}
    return {"way": way(machine, ours.q, plan), **apart}


def way(machine: Machine, q: Tensor, plan: AttentionPlan) -> str:
    from trimtab.engine.backends.ways import way_of

    return way_of(q, plan, False).name if machine.cuda else backend_for(q).__name__  # type: ignore[attr-defined]


def distance(ours: Tensor, exact: Tensor) -> float:
    """Relative to the size of the exact one; NaN is as far as can be."""
    apart = float((ours.detach().cpu().double() - exact.detach().cpu().double()).norm() / exact.detach().cpu().double().norm())
    return apart if apart == apart else float("inf")


def passes(machine: Machine, _: str) -> dict[str, Any]:
    """Norms, gates and softmax against float64, and PyTorch's own in this dtype."""
    from trimtab.engine.backends.probing import probes

    found: dict[str, Any] = {}
    for n in (64, 96) if machine.tiny else (1536, 3584, 8960, 18_944):
        x, dy, u = (machine.random(257, n) for _ in range(3))
        norm = Norm(machine.random(n), 0.0, 1e-6)
        double = Norm(norm.weight.cpu().double(), 0.0, 1e-6)
        exact_y, exact_rstd = reference.rms_norm(x.cpu().double(), double)
        exact_dx = reference.rms_norm_backward(dy.cpu().double(), x.cpu().double(), double, exact_rstd)
        exact_gates = [reference.gate(x.cpu().double(), u.cpu().double(), "silu")]
        exact_gates += reference.gate_backward_(dy.cpu().double(), x.cpu().double(), u.cpu().double(), "silu")[:2]
        for name, backend in (("ours", backend_for(x)), ("torch", reference)):
            y, rstd = backend.rms_norm(x, norm)
            dx = backend.rms_norm_backward(dy, x, norm, rstd)
            gates = [backend.gate(x, u, "silu"), *backend.gate_backward_(dy.clone(), x, u, "silu")[:2]]
            pairs = zip((y, dx, *gates), (exact_y, exact_dx, *exact_gates), strict=True)
            found[f"{name} {n}"] = dict(zip(("norm", "dnorm", "gate", "dg", "du"), (distance(*p) for p in pairs), strict=True))
    return {"distances": found, "probes": [f"{p.what} {p.key}: {p.problem or 'proved'}" for p in probes()]}


FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": {}, "Qwen3": {"head_dim": 64}, "Llama": {}, "Gemma3": {"head_dim": 64, "sliding_window": 64},
}  # fmt: skip


def layers(machine: Machine, _: str) -> dict[str, Any]:
    """Models of two layers: how far packed passes by hand are from float64, and how far Transformers' own code is."""
    found = {}
    for name, settings in FAMILIES.items():
        if machine.left < 5:
            break
        found[name] = tried(partial(_distances, machine, name, settings))
    return found


def _distances(machine: Machine, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    exact, adapter = _model(machine, name, settings, torch.float64)
    truth = _alone(exact, adapter, _rows(machine))
    half, adapter = _model(machine, name, settings, machine.dtype)
    theirs = _alone(half, adapter, _rows(machine))
    ours = _packed(half, adapter, _rows(machine))
    found: dict[str, Any] = {"layers": describe_layers(half)}
    for what in ("logprobs", "gradients"):
        mine, hf = distance(ours[what], truth[what]), distance(theirs[what], truth[what])
        found[what] = {"ours": mine, "transformers": hf, "ratio": mine / hf if hf else None}
    return found


def _model(machine: Machine, name: str, settings: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Any]:
    import transformers

    kind = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    sizes = (64, 96, 101, 4) if machine.tiny else (512, 1024, 4001, 8)
    names = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")
    shape = dict(zip(names, sizes, strict=True)) | {"num_key_value_heads": 2, "num_hidden_layers": 2}
    config = getattr(transformers, kind)(**{**shape, **settings}, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)  # on the CPU: the same for all dtypes
    model = model.eval().requires_grad_(False).to(machine.dtype).to(dtype).to(machine.device)
    adapter = attach(model, LoRA(rank=8, targets=["all-linear"]))
    for number, parameter in enumerate(adapter.parameters().values()):
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model, adapter


def _rows(machine: Machine) -> list[TokenRow]:
    draw, (most, vocabulary) = torch.Generator().manual_seed(3), (40, 101) if machine.tiny else (300, 4001)
    head = torch.randint(vocabulary, (16,), generator=draw).tolist()
    made = []
    for number in range(6):
        ids = head + torch.randint(vocabulary, (most - 3 * number,), generator=draw).tolist()
        made.append(TokenRow(ids, list(range(16, len(ids))), f"row {number}", len(ids)))
    return made


def _alone(model: Any, adapter: Any, rows: list[TokenRow]) -> dict[str, Tensor]:
    totals = []
    for row in rows:
        ids = torch.tensor([row.ids], device=next(model.parameters()).device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        totals.append(logprobs.gather(1, ids[0, 1:, None])[[at - 1 for at in row.target_indices]].sum())
    return _with_gradients(torch.stack(totals), adapter)


def _packed(model: Any, adapter: Any, rows: list[TokenRow]) -> dict[str, Tensor]:
    (pack,) = pack_all(rows, 10**6)
    logprobs = pack_logprobs(model, pack.to(next(model.parameters()).device))
    order = [[row.where for row in pack.rows].index(row.where) for row in rows]
    return _with_gradients(logprobs[order], adapter)


def _with_gradients(logprobs: Tensor, adapter: Any) -> dict[str, Tensor]:
    parameters = list(adapter.parameters().values())
    gradients = torch.autograd.grad(logprobs.sum(), parameters)
    return {"logprobs": logprobs, "gradients": torch.cat([g.flatten().double().cpu() for g in gradients])}


def trap(machine: Machine, _: str) -> dict[str, Any]:
    """NaN in dQ by cuDNN's backward pass of masked attention where keys % 128 == 64 and scores are very negative (pytorch #196678)."""

    def nans() -> int:
        torch.manual_seed(0)
        q, k, v = (machine.random(1, 4, length, 64).requires_grad_() for length in (64, 192, 192))
        mask = torch.ones(64, 192, dtype=torch.bool, device=machine.device).tril(128)
        with torch.no_grad():
            q.copy_(30 * torch.ones_like(q))
            k.copy_(-30 * torch.ones_like(k) + 0.1 * k)
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()
        return sum(int(t.grad.isnan().sum()) for t in (q, k, v))  # type: ignore[union-attr]

    default = nans()
    with without_cudnn():
        return {"nan_by_default": default, "nan_as_trimtab_calls_it": nans()}


def deterministic(machine: Machine, _: str) -> dict[str, Any]:
    """Two runs of a few steps, with train.deterministic and without: the same bits?"""
    from on_gpu.machine import made
    from on_gpu.rows import Load, rows

    def trained(settings: dict[str, Any]) -> Iterator[Tensor]:
        base = Base(made(machine, "1.5B", layers=2))
        adapter = attach(base.model, LoRA(rank=8, targets=["all-linear"]))
        data = rows(Load("chat", machine.size(32, 8)), base.model.config.vocab_size, 0, machine.size(600, 60))
        list(trimtab.fit(base, adapter, data, epochs=1, lr=1e-3, rows_per_step=machine.size(16, 4), **settings))
        yield from (parameter.detach().cpu() for parameter in adapter.parameters().values())

    found: dict[str, Any] = {}
    known = {"pack_tokens": 4096, "recompute": "none"}
    for name, settings in {"deterministic": known | {"deterministic": True}, "otherwise": known}.items():
        pairs = list(zip(trained(settings), trained(settings), strict=True))
        found[name] = {"equal": all(torch.equal(a, b) for a, b in pairs), "apart": max(distance(a, b) for a, b in pairs)}
    return found
