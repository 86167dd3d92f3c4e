"""Data-parallel training: every process holds the whole base model, and computes some of each step's micro-batches."""

from trimtab.distributed import Engine


class DDP(Engine):
    """Every process holds the whole base model; the adapter's gradients are summed once a step. What fits on a device is fastest so."""
