"""Validation rows that are trained on as well: exactly, by their prompt, or nearly."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from trimtab.data.duplicates import digest
from trimtab.data.example import TokenRow

WINDOW = 8
"""Tokens that are compared at a time."""
NEAR = 0.8
"""The share of a validation row's distinctive windows from which a training row that has them is nearly the same."""
MAX_ROWS = 50
"""A window of more training rows than that, or of more than 1 in 20, is a template's or a phrase: it is not distinctive."""
MIN_WINDOWS = 4
"""Distinctive windows that a row must have to be compared."""
BATCH = 1_000_000
"""Tokens whose windows are in memory at a time, about."""


@dataclass(frozen=True)
class Leaks:
    """Places of validation rows that are trained on."""

    exact: list[str]
    prompts: list[str]
    """Rows whose prompts are trained on, maybe with other answers."""
    near: list[tuple[str, str]]
    """Rows that are neither, and the training rows that nearly repeat them."""


def find_leaks(rows: Sequence[TokenRow], held_out: Sequence[TokenRow], prompts: bool = True) -> Leaks:
    """The validation rows that are trained on as well.

    Args:
        prompts: Compare what stands before the first target, too.
    """
    exact = {digest(row.ids) for row in rows}
    known_prompts = {digest(row.ids[: row.target_indices[0]]) for row in rows if prompts and row.target_indices[0] > 1}
    repeated = [row for row in held_out if digest(row.ids) in exact]
    prompted = [
        row for row in held_out if row.target_indices[0] > 1 and digest(row.ids[: row.target_indices[0]]) in known_prompts
    ]
    known = {id(row) for row in (*repeated, *prompted)}
    near = _near(rows, [row for row in held_out if id(row) not in known])
    return Leaks([row.where for row in repeated], [row.where for row in prompted], near)


def _near(rows: Sequence[TokenRow], held_out: Sequence[TokenRow]) -> list[tuple[str, str]]:
    """Validation rows most of whose windows are those of one training row, and that row: a text that was edited, cut or quoted."""
    hashes, owners = _windows(held_out)
    wanted = hashes.unique()
    if not len(wanted):
        return []
    hits, counts = [(wanted[:0], wanted[:0])], torch.zeros(len(wanted), dtype=torch.long)
    for start, batch in _batches(rows):
        trained, numbers = _windows(batch)
        at = torch.searchsorted(wanted, trained).clamp(max=len(wanted) - 1)
        hit = wanted[at] == trained
        counts += torch.bincount(at[hit], minlength=len(wanted))
        hits.append((at[hit], numbers[hit] + start))
    distinctive = counts <= min(MAX_ROWS, max(3, len(rows) // 20))
    training: dict[int, list[int]] = {}  # window -> training rows that have it
    for at, numbers in hits:
        for key in (at * len(rows) + numbers)[distinctive[at]].unique().tolist():
            training.setdefault(key // len(rows), []).append(key % len(rows))
    validation: dict[int, set[int]] = {}  # validation row -> its windows
    for window, row in zip(torch.searchsorted(wanted, hashes).tolist(), owners.tolist(), strict=True):
        if distinctive[window]:
            validation.setdefault(row, set()).add(window)
    near: list[tuple[str, str]] = []
    for number, windows in sorted(validation.items()):
        shared = Counter(chain.from_iterable(training.get(window, ()) for window in windows))
        row, most = shared.most_common(1)[0] if shared else (0, 0)
        if len(windows) >= MIN_WINDOWS and most >= NEAR * len(windows):
            near.append((held_out[number].where, rows[row].where))
    return near


def _batches(rows: Sequence[TokenRow]) -> Iterator[tuple[int, Sequence[TokenRow]]]:
    """Rows of BATCH tokens or a little more, and the index of the first one."""
    start = tokens = 0
    for end, row in enumerate(rows, 1):
        tokens += len(row.ids)
        if tokens >= BATCH or end == len(rows):
            yield start, rows[start:end]
            start, tokens = end, 0


def _windows(rows: Sequence[TokenRow]) -> tuple[Tensor, Tensor]:
    """A hash of every WINDOW successive tokens of a row, and the row's index."""
    ids = torch.tensor(list(chain.from_iterable(row.ids for row in rows)), dtype=torch.long)
    owners = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(row.ids) for row in rows], dtype=torch.long))
    if len(ids) < WINDOW:
        return ids[:0], owners[:0]
    hashes = torch.zeros(len(ids) - WINDOW + 1, dtype=torch.long)
    for place in range(WINDOW):
        hashes += ids[place : place + len(hashes)] * pow(0x9E3779B97F4A7C15, place + 1, 1 << 63)  # modulo 2⁶⁴
    inside = owners[: len(hashes)] == owners[WINDOW - 1 :]
    return hashes[inside], owners[: len(hashes)][inside]
