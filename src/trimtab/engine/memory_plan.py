"""How many tokens are computed at a time, and which packs twice, so that training fits into the memory that is free."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, NoReturn, Self

from trimtab.core.errors import RecipeError
from trimtab.data.pack import Pack
from trimtab.engine.available_memory import free_memory
from trimtab.engine.memory_probe import Cost, Costs, measuring_costs, training_costs

Recompute = Literal["auto", "none", "full"]
FLAT = 1024
"""Tokens at a time from which more are hardly faster: see docs/performance.md."""
FEWEST = 16
"""Tokens at a time, at least."""
SHARE = 0.9
"""Of the memory that is free, what all of training may take; the rest is for others."""


class Work(NamedTuple):
    """What is to be computed, as far as memory depends on it."""

    longest: int
    """Tokens of the longest row, which no pack can cut."""
    learned: float = 1.0
    """The share of tokens that are trained on."""
    steps: Callable[[int], Sequence[Sequence[Pack]]] | None = None
    """The packs of the fullest steps, given how many tokens are computed at a time; full packs unless given."""
    from_frozen: float = 0.0
    """Bytes that frozen layers make of all rows, if those are to be kept from one epoch to the next."""
    evaluated: int = 0
    """Tokens of the longest row that is evaluated on."""


class Memory(NamedTuple):
    """What is computed at a time."""

    pack_tokens: int
    """Tokens in a pack, at most."""
    cost: Cost
    """What a pack takes."""
    room: float
    """Bytes that are left for a pack: one that takes more keeps the inputs of its layers alone, which are computed again."""
    kept: float
    """Bytes of the block in which packs that are computed once keep what they need in the backward pass."""
    below: float
    """Bytes that what frozen layers have made of rows may take."""
    most: float
    """Bytes that training takes at most, all in all, beside what is held when it is planned."""
    words: str

    def twice(self, pack: Pack) -> bool:
        """The pack's layers are computed again in its backward pass."""
        return self.cost.of(*_size(pack)) > self.room

    def plain(self) -> dict[str, Any]:
        """As JSON data, which has no word for no limit."""
        return {**self._asdict(), "cost": [*self.cost], "room": self.room if math.isfinite(self.room) else None}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Self | None:
        """What `plain` gave; None if another version did."""
        if plain.keys() != set(cls._fields):
            return None
        return cls(**{**plain, "cost": Cost(*plain["cost"]), "room": math.inf if plain["room"] is None else plain["room"]})


Size = tuple[int, int]
"""Of a pack: tokens, and pairs of those that see each other."""


def plan_memory(
    model: Any, work: Work, pack_tokens: int | Literal["auto"], recompute: Recompute, free: float | None = None
) -> Memory:
    """Choose how many tokens are computed at a time, and which packs are computed twice, so that they fit.

    Args:
        model: With what is trained on it.
        free: Bytes that may be taken; measured unless given.

    Raises:
        RecipeError: The gradients and the optimizer do not fit, or not even the longest row alone, computed twice; or a row to
            evaluate on.
    """
    free = free_memory(next(model.parameters()).device) if free is None else free
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    room = SHARE * free - 3 * trained  # gradients, and two moments of them
    if room <= trained:
        raise RecipeError(
            f"Gradients, AdamW's two moments and a copy to save what is trained take {4 * trained / 1e9:.2f} GB, and {free / 1e9:.2f} GB are "
            "free: train fewer parameters (a lower method.rank, fewer method.targets)."
        )
    once = training_costs(model, work.longest, work.learned)
    tokens = pack_tokens if pack_tokens != "auto" else _fitting(once, work.longest, room)
    tokens, steps, passing = _divided(model, work, tokens, room, free, pack_tokens != "auto")
    full = _full(tokens, work.longest)
    sizes = [_size(pack) for step in steps for pack in step if not pack.mismatched] or [full]
    limit = {"auto": room, "none": math.inf, "full": -1.0}[recompute]
    largest = max(sizes, key=lambda size: once.most(*size).of(*size))
    cost = once.most(*largest)
    some = [size for size in sizes if cost.of(*size) <= limit]
    others = [size for size in sizes if cost.of(*size) > limit]
    kept = max((once.kept.of(*size) for size in some), default=0.0)
    most = max((cost.of(*size) for size in some), default=0.0)
    if others:
        most = max(most, *_twice(model, work, others, math.inf if recompute == "none" else room, free, pack_tokens != "auto"))
    meanwhile = max(trained, passing)  # when an adapter is saved, a copy of it is made
    block = min(once.kept.of(*full), room - meanwhile) if recompute != "full" else 0.0
    most = max(most, min(kept, block) + meanwhile)
    below = min(work.from_frozen, max(0.0, room - most)) if math.isfinite(room) else work.from_frozen
    memory = Memory(tokens, cost, limit, block, below, 3 * trained + most + below, "")
    return memory._replace(words=_words(memory, free, bool(others), recompute))


