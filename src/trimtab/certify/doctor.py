"""Tests every method on a small random model with the library versions that are installed, and says what computes on which device.

Each method must act in packs, in cached decoding and in Transformers' own `generate()` alike (the prefixes of other libraries silently do
nothing in `generate()` with some versions of Transformers); its gradient must be the loss's slope; it must be saved and merged without
loss, and detached without a trace.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.base import Base
from trimtab.core.errors import NotMergeable
from trimtab.data import pack_tree
from trimtab.data.example import TokenRow
from trimtab.deploy import load_adapter, merge, save_adapter
from trimtab.engine import generate, pack_logprobs
from trimtab.engine.backends.survey import Way, survey
from trimtab.methods import Attached, Method, Sample, attach
from trimtab.testing import tiny_model
from trimtab.testing.tiny import VOCABULARY

NEEDED: dict[str, dict[str, Any]] = {
    "tokens": {"tokens": list(range(3, VOCABULARY, 2))},
    "miss": {"rank": 12},
    "oft": {"block_size": 16},
}
"""Settings that a method can't do without on so small a model."""


class TrialResult(NamedTuple):
    """The result of one trial of a method."""

    method: str
    name: str
    problem: str
    """What is wrong; empty if nothing is."""


def run_trials() -> Iterator[TrialResult]:
    """Every trial of every method, a method at a time."""
    for method in Method.names():
        case = _Case(Method.member(method)(**NEEDED.get(method, {})))
        for name, trial in TRIALS.items():
            try:
                yield TrialResult(method, name, trial(case) or "")
            except Exception as error:  # whatever it is, a run would meet it
                yield TrialResult(method, name, f"{type(error).__name__}: {error}")


def devices() -> list[torch.device]:
    """The CPU, and the accelerator that `model.device: auto` means, if there is one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return [torch.device("cpu"), *([found] if found is not None else [])]


def ways() -> list[Way]:
    """By what layers are computed on each device; probes of what failed say why. Their warnings are left to the caller's filters."""
    return [way for device in devices() for way in survey(device)]


def _rows() -> list[TokenRow]:
    draw = torch.Generator().manual_seed(1)
    head, *rest = (torch.randint(3, VOCABULARY, (n,), generator=draw).tolist() for n in (9, 5, 3, 7))
    return [TokenRow(head + one, list(range(n + 2, 9 + len(one))), f"row {n}") for n, one in enumerate(rest)]


class _Case:
    def __init__(self, method: Method) -> None:
        self.method, self.rows, self.prompt = method, _rows(), _rows()[0].ids[:6]

    def adapted(self, dtype: torch.dtype = torch.float32) -> tuple[Base, Attached]:
        """A new model with the method on it, perturbed, since a method may start as the base model."""
        base = Base(tiny_model().to(dtype))
        draw = torch.Generator().manual_seed(2)
        sample = Sample(rows=[torch.randint(3, VOCABULARY, (40,), generator=draw).tolist()])
        adapter = attach(base.model, self.method, 0, sample=sample)
        with torch.no_grad():
            for tensor in adapter.parameters().values():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=draw).to(tensor.dtype))
        return base, adapter

    def logits(self, model: Any) -> Tensor:
        """From the model's own forward pass."""
        with torch.no_grad():
            logits: Tensor = model(input_ids=torch.tensor([self.rows[0].ids]), use_cache=False).logits[0]
        return logits

    def loss(self, base: Base) -> Tensor:
        """By our packed forward pass, on rows with a shared prefix."""
        return -pack_logprobs(base.model, pack_tree(self.rows)).sum()

    def greedy(self, model: Any, count: int = 8) -> list[int]:
        """Tokens one by one, each from a forward pass over all before it."""
        ids = list(self.prompt)
        for _ in range(count):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        return ids[len(self.prompt) :]


