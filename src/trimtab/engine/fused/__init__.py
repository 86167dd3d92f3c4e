"""Decoder layers by hand: fewer passes over memory, less kept for the backward pass, the same mathematics."""

from trimtab.engine.fused.blocks import fuse, unfused

__all__ = ["fuse", "unfused"]
