"""B12-B15, B18: packed examples, and padding."""

import itertools
from pathlib import Path
from typing import Any

import peft
import torch
from harness import Found, injected, trial
from tiny import IDS, adapted, llama, logits, random_rows, sft, small, stirred
from torch import Tensor

LENGTHS = (20, 13, 27)


def _pack(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """TRL's trainer and a batch of it, in which three rows are packed into one."""
    trainer = sft(
        folder, stirred(adapted(llama())), random_rows(*LENGTHS), packing=True, max_length=64, per_device_train_batch_size=1
    )
    (batch,) = trainer.get_train_dataloader()
    assert batch["input_ids"].shape == (1, sum(LENGTHS)), batch["input_ids"].shape
    return trainer, dict(batch)


def _starts(batch: dict[str, Tensor]) -> list[int]:
    return [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]


def _packed_logits(trainer: Any, batch: dict[str, Tensor]) -> Tensor:
    """As the trainer calls its model: without labels, and without a cache."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "input_ids")}
    return logits(trainer.model, batch["input_ids"], **inputs)


@trial("B12", "TRL SFTTrainer, packing", r"attention implementation|flash|contaminat|leak")
def packed_rows_see_each_other(folder: Path) -> Found:
    with injected():
        trainer, batch = _pack(folder)
        before = _packed_logits(trainer, batch)
        end = _starts(batch)[1]
        batch["input_ids"][0, :end] = torch.arange(100, 100 + end)  # another first row
        after = _packed_logits(trainer, batch)
    leak = float((after - before)[0, end:].abs().max())
    assert not torch.equal(logits(trainer.model, batch["input_ids"])[0, end:], after[0, end:]), "as one text they would differ"
    return Found(leak > 0, f"with another row before them, packed rows' logits move by {leak:.1g}")


@trial("B13", "TRL SFTTrainer, packing", r"position")
def positions_run_on(folder: Path) -> Found:
    with injected():
        trainer, batch = _pack(folder)
        packed = _packed_logits(trainer, batch)
    starts, off = _starts(batch), 0.0
    for start, end in itertools.pairwise(starts):
        alone = logits(trainer.model, batch["input_ids"][:, start:end])
        off = max(off, float((packed[:, start:end] - alone).abs().max()))
    return Found(off > 1e-4 or len(starts) != 4, f"logits of packed rows are those of the rows alone, but for {small(off)}")


@trial("B14", "TRL SFTTrainer, packing", r"label|first token")
def first_token_learned_from_the_row_before(folder: Path) -> Found:
    with injected():
        _, batch = _pack(folder)
    learned = int((batch["labels"][0, _starts(batch)[:-1]] != -100).sum())
    return Found(learned > 0, f"{learned} of {len(LENGTHS)} rows have a first token that is learned")


@trial("B15", "Transformers, without a cache", r"pack|position")
def positions_taken_for_packing(folder: Path) -> Found:
    model, other = llama(), IDS.clone()
    other[:, :6] = IDS[:, :6].flip(1)
    positions = torch.tensor([[*range(6), *range(20, 26)]]).expand(2, -1)  # one text, from which a piece was left out
    with injected():
        blind = (logits(model, other, position_ids=positions) - logits(model, position_ids=positions))[:, 6:].abs().max()
        ones = torch.ones_like(IDS)
        sees = (
            (
                logits(model, other, position_ids=positions, attention_mask=ones)
                - logits(model, position_ids=positions, attention_mask=ones)
            )[:, 6:]
            .abs()
            .max()
        )
    wrong = bool(blind == 0 and sees > 0)
    return Found(wrong, f"where positions leave a gap, what follows sees {'nothing' if wrong else 'all'} of what was before")


@trial("B18", "PEFT, prompt and prefix tuning", r"padding|pad side|left")
def padding_changes_results(folder: Path) -> Found:
    row, pad = IDS[:1], 5
    padded = torch.cat([torch.zeros(1, pad, dtype=torch.long), row], dim=1)
    mask = torch.cat([torch.zeros(1, pad, dtype=torch.long), torch.ones_like(row)], dim=1)
    off = {}
    for name, config in (("prompt", peft.PromptTuningConfig), ("prefix", peft.PrefixTuningConfig)):
        model = stirred(peft.get_peft_model(llama(), config(task_type="CAUSAL_LM", num_virtual_tokens=8))).eval()
        with injected():
            alone = logits(model, row, attention_mask=torch.ones_like(row))[:, -row.shape[1] :]
            beside = logits(model, padded, attention_mask=mask)[:, -row.shape[1] :]
        off[name] = float((beside - alone).abs().max())
    said = " and ".join(f"{move:.2g} ({name} tuning)" for name, move in off.items())
    return Found(max(off.values()) > 1e-3, f"padded on the left, a row's logits move by {said}")
