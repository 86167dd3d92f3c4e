"""By what each operation is computed on a device of this machine, found out by asking for it."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.data.prefix_tree import Segment
from trimtab.engine.backends import AttentionPlan, Heads, Norm, backend_for
from trimtab.engine.backends.probing import Probe, probes
from trimtab.engine.backends.ways import WAYS, way_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SIZE = 512
"""Numbers of a row."""


class Way(NamedTuple):
    """By what an operation is computed."""

    device: str
    dtype: str
    operation: str
    by: str
    problem: str = ""
    """What is wrong with something faster; empty if nothing is."""


def survey(device: torch.device) -> Iterator[Way]:
    """The way of each operation on this device, in each number type. What is faster than the reference is probed, if it was not yet."""
    for dtype in DTYPES:
        x = torch.ones(9, _SIZE, dtype=dtype, device=device)
        module = str(getattr(backend_for(x), "__name__", "")).rpartition(".")[2]
        of_device = str(device), str(dtype).removeprefix("torch.")
        for operation, ask in _PASSES.items():
            by, problem = _OWN[module] if module in _OWN else _asked(operation, ask, x)
            yield Way(*of_device, operation, by, problem)
        for operation, window, sinks in _ATTENTION:
            plan = AttentionPlan((Segment(0, len(x), -1),), Heads(2, 4, 64), 0.125, window)
            by, problem = (
                ("C", "") if module == "cpu" else (WAYS[-1].name, "") if module == "torch" else _attention(x, plan, sinks)
            )
            yield Way(*of_device, operation, by, problem)


_OWN = {"cpu": ("C", ""), "torch": ("PyTorch", "")}
"""Back ends that compute everything in one way."""


def _ask_norms(backend: Any, x: Tensor) -> None:
    norm = Norm(x[0], 0.0, 1e-6)
    backend.rms_norm_backward(x, x, norm, backend.rms_norm(x, norm)[1])


def _ask_softmax(backend: Any, x: Tensor) -> None:
    top = x.new_zeros(len(x), dtype=torch.float32)
    backend.softmax_tile_(x.clone(), top, top.clone())


_PASSES: dict[str, Callable[[Any, Tensor], Any]] = {
    "norms": _ask_norms,
    "gates": lambda backend, x: backend.gate_backward_(x.clone(), x, x, "silu"),
    "softmax": _ask_softmax,
}
_ATTENTION = (("attention", None, False), ("attention in a window", 4, False), ("attention with sinks", None, True))


def _asked(operation: str, ask: Callable[[Any, Tensor], Any], x: Tensor) -> tuple[str, str]:
    ask(backend_for(x), x)
    found = [probe for probe in _probes_of(x) if probe.what.startswith(f"{operation} by ")]
    problem = next((probe.problem for probe in found if probe.problem), "")
    return (found[0].what.partition(" by ")[2] if found and not problem else "PyTorch"), problem


def _attention(x: Tensor, plan: AttentionPlan, sinks: bool) -> tuple[str, str]:
    by = way_of(x, plan, sinks).name
    asked = plan.heads[1:], plan.window is not None
    found = [probe for probe in _probes_of(x) if probe.key[2:4] == asked and probe.key[-1] == sinks]
    proved = [probe.what for probe in found if not probe.problem and probe.what.startswith(by)]
    return (proved[-1] if proved else by), "; ".join(f"{probe.what}: {probe.problem}" for probe in found if probe.problem)


def _probes_of(x: Tensor) -> list[Probe]:
    return [probe for probe in probes() if probe.key[:2] == (x.device, x.dtype)]
