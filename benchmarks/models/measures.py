"""What is measured of each model: each measure asks Trimtab for something and returns how far it is from the model itself.

A deviation above `TOLERANCE` is wrong. A TrimtabError is a refusal, any other exception a crash.
"""

import copy
import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from models.references import alone, difference, greedy_deficit, own_logits, prompts
from models.subject import Adapted, Subject
from torch import Tensor

import trimtab
from trimtab.core.errors import TrimtabError, UnsupportedModel
from trimtab.data import Segment, pack_flat, pack_tree
from trimtab.engine import check_packing, pack_logprobs
from trimtab.engine.forward import hidden_states
from trimtab.engine.head import head_of
from trimtab.engine.layouts import PackLayout

TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
"""Relative, of float32; of gradients, relative to the largest one."""
NEW_TOKENS = 16


class Measure(NamedTuple):
    """A question about a model."""

    of: Callable[[Subject], float]
    tolerance: float
    trains: bool
    """It is asked only of models that Trimtab agrees to train."""


MEASURES: dict[str, Measure] = {}


def measure(name: str, tolerance: float = TOLERANCE, *, trains: bool = True) -> Callable[[Callable[[Subject], float]], Any]:
    """Keep a function as a measure."""

    def keep(of: Callable[[Subject], float]) -> Callable[[Subject], float]:
        MEASURES[name] = Measure(of, tolerance, trains)
        return of

    return keep


@measure("check")
def check(subject: Subject) -> float:
    """Whether Trimtab agrees to train it: what `fit` asks first."""
    check_packing(subject.base().model)
    return 0.0


@measure("scored", trains=False)
def scored(subject: Subject) -> float:
    """`trimtab.score_loss` of the model as it came, rows in a tree."""
    ours = trimtab.score_loss(subject.base(), subject.rows).logprobs
    return difference(torch.tensor(ours), subject.expected)


@measure("generated", trains=False)
def generated(subject: Subject) -> float:
    """`trimtab.generate`, 16 tokens for each of four prompts from a cache, against full passes."""
    answers = trimtab.generate(subject.base().model, prompts(), [], max_new_tokens=NEW_TOKENS)
    return greedy_deficit(subject.pristine, prompts(), answers)


@measure("untouched", 0.0, trains=False)
def untouched(subject: Subject) -> float:
    """The model's own logits, bit for bit: with an adapter that is switched off, and after it was taken off."""
    model = copy.deepcopy(subject.pristine)
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4, targets=subject.targets[0] if _is_accepted(subject) else "attention"))
    adapter.enable(False)
    ids = subject.rows[2].ids
    with torch.no_grad():
        expected, off = own_logits(subject.pristine, ids), own_logits(model, ids)
        adapter.detach()
        return float(torch.stack([off - expected, own_logits(model, ids) - expected]).abs().max())


def _is_accepted(subject: Subject) -> bool:
    try:
        subject.base()
    except TrimtabError:
        return False
    return True


@measure("flat")
def flat(subject: Subject) -> float:
    """A pack of rows one after the other."""
    return difference(pack_logprobs(subject.base().model, pack_flat(subject.rows)), subject.expected)


@measure("tree")
def tree(subject: Subject) -> float:
    """A pack of rows that share their common beginnings."""
    return difference(pack_logprobs(subject.base().model, pack_tree(subject.rows)), subject.expected)


@measure("lora")
def lora(subject: Subject) -> float:
    """LoRA on `all-linear`, else on `attention`: packed against the model's own forward pass, and generation likewise."""
    model = subject.lora.model
    with torch.no_grad():
        expected = alone(model, subject.rows)
        packed = max(difference(pack_logprobs(model, pack(subject.rows)), expected) for pack in (pack_flat, pack_tree))
    answers = trimtab.generate(model, prompts(), [], max_new_tokens=NEW_TOKENS)
    acts = difference(expected, subject.expected) > TOLERANCE
    return max(packed, greedy_deficit(model, prompts(), answers)) if acts else math.inf


@measure("gradient", GRADIENT_TOLERANCE)
def gradient(subject: Subject) -> float:
    """Of the LoRA, from a pack, against those of the rows alone."""
    pairs = subject.gradients.values()
    largest = max(float(alone.abs().max()) for _, alone in pairs)
    return max(float((packed - alone).abs().max()) for packed, alone in pairs) / largest


