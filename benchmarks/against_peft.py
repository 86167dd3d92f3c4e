"""The same LoRA run in Hugging Face Trainer + PEFT and in Trimtab, one after the other, alternating.

    python benchmarks/against_peft.py FILE [--rows 64] [--pairs 3] [--targets q_proj v_proj]

Each run is a process of its own. Both start from the same adapter weights and learn the same rows in the same (shuffled)
order, 8 a step, with recomputation off; Trainer pads each batch to its longest row, as its default collator does.
Prints tokens/s (tokens of the rows alone, padding not counted), peak memory, and how far apart the losses are.
Needs `pip install peft accelerate`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import trimtab
from trimtab.data import pack_all
from trimtab.data.order import shuffled
from trimtab.train import train

ROWS_PER_STEP, RANK, LR = 8, 8, 2e-4


def prepare(arguments: argparse.Namespace, folder: Path) -> list:
    """The rows in the order both learn them, and the adapter both start from."""
    base = trimtab.load(arguments.model)
    rows = trimtab.rows(arguments.data, base)[: arguments.rows]
    adapter = trimtab.attach(base.model, trimtab.LoRA(rank=RANK, alpha=16.0, targets=arguments.targets))
    if not (folder / "start").exists():
        trimtab.save_adapter(base, adapter, folder / "start")
    adapter.detach()
    return [base, [rows[n] for n in shuffled(len(rows), seed=0, epoch=0)]]


def with_trimtab(arguments: argparse.Namespace, folder: Path) -> dict:
    base, rows = prepare(arguments, folder)
    adapter = trimtab.load_adapter(base, folder / "start")
    config = trimtab.TrainConfig(schedule="constant", warmup=0.0)
    steps = [pack_all(rows[i : i + ROWS_PER_STEP], config.pack_tokens) for i in range(0, len(rows), ROWS_PER_STEP)]
    started = time.perf_counter()
    losses = [step.loss for step in train(base, adapter, trimtab.SFT(), steps, config, LR)]
    return {"losses": losses, "seconds": time.perf_counter() - started, "tokens": sum(row.shown for row in rows)}


def with_peft(arguments: argparse.Namespace, folder: Path) -> dict:
    import peft
    import transformers

    base, rows = prepare(arguments, folder)
    model = peft.PeftModel.from_pretrained(base.model, folder / "start", is_trainable=True)
    data = []
    for row in rows:
        learned = set(row.learned)
        labels = [token if place in learned else -100 for place, token in enumerate(row.ids)]
        data.append({"input_ids": row.ids, "attention_mask": [1] * len(row.ids), "labels": labels})
    losses = []

    class Recording(transformers.Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(data)  # the rows are shuffled already, the same way for both

    settings = transformers.TrainingArguments(
        output_dir=str(folder / "out"), per_device_train_batch_size=ROWS_PER_STEP, num_train_epochs=1, learning_rate=LR,
        lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, gradient_checkpointing=False,
        optim="adamw_torch", report_to=[], save_strategy="no", logging_steps=1000, disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    collator = transformers.DataCollatorForSeq2Seq(base.tokenizer, padding="longest")
    trainer = Recording(model=model, args=settings, train_dataset=data, data_collator=collator)
    started = time.perf_counter()
    trainer.train()
    return {"losses": losses, "seconds": time.perf_counter() - started, "tokens": sum(row.shown for row in rows)}


def run_one(name: str, words: list[str], folder: str) -> dict:
    command = [sys.executable, __file__, *words, "--only", name, "--folder", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    result = json.loads(done.stdout.strip().splitlines()[-1])
    print(
        f"{name:8} {result['tokens'] / result['seconds']:7.1f} tokens/s  peak {result['peak_gb']:5.2f} GB  "
        f"load {os.getloadavg()[0]:.1f}  losses {' '.join(f'{loss:.5f}' for loss in result['losses'])}",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--only", choices=["trimtab", "peft"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        result = {"trimtab": with_trimtab, "peft": with_peft}[arguments.only](arguments, arguments.folder)
        result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps(result))
        return
    ratios, memory, distance = [], [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.pairs):
            theirs, ours = (run_one(name, sys.argv[1:], folder) for name in ("peft", "trimtab"))
            ratios.append(theirs["seconds"] / ours["seconds"])
            memory.append(ours["peak_gb"] / theirs["peak_gb"])
            gaps = [abs(a - b) / abs(b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
            distance = max(distance, *gaps)
    print(
        f"\nTrimtab is {statistics.median(ratios):.2f}x as fast (pairs: {', '.join(f'{r:.2f}' for r in ratios)}) in "
        f"{statistics.median(memory):.2f} of the memory; losses differ by at most {distance:.1e}, relative."
    )


if __name__ == "__main__":
    main()
