"""Measures of prefixes and bottleneck adapters."""

import math
from typing import Any

import torch
from models.measuring import STEP_TOLERANCE, TOLERANCE, measure
from models.references import LONGEST, alone, difference, generated_difference, own_logits, prompts, rows
from models.subject import Subject
from torch import Tensor

import trimtab
from trimtab.core.errors import UnsupportedModel
from trimtab.data import Segment, pack_tree
from trimtab.engine import pack_logprobs
from trimtab.engine.forward import hidden_states
from trimtab.engine.head import head_of
from trimtab.engine.layouts import PackLayout

VIRTUAL = 4
"""Tokens of the prefix."""


@measure("prefix")
@torch.no_grad()
def prefix(subject: Subject) -> float:
    """Four virtual tokens: packed against rows alone, by the model's own passes where it has no windows that they exceed."""
    model, examples = _with_prefix(subject), rows(_most(subject))
    expected = alone(model, examples, _logits_with_virtual_tokens)
    acts = difference(expected, alone(subject.pristine, examples)) > TOLERANCE
    return difference(pack_logprobs(model, pack_tree(examples)), expected) if acts else math.inf


@measure("prefix generated", STEP_TOLERANCE)
def prefix_generated(subject: Subject) -> float:
    """Answers with the virtual tokens."""
    model, asked = _with_prefix(subject), prompts(_most(subject))
    return generated_difference(model, asked, [model] * len(asked), _logits_with_virtual_tokens)


def _with_prefix(subject: Subject) -> Any:
    return subject.adapted(trimtab.method("prefix", tokens=VIRTUAL, width=16)).model


def _most(subject: Subject) -> int:
    """The most tokens of a row beside the virtual ones."""
    return subject.limit if subject.limit == LONGEST else subject.limit - VIRTUAL


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