@measure("across", 0.0)
def across(subject: Subject) -> float:
    """The largest gradient of a row's log p with respect to an embedding of another row: exactly 0."""
    model, pack = subject.lora.model, pack_flat(subject.rows)
    seen: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        if seen:
            return output
        seen.append(output.detach().requires_grad_())
        return seen[0] * 1  # some models scale their embeddings in place

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        logprobs = pack_logprobs(model, pack)
    finally:
        handle.remove()
    worst = 0.0
    for number, segment in enumerate(pack.segments):
        (of_row,) = torch.autograd.grad(logprobs[number], seen[0], retain_graph=True)
        by_token = of_row[0].abs().sum(-1)
        if not float(by_token[segment.start : segment.end].max()):
            return math.inf  # nothing was measured
        by_token[segment.start : segment.end] = 0
        worst = max(worst, float(by_token.max()))
    return worst


@measure("fit")
def fit(subject: Subject) -> float:
    """Three steps: the loss of each against that of the rows alone just before it."""
    return _fit(subject, subject.adapted(trimtab.LoRA(rank=4, targets=subject.targets[0])))


@measure("fit above")
def fit_above(subject: Subject) -> float:
    """The same with LoRA on the last block alone, below which `fit` passes over the frozen layers from the second epoch on."""
    reached = [name.rpartition(".")[0] for name in subject.gradients]
    blocks = [found.group(1) for path in reached if (found := re.match(r"(.+?\.\d+)\.", path))]
    paths = [path for path in reached if path.startswith(f"{blocks[-1]}.")] if blocks else reached[-1:]
    return _fit(subject, subject.adapted(trimtab.LoRA(rank=4, targets=tuple(dict.fromkeys(paths)))))


def _fit(subject: Subject, adapted: Adapted) -> float:
    targets = sum(len(row.target_indices) for row in subject.rows)

    @torch.no_grad()
    def loss() -> float:
        return -float(alone(adapted.model, subject.rows).sum()) / targets

    expected, worst = loss(), 0.0
    settings = {"epochs": 3, "rows_per_step": len(subject.rows), "lr": 2e-3, "pack_tokens": 64}
    for step in trimtab.fit(adapted.base, adapted.adapter, subject.rows, **settings):
        deviation = abs(step.loss - expected) / abs(expected)
        worst = max(worst, deviation) if deviation == deviation else math.inf
        expected = loss()
    return worst


@measure("merge")
def merge(subject: Subject) -> float:
    """The LoRA merged, saved, and read by plain Transformers."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        trimtab.merge(subject.lora.base, subject.lora.adapter, Path(folder) / "merged")
        merged = type(subject.pristine).from_pretrained(Path(folder) / "merged").eval()
        return difference(alone(merged, subject.rows), alone(subject.lora.model, subject.rows))


@measure("by name", trains=False)
def by_name(subject: Subject) -> float:
    """The model saved by plain Transformers, and loaded by the name of its folder."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        subject.pristine.save_pretrained(folder)
        base = trimtab.Base.load_folder(Path(folder), torch.float32, torch.device("cpu"), with_tokenizer=False)
        return difference(alone(base.model, subject.rows), subject.expected)


@measure("prefix")
def prefix(subject: Subject) -> float:
    """Four virtual tokens: packed against rows alone, by the model's own passes where it has no windows that they exceed."""
    model = subject.adapted(trimtab.method("prefix", tokens=4, width=16)).model
    with torch.no_grad():
        expected = alone(model, subject.rows, _logits_with_virtual_tokens)
        packed = difference(pack_logprobs(model, pack_tree(subject.rows)), expected)
    answers = trimtab.generate(model, prompts(), [], max_new_tokens=NEW_TOKENS)
    acts = difference(expected, subject.expected) > TOLERANCE
    return max(packed, greedy_deficit(model, prompts(), answers, _logits_with_virtual_tokens)) if acts else math.inf


def _logits_with_virtual_tokens(model: Any, ids: Any) -> Tensor:
    """The model's own pass; or where it refuses rows longer than a window, a pack of that row alone."""
    try:
        return own_logits(model, ids)
    except UnsupportedModel:
        layout = PackLayout((Segment(0, len(ids), -1),))
        return head_of(model).logits(hidden_states(model, torch.tensor(ids), torch.arange(len(ids)), layout))


@measure("bottleneck")
def bottleneck(subject: Subject) -> float:
    """Adapters after each MLP, packed against the model's own forward pass."""
    return _inserted(subject, "pfeiffer")


@measure("houlsby")
def houlsby(subject: Subject) -> float:
    """Adapters after each attention and each MLP."""
    return _inserted(subject, "houlsby")


@torch.no_grad()
def _inserted(subject: Subject, kind: str) -> float:
    model = subject.adapted(trimtab.method("bottleneck", width=8, kind=kind)).model
    expected = alone(model, subject.rows)
    packed = difference(pack_logprobs(model, pack_tree(subject.rows)), expected)
    return packed if difference(expected, subject.expected) > TOLERANCE else math.inf