def _fitting(costs: Costs, longest: int, room: float) -> int:
    """The most tokens at a time, up to FLAT, of which a full pack fits."""

    def taken(tokens: int) -> float:
        size = _full(tokens, min(tokens, longest))
        return costs.most(*size).of(*size)

    return max(FEWEST, bisect_right(range(FLAT + 1), room, key=taken) - 1)


def _full(tokens: int, longest: int) -> Size:
    """Of the largest pack that there can be."""
    most = max(tokens, longest)
    return most, most * longest


def _size(pack: Pack) -> Size:
    return len(pack.ids), sum(pack.pairs)


def _twice(model: Any, work: Work, sizes: Sequence[Size], room: float, free: float, asked: bool) -> Sequence[float]:
    """What packs take that are computed twice. Raises RecipeError if one does not fit."""
    costs = training_costs(model, work.longest, work.learned, recompute=True)
    taken = [costs.most(*size).of(*size) for size in sizes]
    if max(taken) > room:
        tokens, _ = sizes[taken.index(max(taken))]
        what = f"A pack of {tokens:,} tokens needs {max(taken) / 1e9:.2f} GB for its activations, even computed again layer by layer"
        _refuse(what, room, free, asked)
    return taken


def _refuse(what: str, room: float, free: float, asked: bool) -> NoReturn:
    raise RecipeError(
        f"{what}, and {max(0.0, room) / 1e9:.2f} GB are left for it, of {free / 1e9:.2f} GB that are free. "
        f"Lower data.max_length{' or train.pack_tokens' if asked else ''}."
    )


def _divided(
    model: Any, work: Work, tokens: int, room: float, free: float, asked: bool
) -> tuple[int, Sequence[Sequence[Pack]], float]:
    """How many tokens at a time fit without a backward pass too, the fullest steps, and the most that a pack takes without one.

    Those are packs on which a number is estimated, and of rows to evaluate on: if no longer than what is trained on, they take less.

    Raises:
        RecipeError: Such a pack does not fit.
    """
    costs: Costs | None = None
    while True:
        steps = work.steps(tokens) if work.steps is not None else []
        sizes = [(len(pack.ids), max(pack.pairs)) for step in steps for pack in step if pack.mismatched]  # one after the other
        if work.evaluated > work.longest:
            sizes.append((max(tokens, work.evaluated), work.evaluated**2))
        if not sizes:
            return tokens, steps, 0.0
        costs = costs or measuring_costs(model, max(work.longest, work.evaluated), work.learned)
        taken, largest = max((costs.most(*size).of(*size), size[0]) for size in sizes)
        if taken <= room:
            return tokens, steps, taken
        if asked or tokens <= FEWEST:
            _refuse(f"A pack of {largest:,} tokens needs {taken / 1e9:.2f} GB to be evaluated", room, free, asked)
        tokens = max(FEWEST, tokens // 2)


def _words(memory: Memory, free: float, some: bool, recompute: Recompute) -> str:
    again = "packs that do not fit are computed twice" if some else "nothing is computed twice"
    again = "every pack is computed twice" if recompute == "full" else again
    room = f", of {free / 1e9:.1f} GB that are free" if math.isfinite(free) else ""
    return f"{memory.pack_tokens:,} tokens at a time, in {memory.most / 1e9:.2f} GB beside the model{room}; {again}"
