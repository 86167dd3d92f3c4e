"""How many tokens a micro-batch has, and which need gradient checkpointing, so that training fits into the free memory."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Self

from trimtab.core.errors import RecipeError
from trimtab.data.pack import Pack
from trimtab.engine.available_memory import free_memory
from trimtab.engine.memory_probe import MemoryCost, MemoryProfile, profile_packs

Recompute = Literal["auto", "none", "full"]
ENOUGH_TOKENS = 1024
"""Tokens of a micro-batch from which more are hardly faster: see docs/performance.md."""
FEWEST_TOKENS = 16
SHARE = 0.9
"""Of the free memory, what all of training may take; the rest is for other processes."""


class Workload(NamedTuple):
    """What memory depends on in the data."""

    longest: int
    """Tokens of the longest row, which no pack can divide."""
    target_share: float = 1.0
    """The share of tokens that are trained on."""
    fullest_steps: Callable[[int], Sequence[Sequence[Pack]]] | None = None
    """The packs of the fullest steps, given the most tokens of a pack; full packs unless given."""
    frozen_output_bytes: float = 0.0
    """Of the frozen layers' outputs for all rows, if they are to be cached."""
    longest_evaluated: int = 0
    """Tokens of the longest validation row."""


class MemoryPlan(NamedTuple):
    """The sizes by which training fits into the free memory."""

    pack_tokens: int
    """The most tokens of a pack."""
    cost: MemoryCost
    """Of a pack."""
    pack_limit: float | None
    """Bytes that a pack may take, if there is a limit; one that would take more uses gradient checkpointing."""
    arena_bytes: float
    """Of the arena for the saved activations of packs without gradient checkpointing."""
    frozen_cache_bytes: float
    """That the cache of the frozen layers' outputs may take."""
    peak_bytes: float
    """That training takes at most, all in all, beside what is held when it is planned."""
    summary: str

    def recomputes(self, pack: Pack) -> bool:
        """Whether the pack uses gradient checkpointing."""
        return self.pack_limit is not None and self.cost.bytes_of(*_size(pack)) > self.pack_limit

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        return {**self._asdict(), "cost": [*self.cost]}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self | None:
        """The plan of which `plain` is the JSON data; None if another version wrote it."""
        known = plain.keys() == set(cls._fields)
        return cls(**{**plain, "cost": MemoryCost(*plain["cost"])}) if known else None


Size = tuple[int, int]
"""Of a pack: tokens, and pairs of a token and one that it attends to."""


def plan_memory(
    model: Any, work: Workload, pack_tokens: int | Literal["auto"], recompute: Recompute, free: float | None = None
) -> MemoryPlan:
    """Choose the most tokens of a pack, and which packs use gradient checkpointing, so that they fit.

    Args:
        model: With its adapter.
        free: Bytes that may be taken; measured unless given.

    Raises:
        RecipeError: The gradients and the optimizer do not fit, or not even the longest row with gradient checkpointing; or a
            validation row.
    """
    free = free_memory(next(model.parameters()).device) if free is None else free
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    budget = SHARE * free - 3 * trained  # gradients, and two moments of them
    if budget <= trained:
        raise RecipeError(
            f"Gradients, AdamW's two moments and a copy of the trained parameters to save take {4 * trained / 1e9:.2f} GB, and "
            f"{free / 1e9:.2f} GB are free: train fewer parameters (a lower method.rank, fewer method.targets)."
        )
    asked = pack_tokens if pack_tokens != "auto" else None
    advice = f"and {budget / 1e9:.2f} GB are left for it, of {free / 1e9:.2f} GB free. Lower data.max_length"
    advice += " or train.pack_tokens." if asked else "."
    profile = profile_packs(model, work.longest, work.target_share)
    tokens = asked or _most_tokens(profile, work.longest, budget)
    tokens, steps, forward_bytes = _fit_forward(model, work, tokens, budget, None if asked else FEWEST_TOKENS, advice)
    full = _full(tokens, work.longest)
    sizes = [_size(pack) for step in steps for pack in step if not pack.mismatched] or [full]
    limit = {"auto": budget, "none": math.inf, "full": -1.0}[recompute]
    cost = profile.peak_cost(*max(sizes, key=lambda size: profile.peak_bytes(*size)))
    saved = [size for size in sizes if cost.bytes_of(*size) <= limit]
    recomputed = [size for size in sizes if cost.bytes_of(*size) > limit]
    activations = max((profile.activations.bytes_of(*size) for size in saved), default=0.0)
    peak = max((cost.bytes_of(*size) for size in saved), default=0.0)
    if recomputed:
        peak = max(peak, _recomputed_bytes(model, work, recomputed, math.inf if recompute == "none" else budget, advice))
    elsewhere = max(trained, forward_bytes)  # while an adapter is saved, there is a copy of it
    arena = min(profile.activations.bytes_of(*full), budget - elsewhere) if recompute != "full" else 0.0
    peak = max(peak, min(activations, arena) + elsewhere)
    cache = min(work.frozen_output_bytes, max(0.0, budget - peak)) if math.isfinite(budget) else work.frozen_output_bytes
    total = 3 * trained + peak + cache
    checkpointing = "on" if recompute == "full" else "for micro-batches that do not fit" if recomputed else "off"
    of_free = f", of {free / 1e9:.1f} GB free" if math.isfinite(free) else ""
    summary = f"micro-batches of up to {tokens:,} tokens; {total / 1e9:.2f} GB beside the model{of_free}; gradient checkpointing {checkpointing}"
    return MemoryPlan(tokens, cost, limit if math.isfinite(limit) else None, arena, cache, total, summary)


