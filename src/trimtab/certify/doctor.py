"""What an upgrade may have broken: every method, on a small model made up here, with the versions that are installed.

Other tools' prefix tuning does nothing in `generate()` with some versions of Transformers, and no one is told. Here it is measured
that each method acts, in packs, in cached decoding and in Transformers' own `generate()` alike; that its gradient is the loss's
slope; that it is saved and merged without loss, and taken off without a trace.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.base import Base
from trimtab.base.tiny_model import VOCABULARY, tiny_model
from trimtab.core.errors import NotMergeable
from trimtab.data import pack_tree
from trimtab.data.example import TokenRow
from trimtab.deploy import load_adapter, merge, save_adapter
from trimtab.engine import generate, pack_logprobs
from trimtab.methods import Attached, Method, Sample, attach

NEEDED: dict[str, dict[str, Any]] = {
    "tokens": {"tokens": list(range(3, VOCABULARY, 2))},
    "miss": {"rank": 12},
    "oft": {"block_size": 16},
}
"""Settings that a method can't do without on so small a model."""


class Diagnosis(NamedTuple):
    """What came of one thing that was tried."""

    method: str
    what: str
    sick: str
    """What is wrong; empty if nothing is."""


def diagnoses() -> Iterator[Diagnosis]:
    """Try everything there is, a method at a time."""
    for name in Method.names():
        case = _Case(Method.member(name)(**NEEDED.get(name, {})))
        for what, trial in TRIALS.items():
            try:
                yield Diagnosis(name, what, trial(case) or "")
            except Exception as error:  # whatever it is, it is what a run would meet
                yield Diagnosis(name, what, f"{type(error).__name__}: {error}")


def _rows() -> list[TokenRow]:
    draw = torch.Generator().manual_seed(1)
    head, *rest = (torch.randint(3, VOCABULARY, (n,), generator=draw).tolist() for n in (9, 5, 3, 7))
    return [TokenRow(head + one, list(range(n + 2, 9 + len(one))), f"row {n}") for n, one in enumerate(rest)]


class _Case:
    def __init__(self, method: Method) -> None:
        self.method, self.rows, self.prompt = method, _rows(), _rows()[0].ids[:6]

    def adapted(self, dtype: torch.dtype = torch.float32) -> tuple[Base, Attached]:
        """A fresh model with the method on it, moved off its first values."""
        base = Base(tiny_model().to(dtype))
        draw = torch.Generator().manual_seed(2)
        sample = Sample(rows=[torch.randint(3, VOCABULARY, (40,), generator=draw).tolist()])
        adapter = attach(base.model, self.method, 0, sample=sample)
        with torch.no_grad():
            for tensor in adapter.parameters().values():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=draw).to(tensor.dtype))
        return base, adapter

    def logits(self, model: Any) -> Tensor:
        """By the model's own forward pass."""
        with torch.no_grad():
            logits: Tensor = model(input_ids=torch.tensor([self.rows[0].ids]), use_cache=False).logits[0]
        return logits

    def loss(self, base: Base) -> Tensor:
        """By ours, on a pack in which rows share what they begin with."""
        return -pack_logprobs(base.model, pack_tree(self.rows)).sum()

    def greedy(self, model: Any, count: int = 8) -> list[int]:
        """Tokens one by one, each from a forward pass over all before it."""
        ids = list(self.prompt)
        for _ in range(count):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        return ids[len(self.prompt) :]


def _acts(case: _Case) -> str | None:
    base, _ = case.adapted()
    moved = (case.logits(base.model) - case.logits(tiny_model())).abs().max()
    return None if moved > 1e-3 else "switched on, it changes nothing"


def _off(case: _Case) -> str | None:
    base, adapter = case.adapted()
    with adapter.disabled():
        off = case.logits(base.model)
    if not torch.equal(off, case.logits(tiny_model())):
        return "switched off, the model is not the base"
    return None if torch.equal(case.logits(adapter.detach()), off) else "taken off, it leaves a trace"


def _packed(case: _Case) -> str | None:
    base, _ = case.adapted(torch.float64)
    packed = pack_logprobs(base.model, pack_tree(case.rows)).tolist()
    for row, ours in zip(case.rows, packed, strict=True):
        with torch.no_grad():
            logprobs = base.model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].double().log_softmax(-1)
        alone = float(sum(logprobs[t - 1, row.ids[t]] for t in row.target_indices))
        if not abs(ours - alone) <= 1e-4 * abs(alone):
            return f"a row has log p = {ours:.6g} in a pack, and {alone:.6g} alone"
    return None


def _gradient(case: _Case) -> str | None:
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
    return (
        None
        if abs(slope - expected) <= 2e-2 * expected
        else f"the loss's slope is {slope:.6g}, and its gradient says {expected:.6g}"
    )


def _decoded(case: _Case) -> str | None:
    base, _ = case.adapted()
    expected = case.greedy(base.model)
    (ours,) = generate(base.model, [case.prompt], [], max_new_tokens=8)
    return None if ours == expected else f"cached decoding says {ours}, and the forward pass {expected}"


def _theirs(case: _Case) -> str | None:
    base, _ = case.adapted()
    expected = case.greedy(base.model)
    asked = torch.tensor([case.prompt])
    made = base.model.generate(
        asked, attention_mask=torch.ones_like(asked), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    theirs = made[0, len(case.prompt) :].tolist()
    return None if theirs == expected else f"Transformers' generate() says {theirs}, and the forward pass {expected}"


def _saved(case: _Case) -> str | None:
    base, adapter = case.adapted()
    expected = case.logits(base.model)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(base, adapter, Path(folder) / "adapter")
        again = Base(tiny_model())
        load_adapter(again, Path(folder) / "adapter")
    off = float((case.logits(again.model) - expected).abs().max())
    return None if off <= 1e-5 * float(expected.abs().max()) else f"loaded again, its logits are {off:.3g} off"


def _merged(case: _Case) -> str | None:
    base, adapter = case.adapted()
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = merge(base, adapter, Path(folder) / "merged")
        except NotMergeable:
            return None if not case.method.mergeable or case.method.name == "bitfit" else "it does not merge any more"
    return None if done.same_choice == 1.0 else f"merged, its likeliest tokens are the same at {done.same_choice:.1%} alone"


TRIALS: dict[str, Callable[[_Case], str | None]] = {
    "acts": _acts, "leaves no trace": _off, "packed is alone": _packed, "gradient is slope": _gradient, "cached decoding": _decoded,
    "Transformers' generate()": _theirs, "saved and loaded": _saved, "merged": _merged,
}  # fmt: skip