def _try_acting(case: _Case) -> str | None:
    base, _ = case.adapted()
    moved = (case.logits(base.model) - case.logits(tiny_model())).abs().max()
    return None if moved > 1e-3 else "it is on, and changes nothing"


def _try_detaching(case: _Case) -> str | None:
    base, adapter = case.adapted()
    with adapter.disabled():
        off = case.logits(base.model)
    if not torch.equal(off, case.logits(tiny_model())):
        return "when it is off, the model is not the base model"
    return None if torch.equal(case.logits(adapter.detach()), off) else "detached, it leaves a trace"


def _try_packing(case: _Case) -> str | None:
    base, _ = case.adapted(torch.float64)
    packed = pack_logprobs(base.model, pack_tree(case.rows)).tolist()
    for row, ours in zip(case.rows, packed, strict=True):
        with torch.no_grad():
            logprobs = base.model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].double().log_softmax(-1)
        alone = float(sum(logprobs[t - 1, row.ids[t]] for t in row.target_indices))
        if not abs(ours - alone) <= 1e-4 * abs(alone):
            return f"an example has the log-probability {ours:.6g} in a pack, and {alone:.6g} alone"
    return None


def _try_gradient(case: _Case) -> str | None:
    base, adapter = case.adapted(torch.float64)
    if not case.method.exact_gradient:
        return None
    parameters = list(adapter.parameters().values())
    gradients = torch.autograd.grad(case.loss(base), parameters)
    step, values = 2e-3 / max(1e-9, float(sum(g.square().sum() for g in gradients)) ** 0.5), []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(sign * step * gradient)
            values.append(float(case.loss(base)))
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(sign * step * gradient)
    slope, expected = (values[0] - values[1]) / (2 * step), float(sum(g.square().sum() for g in gradients))
    if abs(slope - expected) <= 2e-2 * expected:
        return None
    return f"the loss's slope is {slope:.6g}, and by its gradient {expected:.6g}"


def _try_decoding(case: _Case) -> str | None:
    base, _ = case.adapted()
    expected = case.greedy(base.model)
    (ours,) = generate(base.model, [case.prompt], [], max_new_tokens=8)
    return None if ours == expected else f"cached decoding gives {ours}, and the forward pass {expected}"


def _try_generate(case: _Case) -> str | None:
    base, _ = case.adapted()
    expected = case.greedy(base.model)
    asked = torch.tensor([case.prompt])
    made = base.model.generate(
        asked, attention_mask=torch.ones_like(asked), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    theirs = made[0, len(case.prompt) :].tolist()
    return None if theirs == expected else f"Transformers' generate() gives {theirs}, and the forward pass {expected}"


def _try_saving(case: _Case) -> str | None:
    base, adapter = case.adapted()
    expected = case.logits(base.model)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(base, adapter, Path(folder) / "adapter")
        reloaded = Base(tiny_model())
        load_adapter(reloaded, Path(folder) / "adapter")
    error = float((case.logits(reloaded.model) - expected).abs().max())
    return None if error <= 1e-5 * float(expected.abs().max()) else f"reloaded, its logits are {error:.3g} off"


def _try_merging(case: _Case) -> str | None:
    base, adapter = case.adapted()
    with tempfile.TemporaryDirectory() as folder:
        try:
            merged = merge(base, adapter, Path(folder) / "merged")
        except NotMergeable:
            return None if not case.method.mergeable or case.method.name == "bitfit" else "it no longer merges"
    return (
        None
        if merged.same_top_token == 1.0
        else f"merged, its most likely token is the same at only {merged.same_top_token:.1%} of positions"
    )


TRIALS: dict[str, Callable[[_Case], str | None]] = {
    "acts": _try_acting, "leaves no trace": _try_detaching, "packed is alone": _try_packing, "gradient is slope": _try_gradient,
    "cached decoding": _try_decoding, "Transformers' generate()": _try_generate, "saved and loaded": _try_saving, "merged": _try_merging,
}  # fmt: skip
