"""Triton's kernels in its interpreter, on the CPU: a process of its own, which prints what is wrong with each check as JSON.

Triton reads TRITON_INTERPRET when it is imported. Its interpreter cuts numbers off where a GPU rounds them to bfloat16, so that
conversion is replaced here.
"""

import importlib.util
import json
import os
import sys
import tempfile
import warnings
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import torch.nn.functional as F
import triton.runtime.interpreter as interpreter
from accelerators import cuda_backend
from families import perturb, random_rows, tiny
from varlen import VarlenOperations

from trimtab.data.example import TokenRow
from trimtab.data.pack import pack_tree
from trimtab.engine import pack_logprobs
from trimtab.engine.backends import Norm, flash, passes, probing, triton_passes, ways
from trimtab.engine.backends import torch as reference
from trimtab.engine.backends.survey import survey
from trimtab.methods import attach
from trimtab.methods.lora import LoRA

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def round_as_hardware():
    cut = interpreter._convert_float

    def converted(numbers, given, wanted, mode):
        if (given.name, wanted.name) != ("fp32", "bf16"):
            return cut(numbers, given, wanted, mode)
        rounded = torch.from_numpy(np.array(numbers, np.float32)).bfloat16()
        return rounded.view(torch.uint16).numpy()

    interpreter._convert_float = converted


