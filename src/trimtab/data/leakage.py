"""Held-out rows that are learned as well: whole, by their prompt, or nearly."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from trimtab.data.example import TokenRow

WINDOW = 8
"""Tokens that are compared at a time."""
NEARLY = 0.8
"""The share of a held-out row's own windows from which a learned row that has them is nearly the same."""
OWN = 50
"""A window of more learned rows than that, or of more than 1 in 20, is a template's or a phrase, and says nothing."""
FEWEST = 4
"""Windows of its own that a row must have to be compared."""
AT_ONCE = 1_000_000
"""Tokens whose windows are held in memory, about."""


@dataclass(frozen=True)
class Leaks:
    """Places of held-out rows."""

    whole: list[str]
    prompts: list[str]
    """Rows whose prompts are learned with other answers too."""
    nearly: list[tuple[str, str]]
    """Rows that are neither, and the learned rows that say nearly the same."""


def leaks(rows: Sequence[TokenRow], held_out: Sequence[TokenRow]) -> Leaks:
    """Which held-out rows are learned as well."""
    whole = {digest(row.ids) for row in rows}
    prompts = {digest(row.ids[: row.target_indices[0]]) for row in rows if row.target_indices[0] > 1}
    same = [row for row in held_out if digest(row.ids) in whole]
    asked = [row for row in held_out if row.target_indices[0] > 1 and digest(row.ids[: row.target_indices[0]]) in prompts]
    known = {id(row) for row in (*same, *asked)}
    nearly = _nearly(rows, [row for row in held_out if id(row) not in known])
    return Leaks([row.where for row in same], [row.where for row in asked], nearly)


def digest(ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(str(ids).encode(), digest_size=16).digest()


def _nearly(rows: Sequence[TokenRow], held_out: Sequence[TokenRow]) -> list[tuple[str, str]]:
    """Held-out rows most of whose windows are those of one learned row, and that row: a text that was edited, cut or quoted."""
    theirs, of = _windows(held_out)
    wanted = theirs.unique()
    if not len(wanted):
        return []
    found, times = [(wanted[:0], wanted[:0])], torch.zeros(len(wanted), dtype=torch.long)
    for start, several in _parts(rows):
        hashes, owners = _windows(several)
        at = torch.searchsorted(wanted, hashes).clamp(max=len(wanted) - 1)
        hit = wanted[at] == hashes
        times += torch.bincount(at[hit], minlength=len(wanted))
        found.append((at[hit], owners[hit] + start))
    own = times <= min(OWN, max(3, len(rows) // 20))
    learned: dict[int, list[int]] = {}
    for at, owners in found:
        for key in (at * len(rows) + owners)[own[at]].unique().tolist():
            learned.setdefault(key // len(rows), []).append(key % len(rows))
    mine: dict[int, set[int]] = {}
    for window, row in zip(torch.searchsorted(wanted, theirs).tolist(), of.tolist(), strict=True):
        if own[window]:
            mine.setdefault(row, set()).add(window)
    close: list[tuple[str, str]] = []
    for number, windows in sorted(mine.items()):
        shared = Counter(chain.from_iterable(learned.get(window, ()) for window in windows))
        row, most = shared.most_common(1)[0] if shared else (0, 0)
        if len(windows) >= FEWEST and most >= NEARLY * len(windows):
            close.append((held_out[number].where, rows[row].where))
    return close


def _parts(rows: Sequence[TokenRow]) -> Iterator[tuple[int, Sequence[TokenRow]]]:
    """Rows of AT_ONCE tokens or a little more, and the first one's number."""
    start = tokens = 0
    for end, row in enumerate(rows, 1):
        tokens += len(row.ids)
        if tokens >= AT_ONCE or end == len(rows):
            yield start, rows[start:end]
            start, tokens = end, 0


def _windows(rows: Sequence[TokenRow]) -> tuple[Tensor, Tensor]:
    """A number for each WINDOW tokens that follow each other in a row, and the row's."""
    ids = torch.tensor(list(chain.from_iterable(row.ids for row in rows)), dtype=torch.long)
    owners = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(row.ids) for row in rows], dtype=torch.long))
    if len(ids) < WINDOW:
        return ids[:0], owners[:0]
    hashes = torch.zeros(len(ids) - WINDOW + 1, dtype=torch.long)
    for place in range(WINDOW):
        hashes += ids[place : place + len(hashes)] * pow(0x9E3779B97F4A7C15, place + 1, 1 << 63)  # modulo 2⁶⁴
    inside = owners[: len(hashes)] == owners[WINDOW - 1 :]
    return hashes[inside], owners[: len(hashes)][inside]
