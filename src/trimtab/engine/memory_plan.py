"""How many tokens a micro-batch has, and how much of it is computed again in its backward pass, so that training fits into the free memory."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, Self

from trimtab.base.available_memory import free_memory
from trimtab.core.errors import RecipeError
from trimtab.core.processes import processes
from trimtab.core.wrapping import held_bytes
from trimtab.data.pack import Pack
from trimtab.engine.memory_probe import CountedPacks, MemoryCost, MemoryProfile, left_beside_gathered
from trimtab.engine.memory_trial import TriedPacks, device_memory
from trimtab.engine.recompute import Level

Recompute = Literal["auto", "none", "mlp", "full"]
LEVELS: tuple[Level, ...] = ("none", "mlp", "full")
"""The cheapest first."""
FEWEST_TOKENS = 16


class Measure(Protocol):
    """How the memory of packs is found out on a kind of device, and which packs suit it."""

    @property
    def share(self) -> float:
        """Of the free memory, what all of training may take; the rest is for other processes."""

    @property
    def most(self) -> int:
        """Tokens of a micro-batch from which more are hardly faster."""

    def enough(self) -> int:
        """Tokens of a micro-batch below which computing more of it again is cheaper than making it smaller. Known after a profile."""

    def profile(self, longest: int, target_share: float, *, recompute: Level = "none", backward: bool = True) -> MemoryProfile:
        """What packs in training take, or those without a backward pass; rows have at most `longest` tokens."""

    def confirm(self, pack: Pack, recompute: Level) -> float | None:
        """Bytes that this pack takes when it is run: inf if more than there are, None if the profile is all that is known."""


def measure_for(model: Any) -> Measure:
    """That of the model's device. Trials differ from process to process, so where all must make the same passes, packs are counted."""
    memory = device_memory(next(model.parameters()).device) if not processes.equal_passes else None
    return CountedPacks(model) if memory is None else TriedPacks(model, memory)


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
    costs: tuple[tuple[Level, MemoryCost], ...]
    """Of a pack, by how much of it is computed again; the cheapest first, and without all of it, which is what remains."""
    pack_limit: float | None
    """Bytes that a pack may take, if there is a limit."""
    arena_bytes: float
    """Of the arena for the saved activations of packs of which nothing is computed again."""
    frozen_cache_bytes: float
    """That the cache of the frozen layers' outputs may take."""
    peak_bytes: float
    """That training takes at most, all in all, beside what is held when it is planned."""
    summary: str
    processes: int = 1
    """How many divide each step's packs, which are made for that; 1 if packs have a given size."""

    def recomputed(self, pack: Pack) -> Level:
        """How much of the pack is computed again: the least by which it fits."""
        limit = math.inf if self.pack_limit is None else self.pack_limit
        return next((level for level, cost in self.costs if cost.bytes_of(*_size(pack)) <= limit), "full")

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        return {**self._asdict(), "costs": [[level, [*cost]] for level, cost in self.costs]}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self | None:
        """The plan of which `plain` is the JSON data; None if another version wrote it."""
        if plain.keys() != set(cls._fields):
            return None
        return cls(**{**plain, "costs": tuple((level, MemoryCost(*cost)) for level, cost in plain["costs"])})


Size = tuple[int, int]
"""Of a pack: tokens, and pairs of a token and one that it attends to."""


