"""NEFTune: noise on the input embeddings, in training alone (Jain et al. 2023, arXiv:2310.05914).

A row's noise is a function of the seed, the step and the row, never of the pack that it is in. So two rows have different noise on a
prefix that they share, and packs have to be flat.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trimtab.core.transfer import to_device
from trimtab.data import Pack
from trimtab.data.example import TokenRow
from trimtab.objectives import Objective


def noise_problem(alpha: float, objective: Objective) -> str | None:
    """Why noise of this strength can't be trained with, if it can't."""
    if alpha and objective.needs_reference:
        return f"train.neftune: {objective.name} compares with a reference model, and noise would be part of the difference. Set it to 0."
    return None


@contextmanager
def noisy_embeddings(model: Any, pack: Pack, alpha: float, seed: int, step: int) -> Iterator[None]:
    """Within the block, the embeddings of the pack's tokens have noise; without any, for an alpha of 0."""
    if not alpha:
        yield
        return
    embeddings, width = model.get_input_embeddings(), model.config.get_text_config().hidden_size
    noise = pack_noise(pack, alpha, width, seed, step).to(next(model.parameters()).dtype)
    sent = to_device(noise, pack.ids.device)
    hook = embeddings.register_forward_hook(lambda module, given, states: states + sent.to(states.dtype))
    try:
        yield
    finally:
        hook.remove()


def pack_noise(pack: Pack, alpha: float, width: int, seed: int, step: int) -> Tensor:
    """The noise of a flat pack's tokens, on the host: T d, uniform in ±alpha / √(L d), with L the tokens of each one's row."""
    rows = zip(pack.rows, (pack.segments[leaf] for leaf in pack.leaves), strict=True)
    return torch.cat([
        row_noise(row, end - start, width, seed, step) * (alpha / math.sqrt(len(row.ids) * width)) for row, (start, end, _) in rows
    ])  # fmt: skip


def row_noise(row: TokenRow, tokens: int, width: int, seed: int, step: int) -> Tensor:
    """Uniform in [−1, 1), for a row's first tokens: tokens d."""
    key = hashlib.sha256(f"neftune/{seed}/{step}/{row.source}/{row.where}/{row.side}/{row.ids}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
    return torch.rand(tokens, width, generator=generator) * 2 - 1
