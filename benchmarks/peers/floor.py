"""The floor: the floating-point work that no exact method can avoid, and how fast this machine multiplies."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from trimtab.data import lay_out
from trimtab.data.example import TokenRow
from trimtab.methods import Method
from trimtab.methods.lora import LoRA


def least_work(model: Any, steps: Sequence[Sequence[TokenRow]], method: LoRA) -> float:
    """Floating-point operations of training a LoRA on a frozen model for these steps, which are lists of rows.

    With Tu tokens when the rows' shared prefixes are counted once in a step, and N target tokens:
    4 P Tu for the frozen matrices of the blocks (P numbers), forward and back to their inputs; 6 r (in + out) Tu for each
    adapted matrix; 4 V d N for the head; 14 L dq for each pair of tokens of which one sees the other, in attention; less
    what the first layer's q, k, v need not send back, and what of the last layer only target tokens need.
    """
    config = model.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries = config.num_attention_heads * size
    keys = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * size
    everything = Method.member("lora")(targets=["all-linear"])
    assert isinstance(everything, LoRA)
    frozen = sum(at.inputs * at.outputs for at in everything.shapes(model).values())
    adapted = sum(method.rank_of(path) * (at.inputs + at.outputs) for path, at in method.shapes(model).items())
    total = 0.0
    for rows in steps:
        tree = lay_out([row.ids[:-1] for row in rows])
        tokens, targets = len(tree.ids), sum(len(row.target_indices) for row in rows)
        pairs = sum(position + 1 for position in tree.positions)
        total += (4 * frozen + 6 * adapted) * tokens + 4 * config.vocab_size * hidden * targets
        total += 14 * layers * queries * pairs
        total -= 2 * hidden * (queries + 2 * keys) * tokens
        last = frozen / layers - 2 * hidden * keys  # all but what makes keys and values
        total -= 4 * max(0, tokens - targets) * last
    return total


def multiplying_rate(model: Any, tokens: int | None = None, tries: int = 5, device: torch.device | None = None) -> float:
    """Floating-point operations a second of one large matrix product of the model's own shape and dtype: the best of `tries`.

    Args:
        tokens: 1,024 on a CPU and 8,192 elsewhere, unless given: as many as a micro-batch has.
        device: The model's, unless given.
    """
    config, like = model.config.get_text_config(), next(model.parameters())
    device = device or like.device
    tokens = tokens or (1024 if device.type == "cpu" else 8192)
    inputs, outputs = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    x, weight = (torch.randn(*shape, dtype=like.dtype, device=device) for shape in ((tokens, inputs), (inputs, outputs)))
    out, repeats = torch.empty(tokens, outputs, dtype=like.dtype, device=device), 20
    best = float("inf")
    for _ in range(tries):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(repeats):
            torch.mm(x, weight, out=out)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * tokens * inputs * outputs * repeats / best


def synchronize(device: torch.device) -> None:
    """Wait for what the device still computes."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
