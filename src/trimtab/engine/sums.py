"""Sums by groups on a device: in an order that the host knows, so that they are the same every time.

`index_add_` adds a group's members in whatever order their threads come. Here, neighbours in a group are added in pairs, then
pairs in pairs, and so on: each step adds to places that differ.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.core.transfer import to_device
from trimtab.data.prefix_tree import Numbers


class SumOrder(NamedTuple):
    """The pairs of N members, of G groups that have any."""

    groups: Tensor
    """G."""
    first: Tensor
    """G, the first member of each, to which the others are added."""
    to: Tensor
    """P, of the pairs of all rounds, the members that are added to …"""
    added: Tensor
    """… and those that are added."""
    rounds: Sequence[int]
    """How many pairs each round has."""


def sum_order(group: Numbers, device: torch.device) -> SumOrder:
    """The order for members of these groups (N, on the host), to be used on the device."""
    by_group = group.argsort(kind="stable")
    starts = np.flatnonzero(np.diff(group[by_group], prepend=-1))
    place = np.arange(len(group)) - np.repeat(starts, np.diff(starts, append=len(group)))
    steps = [1 << n for n in range(int(place.max(initial=0)).bit_length())]
    added = [np.flatnonzero(place % (2 * step) == step) for step in steps]
    to = [members - step for members, step in zip(added, steps, strict=True)]
    first = by_group[starts]
    parts = [group[first], first, *(by_group[np.concatenate([starts[:0], *members])] for members in (to, added))]
    sent = to_device(torch.from_numpy(np.concatenate(parts)), device).split([len(part) for part in parts])
    return SumOrder(sent[0], sent[1], sent[2], sent[3], [len(members) for members in added])


def add_sums_(out: Tensor, values: Tensor, order: SumOrder) -> Tensor:
    """out[g] + Σ values of the members of g, in place; the values are written over."""
    for to, added in zip(order.to.split(order.rounds), order.added.split(order.rounds), strict=True):
        values.index_add_(0, to, values.index_select(0, added))
    return out.index_add_(0, order.groups, values.index_select(0, order.first))
