"""Packs: micro-batches without padding, in which tokens that several rows begin with stand once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trimtab.core.process import gc_paused
from trimtab.core.transfer import to_device
from trimtab.data.bin_packing import divisible_bins, first_fit_decreasing, in_given_order, in_lexical_order
from trimtab.data.example import TokenRow, row_groups
from trimtab.data.prefix_tree import Numbers, Segment, as_array, lay_out, token_indices


@dataclass(frozen=True)
class Pack:
    """One micro-batch of T tokens, N targets and S rows.

    A target says "the token after this one is `token`, in row `row`". There are targets rather than a label for each token,
    because the last token of a shared prompt is followed by the first of each answer.

    It is made on the host, with everything that a pass needs to know there, so that no pass waits for the device.
    """

    ids: Tensor
    """T, int64."""
    positions: Tensor
    """T, int64: each token's place in its own row."""
    segments: tuple[Segment, ...]
    predicts: Tensor
    """M, int64, rising: the indices of the pack's tokens that predict."""
    place: Tensor
    """N, int64: which of those predicts each target."""
    target_token: Tensor
    """N, int64."""
    target_row: Tensor
    """N, int64, not decreasing."""
    rows: tuple[TokenRow, ...]
    """S."""
    leaves: tuple[int, ...]
    """S, the segment in which each row ends."""
    target_weight: Tensor | None = None
    """N, float64, always on the host: the weight of each target in the loss; None if all are 1."""
    on_host: "Pack | None" = None
    """Of a pack on a device, the same on the host."""

    @property
    def host(self) -> "Pack":
        return self.on_host or self

    @property
    def target_at(self) -> Tensor:
        """N, int64: the index of the pack's token that predicts each target."""
        return self.predicts[self.place]

    @property
    def mismatched(self) -> bool:
        """Whether its rows are mismatched: it has no loss."""
        return self.rows[0].side == "mismatched"

    @property
    def pairs(self) -> list[int]:
        """By segment, its tokens times its keys: n² for a row of n tokens alone."""
        keys = [0] * len(self.segments)
        for number, (start, end, parent) in enumerate(self.segments):
            keys[number] = end - start + (keys[parent] if parent >= 0 else 0)
        return [(end - start) * length for (start, end, _), length in zip(self.segments, keys, strict=True)]

    @property
    def targets(self) -> int:
        return len(self.target_token)

    def token_indices(self, row: int) -> Tensor:
        """The indices of a row's tokens in the pack."""
        return torch.from_numpy(token_indices(self.segments, self.leaves[row]))

    def to(self, device: torch.device) -> "Pack":
        """The pack on a device, to which it is sent in one piece, and without waiting for it."""
        if device.type == self.ids.device.type:
            return self
        names = ("ids", "positions", "predicts", "place", "target_token", "target_row")
        tensors = [getattr(self.host, name) for name in names]
        sent = to_device(torch.cat(tensors), device).split([len(tensor) for tensor in tensors])
        return replace(self, on_host=self.host, **dict(zip(names, sent, strict=True)))


def pack_flat(rows: Iterable[TokenRow]) -> Pack:
    """Rows side by side in their order, each a segment of its own: what rows of different adapters need."""
    return _pack(tuple(rows), share=False)


def pack_tree(rows: Iterable[TokenRow]) -> Pack:
    """Rows as a tree, in which shared prefixes stand once. The same in every other respect."""
    return _pack(tuple(rows), share=True)


