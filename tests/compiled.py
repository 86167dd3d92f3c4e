"""Triton's kernels, compiled for GPUs that need not be there: a process of its own, which prints what is wrong as JSON.

What the interpreter runs may still not compile, or compile anew for every size of a pack. Functions are called as ever, on the
CPU; in the place of a launch, Triton compiles what it would launch. Its ptxas says whether numbers did not fit into registers.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from trimtab.engine.backends import Norm, triton_passes

TOKENS = (48, 33, 1)


class Card:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def norms(tokens, dtype, n):
    x = torch.ones(tokens, n + 16, dtype=dtype)[:, :n]
    norm = Norm(torch.ones(n, dtype=dtype), 0.0, 1e-6)
    triton_passes.rms_norm_backward(x, x, norm, triton_passes.rms_norm(x, norm)[1], x)


def heads(tokens, dtype, n):
    x = torch.ones(tokens, 6 * n, dtype=dtype)[:, : 4 * n].unflatten(1, (4, n))
    norm = Norm(torch.ones(n, dtype=dtype), 0.0, 1e-6)
    triton_passes.rms_norm_backward(x, x, norm, triton_passes.rms_norm(x, norm)[1])


def gates(tokens, dtype, n):
    g, u = torch.ones(tokens, 2 * n, dtype=dtype).chunk(2, dim=1)
    for activation in ("silu", "gelu_tanh"):
        triton_passes.gate(g, u, activation)
        triton_passes.gate_backward_(g.clone(), g, u, activation)


def softmax(tokens, dtype, n):
    sums = torch.zeros(2, tokens)
    triton_passes.softmax_tile_(torch.ones(tokens, n, dtype=dtype), sums[0], sums[0].clone())


def rotary(tokens, dtype, n):
    x, angles = torch.ones(tokens, 32 * 128, dtype=dtype), torch.ones(tokens, n, dtype=dtype)
    for interleaved in (False, True):
        triton_passes.rotate(x, angles, angles, 128, interleaved)
        triton_passes.rotate(x, angles, angles, 128, interleaved, -1.0, x)


def sums(tokens, dtype, n):
    places = torch.zeros(tokens + 1, dtype=torch.int32)
    triton_passes.summed_by_users(torch.ones(tokens, n, dtype=dtype), places, places.clone())


CALLS = [
    (norms, 3584),
    (norms, 16_384),
    (heads, 128),
    (gates, 9728),
    (softmax, 152_064),
    (rotary, 128),
    (rotary, 32),
    (sums, 1024),
]


def compiled(call, dtype, n, tokens=TOKENS):
    """What is launched: kernels by their names, the compiled code by its identity."""
    found = {}

    def compile_only(kernel, on, grid, *arguments, **constants):
        code = kernel.warmup(*arguments, grid=grid, **constants)
        found.setdefault((kernel.__name__, *constants.values()), {})[id(code)] = code

    launch, triton_passes._launch = triton_passes._launch, compile_only
    try:
        for count in tokens:
            call(count, dtype, n)
    finally:
        triton_passes._launch = launch
    return found


def problem(codes, capability):
    if len(codes) > 1:
        return f"compiled {len(codes)} times for {len(TOKENS)} sizes of a pack"
    (code,) = codes.values()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(code.asm["ptx"], encoding="utf-8")
        ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
        architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [str(ptxas), "-v", f"--gpu-name={architecture}", str(file), "-o", str(file.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return "" if " 0 bytes spill stores, 0 bytes spill loads" in said else said.strip()


def main(capability):
    driver.set_active(Card(capability))
    results, names = {}, set()
    for call, n in CALLS:
        for dtype in (torch.bfloat16,) if call is not norms else (torch.bfloat16, torch.float32):
            name = f"{call.__name__} {n} {str(dtype).removeprefix('torch.')}"
            try:
                found = compiled(call, dtype, n)
                results[name] = "; ".join(filter(None, (problem(codes, capability) for codes in found.values())))
                names |= {kernel for kernel, *_ in found}
            except Exception as error:
                results[name] = f"{type(error).__name__}: {error}"
    kernels = {name for name, one in vars(triton_passes).items() if isinstance(one, triton.runtime.JITFunction)}
    results["every kernel"] = ", ".join(sorted(kernels - {"_activated"} - names))
    every = triton.jit(triton_passes._norm.fn)  # as if the number of rows were a constant to compile for
    triton_passes._norm = every
    found = compiled(norms, torch.bfloat16, 256)
    several = any(len(codes) > 1 for (kernel, *_), codes in found.items() if kernel == "_norm")
    results["a kernel that compiles anew is noticed"] = "" if several else "it is not"
    print(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]))