def plan_memory(
    model: Any,
    work: Workload,
    pack_tokens: int | Literal["auto"],
    recompute: Recompute,
    optimizer_bytes: float,
    free: float | None = None,
    measure: Measure | None = None,
) -> MemoryPlan:
    """Choose the most tokens of a pack, and how much of each pack is computed again, so that they fit.

    Args:
        model: With its adapter.
        optimizer_bytes: That the optimizer holds beside the parameters and their gradients.
        free: Bytes that may be taken; measured unless given.
        measure: The device's, unless given.

    Raises:
        RecipeError: Gradients and the optimizer's state do not fit; or, with all computed again, the longest row; or a validation row.
    """
    measure = measure or measure_for(model)
    free = left_beside_gathered(model, free_memory(next(model.parameters()).device)) if free is None else free
    trained = sum(held_bytes(p) for p in model.parameters() if p.requires_grad)
    held = trained + optimizer_bytes
    budget = _budget(measure, free, trained, held)
    asked = pack_tokens if pack_tokens != "auto" else None
    advice = f"and {budget / 1e9:.2f} GB are left for it, of {free / 1e9:.2f} GB free. Lower data.max_length"
    advice += " or train.pack_tokens." if asked else "."
    levels = _Levels(measure, work, LEVELS if recompute == "auto" else (recompute,))
    taken, scale = None, 1.0
    while taken is None or taken > budget:
        within = scale * budget
        tokens = asked or levels.most_tokens(within)
        tokens, steps, forward_bytes = _fit_forward(measure, work, tokens, budget, None if asked else FEWEST_TOKENS, advice)
        packs = [pack for step in steps for pack in step if not pack.mismatched]
        passes = levels.fit([_size(pack) for pack in packs] or [_full(tokens, work.longest)], within, advice)
        taken = _confirmed(measure, packs, passes) if recompute in ("auto", "full") else 0.0
        scale *= max(0.5, 0.98 * budget / taken) if taken > budget else 1.0
    elsewhere = max(trained, forward_bytes)  # while an adapter is saved, there is a copy of it
    arena = min(levels.saved(*_full(tokens, work.longest)), budget - elsewhere)
    peak = max(passes.peak, min(passes.saved, arena) + elsewhere)
    cache = min(work.frozen_output_bytes, max(0.0, budget - peak)) if math.isfinite(budget) else work.frozen_output_bytes
    total = held + peak + cache
    limit = within if recompute == "auto" and math.isfinite(budget) else None
    of_free = f", of {free / 1e9:.1f} GB free" if math.isfinite(free) else ""
    summary = (
        f"micro-batches of up to {tokens:,} tokens; {total / 1e9:.2f} GB beside the model{of_free}; {_words(recompute, passes)}"
    )
    costs = tuple((level, cost) for level, cost in passes.costs if level != "full")
    return MemoryPlan(tokens, costs, limit, arena, cache, total, summary)


def _budget(measure: Measure, free: float, trained: float, held: float) -> float:
    """Bytes for packs, beside what is held. Raises RecipeError if there are not enough for a copy of what is trained to save."""
    budget = measure.share * free - held
    if budget <= trained:
        raise RecipeError(
            f"Gradients, the optimizer's state and a copy of the trained parameters to save take {(held + trained) / 1e9:.2f} GB, and "
            f"{free / 1e9:.2f} GB are free: train fewer parameters (a lower method.rank, fewer method.targets), or use an optimizer with "
            "less state (train.optimizer=adafactor)."
        )
    return budget


class _Passes(NamedTuple):
    """What the packs of the fullest steps take."""

    costs: Sequence[tuple[Level, MemoryCost]]
    """By how much is computed again, at the moment at which the largest pack takes most."""
    largest: Sequence[tuple[Level, Size]]
    """The largest pack of which so much is computed again."""
    peak: float
    """Bytes; the most of all packs."""
    saved: float
    """Bytes that packs of which nothing is computed again save for their backward pass, at most."""


