"""Measures of the model as it came: whether it is accepted, log-probabilities, generation, and that it stays what it was."""

import copy

import torch
from models.measuring import STEP_TOLERANCE, LeftOut, measure
from models.references import LONGEST, alone, difference, generated_difference, own_logits, rows
from models.subject import Subject

import trimtab
from trimtab.core.errors import TrimtabError
from trimtab.data import pack_flat, pack_tree
from trimtab.engine import pack_logprobs


@measure("check")
def check(subject: Subject) -> float:
    """Whether Trimtab agrees to train it: what `fit` asks first."""
    subject.checked()
    return 0.0


@measure("scored", trains=False)
def scored(subject: Subject) -> float:
    """`trimtab.score_loss` of the model as it came, rows in a tree."""
    ours = trimtab.score_loss(subject.base(), subject.rows).logprobs
    return difference(torch.tensor(ours), subject.expected)


@measure("too long", trains=False)
def too_long(subject: Subject) -> float:
    """Of a model that takes short rows alone, longer ones have to be refused."""
    if subject.limit >= LONGEST:
        raise LeftOut("It takes rows of any length.")
    try:
        ours = trimtab.score_loss(subject.base(), rows()).logprobs
    except TrimtabError:
        return 0.0
    with torch.no_grad():
        return difference(torch.tensor(ours), alone(subject.pristine, rows()))


@measure("generated", STEP_TOLERANCE, trains=False)
def generated(subject: Subject) -> float:
    """`trimtab.generate`, 16 tokens for each of four prompts from a cache, against full passes."""
    return generated_difference(subject.base().model, subject.prompts, [subject.pristine] * len(subject.prompts))


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
    return difference(pack_logprobs(subject.checked().model, pack_flat(subject.rows)), subject.expected)


@measure("tree")
def tree(subject: Subject) -> float:
    """A pack of rows that share their common beginnings."""
    return difference(pack_logprobs(subject.checked().model, pack_tree(subject.rows)), subject.expected)
