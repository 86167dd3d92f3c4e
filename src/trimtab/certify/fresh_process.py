"""A run's adapter as a fresh process finds it: python -m trimtab.certify.fresh_process, with a job as JSON on standard input.

Nothing here knows the process that trained it: it loads the artifact as a user would, and measures.
"""

import json
import sys
from contextlib import nullcontext
from importlib import resources
from typing import Any

import torch

from trimtab.base import Base
from trimtab.core.errors import TrimtabError
from trimtab.data import LengthLimit, Text, pack_all, tokenize_examples
from trimtab.data.example import SourceReport, TokenRow
from trimtab.deploy import open_target
from trimtab.engine import generate
from trimtab.evaluate import score_loss
from trimtab.evaluate.reference import logprobs, near
from trimtab.methods import room
from trimtab.objectives import Objective

PACK_TOKENS = 1024
MOST_NEW_TOKENS = 512


def examined(job: dict[str, Any]) -> dict[str, Any]:
    """Measure what the job names.

    Keys of the job: `folder`, an adapter's; `model`, its base, if not where it says; `canaries`, rows whose log-probabilities are
    asked for; `prompts`, tokens to answer, and `longest`, the tokens of the longest answer that is expected; `rows` and `objective`,
    to be measured with and without the adapter, as general text is, if `measure` says so.
    """
    target = open_target(job["folder"], job["model"])
    base, adapter = target.base, target.adapter
    assert adapter is not None, "an adapter's folder"
    found: dict[str, Any] = {
        "fingerprint": base.fingerprint,
        "near": near(base),
        "canaries": logprobs(base, [TokenRow(**row) for row in job["canaries"]], PACK_TOKENS),
        "finite": all(bool(tensor.isfinite().all()) for tensor in adapter.state().values()),
    }
    limit = min(MOST_NEW_TOKENS, 2 * job["longest"] + 32)
    answers = generate(base.model, job["prompts"], base.stop_ids, max_new_tokens=limit) if job["prompts"] else []
    found["answers"] = [{"text": base.decode(answer), "ended": answer.ended} for answer in answers]
    if not job["measure"]:
        return found
    rows, objective = [TokenRow(**row) for row in job["rows"]], Objective.pick(job["objective"])
    for name, off in (("adapter", False), ("base", True)):
        with adapter.disabled() if off else nullcontext():
            found[name] = {"general": _by_row(base, general(base), Objective.pick("sft"))}
            if rows and off and objective.needs_reference:
                found[name]["held_out"] = _of_reference(rows, objective)
            elif rows and not (off and adapter.method.new_tokens):  # which the base can't read
                found[name]["held_out"] = _by_row(base, rows, objective)
    return found


def general(base: Base) -> list[TokenRow]:
    """Paragraphs about all sorts of things, which no training data is about."""
    text = resources.files("trimtab.evaluate").joinpath("general.txt").read_text(encoding="utf-8")
    examples = [Text(part.strip(), f"general.txt:{n}") for n, part in enumerate(text.split("\n\n"), 1)]
    return tokenize_examples(
        examples, base, SourceReport(("general.txt",)), LengthLimit(room(base.model, base.context_length), truncate=True)
    )


def _of_reference(rows: list[TokenRow], objective: Objective) -> dict[str, Any]:
    """What the objective makes of the model that the adapter's is compared with: the base, or what training started from."""
    sums: list[float] = []
    counts: list[int] = []
    for pack in (one for one in pack_all(rows, PACK_TOKENS) if not one.mismatched):  # in the order of `_by_row`
        sums += objective.losses(torch.tensor([row.reference for row in pack.sequences]), pack, 0.0).tolist()
        counts += objective.counts(pack)
    return {"loss": sum(sums) / sum(counts), "sums": sums, "counts": counts}


def _by_row(base: Base, rows: list[TokenRow], objective: Objective) -> dict[str, Any]:
    scored = score_loss(base, rows, PACK_TOKENS, objective)
    return {"loss": scored.loss, "sums": scored.sums, "counts": scored.counts}


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    try:
        said = examined(json.load(sys.stdin))
    except TrimtabError as error:
        said = {"error": str(error)}
    sys.stdout.write(json.dumps(said) + "\n")