def _most_tokens(profile: MemoryProfile, longest: int, budget: float) -> int:
    """The most tokens, up to ENOUGH_TOKENS, of which a full pack fits."""

    def needed(tokens: int) -> float:
        return profile.peak_bytes(*_full(tokens, min(tokens, longest)))

    return max(FEWEST_TOKENS, bisect_right(range(ENOUGH_TOKENS + 1), budget, key=needed) - 1)


def _full(tokens: int, longest: int) -> Size:
    """Of the largest pack that there can be."""
    most = max(tokens, longest)
    return most, most * longest


def _size(pack: Pack) -> Size:
    return len(pack.ids), sum(pack.pairs)


def _recomputed_bytes(model: Any, work: Workload, sizes: Sequence[Size], budget: float, advice: str) -> float:
    """The most that packs take with gradient checkpointing. Raises RecipeError if one does not fit."""
    profile = profile_packs(model, work.longest, work.target_share, recompute=True)
    most, tokens = max((profile.peak_bytes(*size), size[0]) for size in sizes)
    if most > budget:
        raise RecipeError(
            f"A micro-batch of {tokens:,} tokens needs {most / 1e9:.2f} GB for its activations, even with gradient checkpointing, {advice}"
        )
    return most


def _fit_forward(
    model: Any, work: Workload, tokens: int, budget: float, fewest: int | None, advice: str
) -> tuple[int, Sequence[Sequence[Pack]], float]:
    """The most tokens of a pack, as far as packs without a backward pass need fewer; the fullest steps; the most that such packs take.

    Those are packs of mismatched rows, and of validation rows: if no longer than training rows, these take less.

    Args:
        fewest: To how few tokens of a pack it may go; None to keep `tokens`.

    Raises:
        RecipeError: Such a pack does not fit.
    """
    profile: MemoryProfile | None = None
    while True:
        steps = work.fullest_steps(tokens) if work.fullest_steps is not None else []
        sizes = [(len(pack.ids), max(pack.pairs)) for step in steps for pack in step if pack.mismatched]  # segment by segment
        if work.longest_evaluated > work.longest:
            sizes.append((max(tokens, work.longest_evaluated), work.longest_evaluated**2))
        if not sizes:
            return tokens, steps, 0.0
        profile = profile or profile_packs(model, max(work.longest, work.longest_evaluated), work.target_share, backward=False)
        most, largest = max((profile.peak_bytes(*size), size[0]) for size in sizes)
        if most <= budget:
            return tokens, steps, most
        if fewest is None or tokens <= fewest:
            raise RecipeError(f"A micro-batch of {largest:,} tokens needs {most / 1e9:.2f} GB to be evaluated, {advice}")
        tokens = max(fewest, tokens // 2)
