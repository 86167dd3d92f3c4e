"""Measures of a LoRA: log-probabilities, gradients, and training."""

import math
import re
from typing import Any

import torch
from models.measuring import GRADIENT_TOLERANCE, STEP_TOLERANCE, TOLERANCE, measure
from models.references import alone, difference, generated_difference
from models.subject import Adapted, Subject
from torch import Tensor

import trimtab
from trimtab.data import pack_flat, pack_tree
from trimtab.engine import pack_logprobs


@measure("lora")
@torch.no_grad()
def lora(subject: Subject) -> float:
    """LoRA on `all-linear`, else on `attention`: packed, flat and as a tree, against the model's own forward pass."""
    model = subject.lora.model
    expected = alone(model, subject.rows)
    packed = max(difference(pack_logprobs(model, pack(subject.rows)), expected) for pack in (pack_flat, pack_tree))
    return packed if difference(expected, subject.expected) > TOLERANCE else math.inf


@measure("lora generated", STEP_TOLERANCE)
def lora_generated(subject: Subject) -> float:
    """Answers with the LoRA."""
    return generated_difference(subject.lora.model, subject.prompts, [subject.lora.model] * len(subject.prompts))


@measure("owners")
@torch.no_grad()
def owners(subject: Subject) -> float:
    """Rows with the LoRA and rows of the base alone in one pack."""
    names = _owners(subject, len(subject.rows))
    packed = pack_logprobs(subject.lora.model, pack_flat(subject.rows), names)
    adapted = torch.tensor([name is not None for name in names])
    return difference(packed, torch.where(adapted, alone(subject.lora.model, subject.rows), subject.expected))


@measure("owners generated", STEP_TOLERANCE)
def owners_generated(subject: Subject) -> float:
    """Answers with the LoRA and answers of the base alone in one batch."""
    names = _owners(subject, len(subject.prompts))
    references = [subject.pristine if name is None else subject.lora.model for name in names]
    return generated_difference(subject.lora.model, subject.prompts, references, owners=names)


def _owners(subject: Subject, count: int) -> list[str | None]:
    """Nobody, and the LoRA, in turn."""
    return [subject.lora.adapter.name if number % 2 else None for number in range(count)]


@measure("gradient", GRADIENT_TOLERANCE)
def gradient(subject: Subject) -> float:
    """Of the LoRA, from a pack, against those of the rows alone."""
    return _difference(subject.gradients)


@measure("recomputed", GRADIENT_TOLERANCE)
def recomputed(subject: Subject) -> float:
    """The same with gradient checkpointing."""
    return _difference(subject.compared_gradients(recompute="full"))


def _difference(gradients: dict[str, tuple[Tensor, Tensor]]) -> float:
    """How far gradients are from those of the rows alone, as a share of the largest one."""
    pairs = gradients.values()
    largest = max(float(reference.abs().max()) for _, reference in pairs)
    return max(float((packed - reference).abs().max()) for packed, reference in pairs) / largest


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
