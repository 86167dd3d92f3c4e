"""Optimizers, one file each: how gradients become updates."""

from trimtab.train.optimizers._base import Betas, Epsilon, Trained, UpdateRule, grouped, has_fused_adamw, torch_adamw

__all__ = ["Betas", "Epsilon", "Trained", "UpdateRule", "grouped", "has_fused_adamw", "torch_adamw"]
