"""What the objectives that compare with a reference model have in common."""

from typing import ClassVar

from trimtab.objectives._base import Objective


class Comparing(Objective):
    """An objective that needs Σ log p of each sequence in a reference model."""

    needs_reference: ClassVar[bool] = True

    reference: str = "auto"
    """What to compare with: base (adapters off), start (what training starts from), an adapter or run folder, or a model; auto is
    base for a fresh adapter, and start for one that is trained on."""