class _Levels:
    """What packs take, by how much of them is computed again, measured as far as it is asked for."""

    def __init__(self, measure: Measure, work: Workload, levels: Sequence[Level]) -> None:
        self.measure, self.work, self.levels = measure, work, levels
        self.profiles: dict[Level, MemoryProfile] = {}

    def profile(self, level: Level) -> MemoryProfile:
        if level not in self.profiles:
            self.profiles[level] = self.measure.profile(self.work.longest, self.work.target_share, recompute=level)
        return self.profiles[level]

    def most_tokens(self, budget: float) -> int:
        """The most tokens of a pack that is worth it, with as little computed again as leaves enough of them."""
        tokens = 0
        for level in self.levels:
            tokens = _most_tokens(self.profile(level), self.work.longest, budget, self.measure.most)
            if tokens >= self.measure.enough():
                break
        return max(FEWEST_TOKENS, tokens)

    def fit(self, sizes: Sequence[Size], budget: float, advice: str) -> _Passes:
        """The least to be computed again of each pack. Raises RecipeError if even all of it is too little."""
        costs: list[tuple[Level, MemoryCost]] = []
        largest: list[tuple[Level, Size]] = []
        peak = saved = 0.0
        left = sizes
        for level in self.levels:
            profile = self.profile(level)
            most = max(left, key=lambda size: profile.peak_bytes(*size))
            cost = profile.peak_cost(*most)
            costs.append((level, cost))
            last = level == self.levels[-1]
            here = left if last else [size for size in left if cost.bytes_of(*size) <= budget]
            left = [] if last else [size for size in left if cost.bytes_of(*size) > budget]
            if here:
                peak = max(peak, *(profile.peak_bytes(*size) if level == "full" else cost.bytes_of(*size) for size in here))
                largest.append((level, max(here, key=lambda size: profile.peak_bytes(*size))))
                saved = max(saved, *(self.saved(*size) for size in here)) if level == "none" else saved
            if level == "full" and peak > budget:
                raise RecipeError(
                    f"A micro-batch of {most[0]:,} tokens needs {peak / 1e9:.2f} GB for its activations, "
                    f"even with gradient checkpointing, {advice}"
                )
            if not left:
                break
        return _Passes(costs, largest, peak, saved)

    def saved(self, tokens: int, pairs: int) -> float:
        """Bytes that a pack saves for its backward pass if nothing is computed again; 0 if that is not measured."""
        return self.profiles["none"].activations.bytes_of(tokens, pairs) if "none" in self.profiles else 0.0


def _confirmed(measure: Measure, packs: Sequence[Pack], passes: _Passes) -> float:
    """Bytes that the largest packs have taken when they were run; 0 if none was."""
    largest = ((level, next((pack for pack in packs if _size(pack) == size), None)) for level, size in passes.largest)
    return max((measure.confirm(pack, level) or 0.0 for level, pack in largest if pack is not None), default=0.0)


def _words(recompute: Recompute, passes: _Passes) -> str:
    kinds = {level for level, _ in passes.largest}
    of = "" if "full" in kinds else " of MLPs"
    if kinds == {"none"}:
        return "gradient checkpointing off"
    return f"gradient checkpointing{of} " + ("for micro-batches that do not fit" if recompute == "auto" else "on")


def _most_tokens(profile: MemoryProfile, longest: int, budget: float, most: int) -> int:
    """The most tokens, up to `most`, of which a full pack fits."""

    def needed(tokens: int) -> float:
        return profile.peak_bytes(*_full(tokens, min(tokens, longest)))

    return bisect_right(range(most + 1), budget, key=needed) - 1


def _full(tokens: int, longest: int) -> Size:
    """Of the largest pack that there can be."""
    most = max(tokens, longest)
    return most, most * longest


def _size(pack: Pack) -> Size:
    return len(pack.ids), sum(pack.pairs)


def _fit_forward(
    measure: Measure, work: Workload, tokens: int, budget: float, fewest: int | None, advice: str
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
        profile = profile or measure.profile(max(work.longest, work.longest_evaluated), work.target_share, backward=False)
        most, largest = max((profile.peak_bytes(*size), size[0]) for size in sizes)
        if most <= budget:
            return tokens, steps, most
        if fewest is None or tokens <= fewest:
            raise RecipeError(f"A micro-batch of {largest:,} tokens needs {most / 1e9:.2f} GB to be evaluated, {advice}")
        tokens = max(fewest, tokens // 2)
