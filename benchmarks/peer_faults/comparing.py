"""A15-A20 and B19: preference objectives and their reference model."""

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import Found, injected, trial
from tiny import PAIRS, SIZES, adapted, adapter, dpo, kto, llama, logged, logits, lora, small, told, trained
from torch import nn


@trial("A15", "TRL DPOTrainer", r"reference|ref_model|ref\b")
def reference_is_the_base(folder: Path) -> Found:
    with injected():
        trainer = dpo(folder, trained(), PAIRS, max_steps=1)
        trainer.train()
    (loss,) = logged(trainer)
    half = math.log(2)
    return Found(abs(loss - half) > 1e-3, f"a trained adapter starts at a loss of {loss:.5f} (ln 2 is {half:.5f})")


def _drift(folder: Path, model: nn.Module, **settings: Any) -> float:
    """How far the reference's log-probabilities of answers move in ten steps."""
    trainer = dpo(folder, model, PAIRS, peft_config=lora(**settings), max_steps=10)
    batch = next(iter(trainer.get_train_dataloader()))
    before = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    trainer.train()
    after = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    return float((after - before).abs().max())


@trial("A16", "TRL DPOTrainer", r"disabling adapter layers|reference")
def reference_drifts(folder: Path) -> Found:
    torch.manual_seed(0)
    biased = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES))
    with injected():
        head = _drift(folder, llama(), modules_to_save=["lm_head"])
        bias = _drift(folder, biased, bias="all")
    said = f'by {bias:.2g} nats with bias="all", by {head:.2g} with modules_to_save=["lm_head"]'
    return Found(max(head, bias) > 1e-3, f"in 10 steps the reference moves {said}")


@trial("A17", "TRL DPOTrainer", r"dropout")
def dropout_in_a_comparison(folder: Path) -> Found:
    model = trained(lora_dropout=0.5).train()
    assert not torch.equal(logits(model), logits(model)), "there is no noise to be rid of"
    with injected():
        trainer = dpo(folder, model, PAIRS, max_steps=1)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        one, other = (torch.cat(trainer.compute_ref_log_probs(trainer.model, batch)) for _ in range(2))
        trainer.train()
    (loss,) = logged(trainer)
    wrong = not torch.equal(one, other) or abs(loss - math.log(2)) > 1e-3
    noise = small(float((one - other).abs().max()))
    return Found(wrong, f"with lora_dropout=0.5 the reference's passes are {noise} apart, and the loss starts at {loss:.5f}")


@trial("A18", "TRL KTOTrainer", r"KL|mismatch|last batch|batch size")
def divergence_on_matched_pairs(folder: Path) -> Found:
    rows = [{"prompt": f"say {n}", "completion": f" it is {n}", "label": n % 2 == 0} for n in range(9)]
    with injected():
        trainer = kto(folder, adapted(llama()), rows, num_train_epochs=1)  # batches of 4, 4 and 1
        trainer.train()
    matched = sum(row["KL_completion_ids"] == row["completion_ids"] for row in trainer.train_dataset)
    return Found(matched > 0, f"of 9 rows in batches of 4, {matched} is compared with its own answer, alone in the last batch")


@trial("A19", "TRL DPOTrainer", r"trunc|max_length|empty")
def answer_is_empty_once_cut(folder: Path) -> Found:
    rows = [{**PAIRS[0], "prompt": "say" + " hello" * length} for length in (3, 15, 30, 40)]
    with injected():
        trainer = dpo(folder, adapted(llama()), rows, max_length=32, max_steps=1)
        trainer.train()
    learned = [int(n) for batch in trainer.get_train_dataloader() for n in batch["completion_mask"].sum(-1)]
    return Found(
        min(learned) == 0, f"no side that is learned is empty; of 4 rows, {4 - len(trainer.train_dataset)} is left out"
    )


@trial("A20", "TRL DPOTrainer", r"identical|the same|equal|no signal")
def both_answers_are_the_same(folder: Path) -> Found:
    model = adapted(llama())
    with injected():
        trainer = dpo(folder, model, [{**pair, "rejected": pair["chosen"]} for pair in PAIRS], max_steps=5)
        before = adapter(model)
        trainer.train()
    moved = max(float((after - before[name]).abs().max()) for name, after in adapter(model).items())
    taken, losses = len(trainer.train_dataset), told(logged(trainer))
    return Found(
        taken > 0, f"{taken} of 8 such rows are taken: losses {losses}, and weights move by up to {moved:.1g}, on rounding"
    )


@trial("B19", "TRL DPOTrainer", r"smoothing")
def key_that_nothing_reads(folder: Path) -> Found:
    losses = []
    with injected():
        for smoothing in (0.0, 0.4):
            trainer = dpo(folder, adapted(llama()), PAIRS, max_steps=4, label_smoothing=smoothing)
            trainer.train()
            losses.append(logged(trainer))
    said = "gives the same 4 losses, to the bit" if losses[0] == losses[1] else "gives other losses"
    return Found(losses[0] == losses[1], f"label_smoothing=0.4 with the default loss {said}; it is documented for two others")
