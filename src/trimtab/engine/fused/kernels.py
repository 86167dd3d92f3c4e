"""kernels.c, compiled at first use, and its passes in torch for where it can't be, or tensors are not on the CPU.

`TRIMTAB_KERNELS=torch` does without the compiled ones. Shapes: T tokens, n numbers each.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.cache import cache_folder
from trimtab.core.errors import StorageError
from trimtab.core.files import TEMPORARY, is_private, make_private_folder, sha256_file, write_bytes
from trimtab.engine.arena import kept, transient_like

Gate = Literal["silu", "gelu_tanh"]
_KINDS: dict[torch.dtype, str] = {torch.float32: "f32", torch.float64: "f64"}
_FLAGS = "-march=native -fPIC -shared -fno-math-errno -fno-trapping-math -fopenmp"


def rms_norm(x: Tensor, weight: Tensor, offset: float, eps: float, transient: bool = False) -> tuple[Tensor, Tensor]:
    """x / rms(x) · (offset + weight), and 1 / rms(x): T n and T.

    Args:
        transient: The first is needed only until this thread asks for the next transient one, which takes its memory again.
    """
    if c := compiled(x, weight):
        y, rstd = transient_like(x) if transient else x.new_empty(x.shape), kept(x, 1, len(x))[0]
        c("norm", x, weight, y, rstd, *x.shape, x.stride(0), y.stride(0), float(offset), float(eps))
        return y, rstd
    rstd = torch.rsqrt(x.square().mean(1) + eps)
    return x * rstd[:, None] * (offset + weight), rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, beside: Tensor | None = None
) -> Tensor:
    """Of `rms_norm`, with respect to x, plus the gradient that x has from what goes beside the norm: T n."""
    if c := compiled(dy, x, weight, rstd, *(() if beside is None else (beside,))):
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows = (dy.stride(0), x.stride(0), dx.stride(0), 0 if beside is None else beside.stride(0))
        c("norm_backward", dy, x, weight, rstd, beside, dx, *x.shape, *rows, float(offset))
        return dx
    g, xhat = dy * (offset + weight), x * rstd[:, None]
    dx = rstd[:, None] * (g - xhat * (g * xhat).mean(1, keepdim=True))
    return dx if beside is None else dx + beside


def gated(g: Tensor, u: Tensor, kind: Gate, transient: bool = False) -> Tensor:
    """act(g) · u: T n. For `transient` see `rms_norm`."""
    if g.stride() == u.stride() and (c := compiled(g, u)):
        h = transient_like(g) if transient else g.new_empty(g.shape)
        c("gate", g, u, h, *g.shape, g.stride(0), _GATES.index(kind))
        return h
    return _act(g, kind) * u


def gated_backward(dh: Tensor, g: Tensor, u: Tensor, kind: Gate) -> tuple[Tensor, Tensor, Tensor]:
    """dg and du, side by side in one tensor, and act(g) · u again. Takes `dh` over."""
    both = g.new_empty(len(g), 2 * g.shape[1])
    dg, du = both.chunk(2, dim=1)
    if g.stride() == u.stride() and (c := compiled(dh, g, u)):
        c("gate_backward", dh, g, u, dg, du, *g.shape, g.stride(0), both.stride(0), dh.stride(0), _GATES.index(kind))
        return dg, du, dh
    with torch.enable_grad():
        leaf = g.detach().requires_grad_()
        act = _act(leaf, kind)
    torch.mul(torch.autograd.grad(act, leaf, dh * u)[0], 1, out=dg)
    torch.mul(dh, act.detach(), out=du)
    return dg, du, act.detach() * u


def sweep_(logits: Tensor, top: Tensor, total: Tensor) -> Tensor:
    """One tile of a softmax over many: logits (N n) become exp(logits − top), `top` and `total` (N) those of all tiles so far.

    Returns:
        N: what sums over earlier tiles have to be multiplied by, exp(top before − top now).
    """
    if c := compiled(logits, top, total):
        fade = torch.empty_like(top)
        c("sweep", logits, top, total, fade, *logits.shape)
        return fade
    most = torch.maximum(top, logits.amax(dim=1))
    fade = (top - most).exp_()
    logits.sub_(most[:, None]).exp_()
    total.mul_(fade).add_(logits.sum(dim=1))
    top.copy_(most)
    return fade


_GATES = ("silu", "gelu_tanh")


def _act(g: Tensor, kind: Gate) -> Tensor:
    return F.silu(g) if kind == "silu" else F.gelu(g, approximate="tanh")


def compiled(*tensors: Tensor) -> "Compiled | None":
    """How to call the compiled functions on these tensors, if that is possible."""
    kind, first = _KINDS.get(tensors[0].dtype), tensors[0]
    if kind is None or not all(t.is_cpu and t.dtype == first.dtype and t.stride(-1) == 1 for t in tensors):
        return None
    library = _library()
    return Compiled(library, kind) if library is not None else None


class Compiled:
    """The compiled functions for one kind of number."""

    def __init__(self, library: ctypes.CDLL, kind: str) -> None:
        self.library, self.kind = library, kind

    def __call__(self, name: str, *arguments: Any) -> int:
        """What the function gives; nothing to be read, unless it says so. Tensors and structures are given by their address."""
        return int(getattr(self.library, f"{self.kind}_{name}")(*map(_given, arguments)))


def _given(argument: Any) -> Any:
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


@cache
def _library() -> ctypes.CDLL | None:
    """kernels.c compiled for this machine, from the cache where it has been before; None where that can't be."""
    if os.environ.get("TRIMTAB_KERNELS") == "torch" or os.name != "posix":
        return None
    try:
        return compile_library(Path(__file__).with_suffix(".c"), cache_folder() / f"kernels-{os.getuid()}")
    except (OSError, StorageError, subprocess.SubprocessError):
        return None


def compile_library(source: Path, folder: Path, optimization: str = "-O3") -> ctypes.CDLL | None:
    """A source, and the headers beside it, compiled into a folder, unless it lies there already. None where there is no compiler.

    What lies there is code that would run, so it is taken only if nobody else can have written it (owner and mode of file and
    folder), and if its content has the hash in its name; it is loaded from a folder that nobody else sees. Else it is compiled anew.
    """
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None or not Path("/proc/self/maps").exists():
        return None
    # torch's own OpenMP: with a second one, the threads of both would wait for each other.
    openmp = re.search(r"/\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so[^/\s]*", Path("/proc/self/maps").read_text())
    if openmp is None:
        return None
    text = "".join(path.read_text() for path in (source, *sorted(source.parent.glob("*.h"))))
    machine = re.search(r"^(flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    key = "\n".join([text, optimization, _FLAGS, compiler, openmp[0], machine[0] if machine else ""])
    name, private = hashlib.sha256(key.encode()).hexdigest()[:16], make_private_folder(folder)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder if private else None) as scratch:
        made = Path(scratch) / "kernels.so"
        if private and (content := _kept(folder, name)) is not None:
            write_bytes(made, content)
        else:
            command = [compiler, optimization, *_FLAGS.split(), str(source), openmp[0], "-lm", "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            if private:
                write_bytes(folder / f"{name}-{sha256_file(made)}.so", made.read_bytes(), private=True)
        return ctypes.CDLL(str(made))


def _kept(folder: Path, name: str) -> bytes | None:
    for path in sorted(folder.glob(f"{name}-*.so")):
        with suppress(OSError), open(path, "rb") as file:
            content = file.read()
            if is_private(os.fstat(file.fileno())) and path.stem == f"{name}-{hashlib.sha256(content).hexdigest()}":
                return content
    return None
