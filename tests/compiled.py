"""Triton's kernels, compiled for GPUs that need not be there: a process of its own, which prints what is wrong as JSON.

A kernel that the interpreter runs may still not compile. ptxas, which is part of Triton, says whether numbers did not fit into
registers, too.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trimtab.engine.backends import triton_passes

POINTERS = {"rstd": "fp32", "top": "fp32", "total": "fp32", "rescale": "fp32", "starts": "i32", "users": "i32"}
FLOATS = ("offset", "eps", "sign")
VARIANTS = {
    "_norm": [{"ROWS": 1, "BLOCK": 4096}, {"ROWS": 8, "BLOCK": 128}],
    "_norm_backward": [{"RESIDUAL": True, "ROWS": 1, "BLOCK": 4096}, {"RESIDUAL": False, "ROWS": 8, "BLOCK": 128}],
    "_gate": [{"GELU": True, "BLOCK": 2048}],
    "_gate_backward": [{"GELU": False, "BLOCK": 1024}, {"GELU": True, "BLOCK": 1024}],
    "_softmax_tile": [{"BLOCKS": 38, "BLOCK": 4096}],
    "_rotate": [
        {"HEADS": 16, "PAIRS": 64, "REST": 0, "INTERLEAVED": False},
        {"HEADS": 16, "PAIRS": 16, "REST": 128, "INTERLEAVED": True},
    ],
    "_sum_users": [{"BLOCK": 1024}],
}


def kind(name, like):
    if name in FLOATS:
        return "fp32"
    sizes = name == "n" or name.endswith("_row") or name in ("rows", "heads", "size", "pairs", "row_size")
    return "i32" if sizes else f"*{POINTERS.get(name, like)}"


def problem(kernel, constants, capability):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: kind(name, "bf16") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name] != "fp32" and name != "rows"}
    numbers = constants.get("ROWS", 0) * constants["BLOCK"] if "ROWS" in constants else 0
    options = {"num_warps": triton_passes._warps(numbers) if numbers else 8 if "BLOCKS" in constants else 4}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants, attrs=aligned)
    text = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(text, encoding="utf-8")
        ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
        architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [str(ptxas), "-v", f"--gpu-name={architecture}", str(file), "-o", str(file.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return "" if " 0 bytes spill stores, 0 bytes spill loads" in said else said.strip()


def main():
    found = {}
    for capability in [int(one) for one in sys.argv[1:]]:
        for name, variants in VARIANTS.items():
            for constants in variants:
                try:
                    found[f"{name} {constants} sm_{capability}"] = problem(getattr(triton_passes, name), constants, capability)
                except Exception as error:
                    found[f"{name} {constants} sm_{capability}"] = f"{type(error).__name__}: {error}"
    kernels = {name for name, one in vars(triton_passes).items() if isinstance(one, triton.runtime.JITFunction)}
    found["every kernel"] = ", ".join(sorted(kernels - {"_activated"} - set(VARIANTS)))
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