def drawn(*shape, dtype, seed=0, columns=0):
    """Random numbers; as some columns of a wider matrix if asked."""
    wide = torch.randn(*shape[:-1], shape[-1] + columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return wide[..., columns // 2 : columns // 2 + shape[-1]]


def rounded_once(ours, exact):
    """Ours are the exact numbers (float64), computed in float32 and rounded once."""
    assert ours.shape == exact.shape, (ours.shape, exact.shape)
    exact = exact.double()
    bits = torch.finfo(ours.dtype).eps / 2 if ours.dtype != torch.float32 else 0.0
    bound = bits * exact.abs() + 1e-6 * float(exact.abs().max() if exact.numel() else 0.0) + torch.finfo(ours.dtype).tiny
    apart = (ours.double() - exact).abs() / bound
    assert not (~(apart <= 1)).any(), f"{float(apart.max()):.3g} times what rounding explains"


def check_norms(module, dtype):
    for rows, n, columns, offset in (
        (5, 72, 6, 1.0),
        (3, 2, 2, 0.0),
        (1100, 3, 0, 0.0),
        (2, 1000, 24, 0.0),
        (0, 8, 0, 0.0),
        (1, 4097, 1, 1.0),
    ):
        x, dy, residual = (drawn(rows, n, dtype=dtype, seed=seed, columns=columns) for seed in (0, 1, 2))
        weight = drawn(n, dtype=torch.float32 if n == 1000 else dtype, seed=3)
        leaf = x.double().requires_grad_()
        exact = leaf / (leaf.square().mean(1, keepdim=True) + 1e-5).sqrt() * (offset + weight.double())
        norm = Norm(weight, offset, 1e-5)
        y, rstd = module.rms_norm(x, norm)
        assert rstd.dtype == torch.float32
        rounded_once(y, exact.detach())
        (dx,) = torch.autograd.grad(exact, leaf, dy.double())
        rounded_once(module.rms_norm_backward(dy, x, norm, rstd), dx)
        rounded_once(module.rms_norm_backward(dy, x, norm, rstd, residual), dx + residual.double())
        if rows == 2:  # each head by itself, of some columns of a matrix
            several = [drawn(3, 4 * n, dtype=dtype, seed=seed, columns=8).unflatten(1, (4, n)) for seed in (4, 5, 6)]
            apart = [t.reshape(-1, n) for t in several]
            ours, sums = module.rms_norm(several[0], norm)
            assert torch.equal(ours.flatten(0, 1), module.rms_norm(apart[0], norm)[0])
            ours = module.rms_norm_backward(several[1], several[0], norm, sums, several[2])
            assert torch.equal(ours.flatten(0, 1), module.rms_norm_backward(apart[1], apart[0], norm, sums.flatten(), apart[2]))
        wide = torch.full((rows, n + 5), 7.0, dtype=dtype)
        module.rms_norm(x, norm, out=wide[:, :n])
        assert torch.equal(wide[:, :n], y)
        assert bool((wide[:, n:] == 7).all())


def check_gates(module, dtype):
    for activation, act in (("silu", F.silu), ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"))):
        for rows, n, columns in ((3, 17, 3), (1, 2100, 0), (0, 4, 0)):
            g, u = (4 * drawn(rows, n, dtype=dtype, seed=seed, columns=columns) for seed in (0, 1))
            g[:1, :4] = torch.tensor([-200.0, 200.0, 0.0, -87.5], dtype=dtype)
            dh = drawn(rows, n, dtype=dtype, seed=2, columns=2 * columns)
            leaves = [t.double().clone().requires_grad_() for t in (g, u)]
            exact = act(leaves[0]) * leaves[1]
            gradients = torch.autograd.grad(exact, leaves, dh.double())
            rounded_once(module.gate(g, u, activation), exact.detach())
            dg, du, h = module.gate_backward_(dh, g, u, activation)
            for ours, one in ((dg, gradients[0]), (du, gradients[1]), (h, exact.detach())):
                rounded_once(ours, one)
            assert not rows or (du.data_ptr() == dg.data_ptr() + n * dg.element_size() and dg.stride() == (2 * n, 1))


def check_softmax(module, dtype):
    for rows, sizes, columns in ((3, (11, 5000), 0), (2, (1,), 3), (0, (4,), 0)):
        logits = [(4 * drawn(rows, n, dtype=dtype, seed=n, columns=columns)) for n in sizes]
        for tile in logits:
            tile[:1, :1] = -float("inf")
        before = [tile.double() for tile in logits]
        top, total = torch.full((rows,), torch.finfo(torch.float32).min), torch.zeros(rows)
        rescales = [module.softmax_tile_(tile, top, total) for tile in logits]
        whole = torch.cat(before, dim=1)
        seen = top == torch.finfo(torch.float32).min  # a row of -inf alone
        assert bool((total[seen] == 0).all())
        top_, whole = top[~seen], whole[~seen]
        rounded_once(top_, whole.amax(1))
        rounded_once(total[~seen], (whole - top_.double()[:, None]).exp().sum(1))
        tops = [torch.full((rows,), torch.finfo(torch.float32).min).double()]
        for tile, was, rescale in zip(logits, before, rescales, strict=True):
            tops.append(torch.maximum(tops[-1], was.amax(1)))
            rounded_once(tile, (was - tops[-1][:, None]).exp())
            rounded_once(rescale, (tops[-2] - tops[-1]).exp())


def check_rotary(module, dtype):
    for rows, heads, size, turned, columns in (
        (3, 5, 32, 32, 7),
        (2, 3, 80, 20, 0),
        (2, 40, 256, 256, 8),
        (2, 1, 6, 2, 0),
        (0, 2, 8, 8, 0),
        (2, 2, 8, 0, 4),
    ):
        for interleaved in (False, True):
            x = drawn(rows, heads * size, dtype=dtype, columns=columns)
            angles = drawn(rows, turned, dtype=torch.float32, seed=1)
            angles = angles.cos().to(dtype), angles.sin().to(torch.float32 if turned == 20 else dtype)
            for sign in (1.0, -1.0):
                given = x.double().unflatten(1, (heads, size))
                t, rest = given[..., :turned], given[..., turned:]
                if interleaved:
                    across = torch.stack([-t[..., 1::2], t[..., ::2]], dim=3).flatten(2)
                else:
                    across = torch.cat([-t[..., turned // 2 :], t[..., : turned // 2]], dim=2)
                cos, sin = (a.double()[:, None] for a in angles)
                exact = torch.cat([t * cos + sign * across * sin, rest], dim=2).flatten(1)
                rounded_once(module.rotate(x, *angles, size, interleaved, sign), exact)
                ours = x.new_full((rows, x.shape[1] + 3), 7.0)
                beside = ours[:, : x.shape[1]]
                for given in (x, beside.copy_(x)):  # beside others, and in place
                    assert module.rotate(given, *angles, size, interleaved, sign, beside) is beside
                    rounded_once(beside, exact)
                    assert bool((ours[:, x.shape[1] :] == 7).all())
                    beside.copy_(x)


def check_sums(module, dtype):
    for n, columns in ((72, 5), (1, 0), (1500, 0)):
        source = drawn(9, n, dtype=dtype, columns=columns)
        starts, users = (
            torch.tensor(places, dtype=torch.int32) for places in ([0, 2, 3, 3, 6, 9], [0, 4, 1, 5, 8, 3, 6, 7, 7])
        )
        exact = torch.stack([source.double()[users[a:b].long()].sum(0) for a, b in pairwise(starts.tolist())])
        rounded_once(module.summed_by_users(source, starts, users), exact)
    assert module.summed_by_users(drawn(0, 4, dtype=dtype), torch.zeros(1, dtype=torch.int32), users[:0]).shape == (0, 4)


CHECKS = {"norms": check_norms, "gates": check_gates, "softmax": check_softmax, "rotary": check_rotary, "sums": check_sums}
FAULTS = {
    "norms": [
        ("/ n + eps", "/ BLOCK + eps"),
        ("d += tl", "d = tl"),
        ("x + at * x_row", "x + at * n"),
        ("(row % heads)[:, None] * n + column\n    a =", "column\n    a ="),
        ("(row % heads)[:, None] * n + column\n    r =", "column\n    r ="),
        ("r * (g - xhat", "r * (g + xhat"),
        ("* r[:, None] * scale)", "* r[:, None]).to(y.dtype.element_ty) * scale"),
    ],
    "gates": [
        ("0.134145", "0.044715"),
        ("to + n,", "to + n - 1,"),
        ("(act * b).to(h", "(act.to(h.dtype.element_ty) * b).to(h"),
        ("d * b * slope", "d * a * slope"),
    ],
    "softmax": [
        ("* factor +", "+"),
        ('other=-float("inf")', "other=0.0"),
        ("range(BLOCKS)", "range(1)"),
        ("tl.exp(highest - now)", "1.0"),
    ],
    "rotary": [
        ("b * c2 + a * s2", "b * c2 - a * s2"),
        ("2 * pair, 2 * pair + 1", "pair, pair + pairs"),
        ("* sign\n    s2", "\n    s2"),
        ("(head < heads)", "(head < heads - 1)"),
        ("tl.load(cos + row * cos_row + second", "tl.load(cos + row * cos_row + first"),
        ("(rest < size)", "(rest < size - 1)"),
    ],
    "sums": [
        ("place < end", "place + 1 < end"),
        ("tl.load(users + place)", "place"),
        ("row * source_row", "row * n"),
    ],
}
"""Changes to the kernels that the check of this name must find."""


def faulty(old, new, folder):
    text = Path(triton_passes.__file__).read_text(encoding="utf-8")
    assert old in text, f"no kernel has {old!r} any more"
    path = Path(folder) / f"faulty_{abs(hash((old, new)))}.py"
    path.write_text(text.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unnoticed_fault(name, folder):
    for old, new in FAULTS[name]:
        found = False
        for dtype in DTYPES[:2]:
            try:
                CHECKS[name](faulty(old, new, folder), dtype)
            except AssertionError:
                found = True
                break
        if not found:
            return f"{old!r} may be {new!r}"
    return ""


def check_probes(folder):
    """Passes take the kernels once they are proved, and the reference where they are not, which is said once."""
    x, weight = drawn(4, 24, dtype=torch.bfloat16), drawn(24, dtype=torch.bfloat16, seed=1)
    calls = []
    for module in (faulty("d += tl", "d = tl", folder), triton_passes):
        probing._probes.clear()
        passes._kernels = lambda module=module: calls.append(module) or module
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                y, rstd = passes.rms_norm(x, Norm(weight, 0.0, 1e-5))
                dx = passes.rms_norm_backward(x, x, Norm(weight, 0.0, 1e-5), rstd, x)
        (probe,) = probing.probes()
        way = triton_passes if module is triton_passes else reference
        assert bool(probe.problem) == (way is reference), probe
        assert [str(one.message).partition(":")[0] for one in said] == ["norms by Triton"] * (way is reference)
        assert torch.equal(y, way.rms_norm(x, Norm(weight, 0.0, 1e-5))[0])
        assert torch.equal(dx, way.rms_norm_backward(x, x, Norm(weight, 0.0, 1e-5), rstd, x))
    before = len(calls)
    for other in (x.double(), x.T, x[:, ::2]):  # which the kernels do not take
        passes.rms_norm(other, Norm(weight[: other.shape[1]].to(other.dtype).new_ones(other.shape[1]), 0.0, 1e-5))
    assert len(calls) == before
    assert len(probing.probes()) == 1


def check_all_probes():
    """What every kernel is asked before it is taken, it passes."""
    probing._probes.clear()
    for dtype in DTYPES:
        x = drawn(5, 48, dtype=dtype)
        norm = Norm(x[0].clone(), 1.0, 1e-6)
        passes.rms_norm_backward(x, x, norm, passes.rms_norm(x, norm)[1])
        for activation in ("silu", "gelu_tanh"):
            passes.gate_backward_(x.clone(), x, x, activation)
        passes.softmax_tile_(x.clone(), torch.zeros(5), torch.zeros(5))
        for interleaved in (False, True):
            passes.rotate(x, x[:, :8], x[:, 8:16], 16, interleaved)
        passes.summed_by_users(x, torch.tensor([0, 5], dtype=torch.int32), torch.arange(5, dtype=torch.int32))
    assert len(probing.probes()) == 3 * 7
    return "; ".join(f"{probe.what} {probe.key}: {probe.problem}" for probe in probing.probes() if probe.problem)


@contextmanager
def one_call_of_attention():
    """By a stand-in for PyTorch's kernel, with our kernels around it."""
    first = ways.WAYS[0]._replace(takes=lambda *_: True)
    with patch.object(flash, "_aten", VarlenOperations()), patch.object(ways, "WAYS", (first, ways.WAYS[-1])):
        yield


def check_survey():
    """What is said to compute is these kernels."""
    with cuda_backend():
        ways = list(survey(torch.device("cpu")))
    assert {(way.dtype, way.by) for way in ways if "attention" not in way.operation} == {
        (dtype, "Triton") for dtype in ("float32", "bfloat16", "float16")
    }


def check_model():
    """A tiny model's log-probabilities and gradients, on a tree of rows, by the CUDA back end with these kernels."""
    model = tiny("qwen3")
    adapter = attach(model, LoRA(rank=2, alpha=2.0))
    perturb(adapter.parameters())
    head = random_rows(7, seed=1)[0]
    rows = [TokenRow(head + random_rows(4 + n, seed=n)[0], list(range(5, 10 + n)), f"row {n}") for n in range(3)]
    results = []
    for backend in (nullcontext, cuda_backend):
        with backend(), one_call_of_attention():
            logprobs = pack_logprobs(model, pack_tree(rows))
            results.append([logprobs, *torch.autograd.grad(logprobs.sum(), list(adapter.parameters().values()))])
    for ours, exact in zip(*results, strict=True):
        assert float((ours - exact).abs().max()) <= 2e-5 * float(exact.abs().max())
    used = {probe.what.removesuffix(" by Triton") for probe in probing.probes() if not probe.problem}
    assert used >= {"norms", "gates", "softmax", "rotary embedding", "sums by users", "flash attention"}, used


def problem(check, *arguments):
    try:
        return check(*arguments) or ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # numpy's, of exp(200)
    round_as_hardware()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, check in CHECKS.items():
            for dtype in DTYPES:
                results[f"{name} {str(dtype).removeprefix('torch.')}"] = problem(check, triton_passes, dtype)
            results[f"faults {name}"] = problem(unnoticed_fault, name, folder)
        results |= {"all probes": problem(check_all_probes), "a model": problem(check_model), "survey": problem(check_survey)}
        results["probes"] = problem(check_probes, folder)
    print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())
