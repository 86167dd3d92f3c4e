"""Measures a run's adapter in a new process: python -m trimtab.certify.fresh_process, with a job as JSON on standard input.

It knows nothing of the process that trained the adapter: it loads it as a user would, and measures.
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
from trimtab.deploy import load_model
from trimtab.engine import generate
from trimtab.evaluate import score_loss
from trimtab.evaluate.reference import logprob_tolerance, logprobs
from trimtab.methods import max_row_length
from trimtab.objectives import Objective

PACK_TOKENS = 1024
MOST_NEW_TOKENS = 512


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities, answers and losses of an adapter, as JSON data.

    Keys of the job: `folder`, the adapter's; `model`, its base model, if it is not where the adapter says; `canaries`, rows whose
    log-probabilities are asked for; `prompts`, tokens to answer, and `longest`, the tokens of the longest expected answer; with
    `measure`, also the loss of `objective` on `rows`, and of SFT on general text, with and without the adapter.
    """
    target = load_model(job["folder"], job["model"])
    base, adapter = target.base, target.adapter
    assert adapter is not None, "an adapter's folder"
    results: dict[str, Any] = {
        "fingerprint": base.fingerprint,
        "near": logprob_tolerance(base),
        "canaries": logprobs(base, [TokenRow(**row) for row in job["canaries"]], PACK_TOKENS),
        "finite": all(bool(tensor.isfinite().all()) for tensor in adapter.state().values()),
    }
    limit = min(MOST_NEW_TOKENS, 2 * job["longest"] + 32)
    answers = generate(base.model, job["prompts"], base.stop_ids, max_new_tokens=limit) if job["prompts"] else []
    results["answers"] = [{"text": base.decode(answer), "ended": answer.ended} for answer in answers]
    if not job["measure"]:
        return results
    rows, objective = [TokenRow(**row) for row in job["rows"]], Objective.pick(job["objective"])
    for name, off in (("adapter", False), ("base", True)):
        with adapter.disabled() if off else nullcontext():
            results[name] = {"general": _by_row(base, general(base), Objective.pick("sft"))}
            if rows and off and objective.needs_reference:
                results[name]["held_out"] = _of_reference(rows, objective)
            elif rows and not (off and adapter.method.new_tokens):  # which the base can't read
                results[name]["held_out"] = _by_row(base, rows, objective)
    return results


def general(base: Base) -> list[TokenRow]:
    """Paragraphs on many subjects, to measure forgetting on."""
    text = resources.files("trimtab.evaluate").joinpath("general.txt").read_text(encoding="utf-8")
    examples = [Text(part.strip(), f"general.txt:{n}") for n, part in enumerate(text.split("\n\n"), 1)]
    return tokenize_examples(
        examples,
        base,
        SourceReport(("general.txt",)),
        LengthLimit(max_row_length(base.model, base.context_length), "truncate"),
    )


def _of_reference(rows: list[TokenRow], objective: Objective) -> dict[str, Any]:
    """The loss of the reference model itself: the base model, or the adapter that training started from."""
    sums: list[float] = []
    counts: list[float] = []
    for pack in (pack for pack in pack_all(rows, PACK_TOKENS) if not pack.mismatched):  # in the order of `_by_row`
        sums += objective.losses(torch.tensor([row.reference for row in pack.rows]), pack, 0.0).tolist()
        counts += objective.counts(pack)
    return {"loss": sum(sums) / sum(counts), "sums": sums, "counts": counts}


def _by_row(base: Base, rows: list[TokenRow], objective: Objective) -> dict[str, Any]:
    scored = score_loss(base, rows, PACK_TOKENS, objective)
    return {"loss": scored.loss, "sums": scored.sums, "counts": scored.counts}


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    try:
        results = measure(json.load(sys.stdin))
    except TrimtabError as error:
        results = {"error": str(error)}
    sys.stdout.write(json.dumps(results) + "\n")
