"""Scores of targets where nothing is trained: their log-probabilities, and whether greedy decoding would choose them."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.core.transfer import to_device
from trimtab.data.pack import Pack
from trimtab.engine.forward import states_at
from trimtab.engine.head import head_of

LOGITS = 32_000_000
"""Logits formed at a time: 128 MB of float32."""


@torch.no_grad()
def pack_target_scores(model: Any, pack: Pack) -> Tensor:
    """Of each of the pack's targets log p, and 1 if it is the likeliest token, 0 if not: 2 N, at least float32, on the model's device.

    Every logit is formed once, however many rows diverge after a token.
    """
    hidden, head = states_at(model, pack, pack.predicts), head_of(model)
    rows = max(1, LOGITS // len(head.weight))
    place = pack.host.place.numpy()
    order = place.argsort(kind="stable")
    starts = range(0, len(hidden), rows)
    cuts = np.searchsorted(place[order], [*starts, len(hidden)]).tolist()
    at, token = to_device(torch.from_numpy(np.stack([place[order], pack.host.target_token.numpy()[order]])), hidden.device)
    parts = []
    for start, (low, high) in zip(starts, pairwise(cuts), strict=True):
        logits = head.logits(hidden[start : start + rows])
        in_part, chosen = at[low:high] - start, token[low:high]
        logprob = logits[in_part, chosen] - logits.logsumexp(dim=1)[in_part]
        parts.append(torch.stack([logprob, (logits.argmax(dim=1)[in_part] == chosen).to(logprob.dtype)]))
    scores = torch.cat(parts, dim=1)
    return torch.empty_like(scores).index_copy_(1, to_device(torch.from_numpy(order), hidden.device), scores)
