"""What a run keeps of its evaluations to be compared with others by: the loss of each validation example."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from trimtab.artifacts.run_folder import LOSSES
from trimtab.base import Base
from trimtab.core import files
from trimtab.core.processes import processes
from trimtab.data import row_groups
from trimtab.data.example import TokenRow
from trimtab.evaluate import Loss
from trimtab.evaluate.example_losses import ExampleLosses, LossExample, write_losses
from trimtab.run.start import PreparedRun


class LossRecord:
    """The `losses.json` of a run. What it holds is part of the state of training, so a run that resumes has what belongs to its step."""

    def __init__(self, prepared: PreparedRun) -> None:
        self.prepared = prepared

    @cached_property
    def examples(self) -> list[LossExample]:
        rows = self.prepared.data.eval
        return [_example(self.prepared.base, [rows[number] for number in group]) for group in row_groups(rows)]

    def save(self, losses: dict[str, Any]) -> None:
        """Write what `of_start` and `of_best` have made; as long as there is no best adapter, there is no file.

        Raises StorageError.
        """
        if not processes.first:
            return
        path = self.prepared.recipe.output / LOSSES
        if "best" not in losses:
            files.remove_file(path)
            return
        write_losses(path.parent, ExampleLosses(self.examples, losses.get("before"), losses["best"], losses["step"]))


def of_start(losses: dict[str, Any], scored: Loss) -> dict[str, Any]:
    """The losses of a run, with those of the model before training."""
    return {**losses, "before": [total for total, _ in scored.in_order]}


def of_best(losses: dict[str, Any], scored: Loss, step: int) -> dict[str, Any]:
    """The losses of a run, with those of a new best adapter."""
    return {**losses, "best": [total for total, _ in scored.in_order], "step": step}


def _example(base: Base, rows: Sequence[TokenRow]) -> LossExample:
    own = [row for row in rows if row.side != "mismatched"]
    first, compared = own[0], own[0].side is not None
    content = str([(row.ids, row.target_indices, row.weights, row.side) for row in own])
    text = "" if compared or first.weights is not None else base.decode([first.ids[n] for n in first.target_indices]).strip()
    return LossExample(
        _digest(content),
        first.where,
        sum(len(row.target_indices) for row in own),
        1.0 if compared else first.total_weight,
        _digest(text) if text else None,
        len(text.encode(errors="surrogatepass")),
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]