def _pack(rows: tuple[TokenRow, ...], share: bool, tokens: Sequence[Numbers] | None = None) -> Pack:
    """
    Args:
        tokens: Those of the rows, if they are arrays already.
    """
    tokens = tokens or [as_array(row.ids) for row in rows]
    tree = lay_out([array[:-1] for array in tokens], share=share)  # a last token predicts nothing
    by_row = zip(rows, tokens, tree.leaves, strict=True)
    targets = [_targets(tree.segments, leaf, array, row.target_indices) for row, array, leaf in by_row]
    at, token = (np.concatenate(arrays) for arrays in zip(*targets, strict=True))
    target_row = np.repeat(np.arange(len(targets)), [len(indices) for indices, _ in targets])
    predicts, place = np.unique(at, return_inverse=True)
    tensor = torch.from_numpy
    ids, positions, of_targets = tensor(tree.ids), tensor(tree.positions), (tensor(token), tensor(target_row))
    return Pack(ids, positions, tree.segments, tensor(predicts), tensor(place), *of_targets, rows, tree.leaves, _weights(rows))


def _weights(rows: tuple[TokenRow, ...]) -> Tensor | None:
    """The weight of each target, in the order of the targets."""
    if all(row.weights is None for row in rows):
        return None
    of_rows = (row.weights or [1.0] * len(row.target_indices) for row in rows)
    return torch.tensor([weight for of_row in of_rows for weight in of_row], dtype=torch.float64)


def _targets(segments: tuple[Segment, ...], leaf: int, tokens: Numbers, target_indices: list[int]) -> tuple[Numbers, Numbers]:
    """Of one row: the indices of the tokens that predict its targets, and the targets."""
    first, last = (target_indices[0], target_indices[-1]) if target_indices else (0, -1)
    start, end, _ = segments[leaf]
    before = len(tokens) - 1 - (end - start)  # tokens of the row in other segments
    if before < first and last - first + 1 == len(target_indices):  # one answer in the last segment, as most rows have
        at = start + first - 1 - before
        return np.arange(at, at + len(target_indices)), tokens[first : last + 1]
    indices = as_array(target_indices)
    return token_indices(segments, leaf)[indices - 1], tokens[indices]


@gc_paused()
def pack_all(rows: Iterable[TokenRow], tokens: int, *, share: bool = True, processes: int = 1) -> list[Pack]:
    """Divide rows into packs of at most `tokens` tokens; a longer row gets a pack of its own. Deterministic.

    The two answers of a pair stay together. Mismatched rows have packs of their own, the first ones, since every loss of the step
    depends on them; without a backward pass, these have up to `FORWARD` times the tokens. Rows that share a prefix stay together,
    as many as fit; those runs are packed first-fit decreasing, which takes at most 11/9 of the fewest possible packs, plus one
    (Johnson 1973). If there are a few packs, they are filled again up to fewer tokens, as long as there are no more of them:
    memory is that of the largest.

    Args:
        share: Whether tokens that several rows begin with stand once.
        processes: How many are to divide the packs evenly.
    """
    rows = list(rows)
    mismatched = [row for row in rows if row.side == "mismatched"]
    if 0 < len(mismatched) < len(rows):
        matched = [row for row in rows if row.side != "mismatched"]
        return [
            *pack_all(mismatched, FORWARD * tokens, share=share, processes=processes),
            *pack_all(matched, tokens, share=share, processes=processes),
        ]
    arrays = [as_array(row.ids) for row in rows]
    processed, groups = [array[:-1] for array in arrays], row_groups(rows)
    ordered = in_lexical_order(processed, groups) if share else in_given_order(processed, groups)
    bins = divisible_bins(ordered, tokens, processes) if processes > 1 and ordered else first_fit_decreasing(ordered, tokens)
    least = sum(full.tokens for full in bins) // max(1, len(bins))
    if processes == 1 and 1 < len(bins) <= FEW and least < tokens:
        evener = (first_fit_decreasing(ordered, least + (tokens - least) * part // 8) for part in range(8))
        bins = next((even for even in evener if len(even) <= len(bins)), bins)
    by_bin = [sorted(full.numbers) for full in bins]
    return [_pack(tuple(rows[n] for n in indices), share, [arrays[n] for n in indices]) for indices in by_bin]


FORWARD = 4
"""How many times as many tokens a pack without a backward pass may have, for which nothing is saved."""
FEW = 16
"""Packs that are filled again."""
