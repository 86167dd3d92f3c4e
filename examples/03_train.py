"""Step 3: train the LoRA on the BELLE rows, eight at a time and four times before each update.

    python examples/03_train.py        # the same as a recipe on the command line: trimtab train RECIPE.yaml

bfloat16 and gradient checkpointing need no setting: `model.dtype: auto` and `train.recompute: auto` choose them where there is a GPU.
"""

import os
from typing import Any

import trimtab

MODEL = "smollm2-135m-instruct"  # or "Qwen/Qwen2.5-1.5B"
SHORT = int(os.environ.get("COURSE_STEPS", "0"))  # the tests stop after so many steps

recipe = trimtab.Recipe.parse(
    {
        "model": MODEL,
        "data": {
            "train": {"belle": {"path": "runs/course/data/belle.jsonl", "limit": 16 if SHORT else 10_000}},
            "eval": 0.1,  # held out; the adapter with the lowest loss on them is the run's
        },
        "method": {"name": "lora", "rank": 8, "alpha": 32, "dropout": 0.1, "targets": ["q_proj", "v_proj"]},
        "train": {
            "rows_per_step": 8 * 4,  # batch size × accumulation: how many are computed at once follows from the memory
            "epochs": 1.5,  # the chapter's 3, halved, so that the course takes minutes on two cores
            "max_steps": SHORT or None,
            "lr": 1e-3,
            "warmup": 0.05,  # a fraction of the steps, or a number of them: 100
            "evaluate_every": SHORT or 10,
            "save_every": 500,  # save_steps
            "keep": 2,  # save_total_limit; the best one is kept besides
        },
        # "track": "tensorboard",                   # or wandb, swanlab: report_to
        "output": "runs/course/lora",  # losses in metrics.jsonl; the adapter and its tokenizer; a certificate
        "certify": not SHORT,
    }
)


class Progress(trimtab.RunObserver):
    """What the loop tells while it runs: logging_steps is every step here."""

    def logged(self, kind: str, step: int, values: dict[str, Any]) -> None:
        rate = f", learning rate {values['lr']:.1e}" if kind == "train" else ""
        print(f"step {step:3} {kind:5} loss {values['loss']:.4f}{rate}")


run = trimtab.run_recipe(recipe, Progress())
best = run.record["best"]
weights = run.folder / "adapter" / "adapter_model.safetensors"
print(f"best at step {best['step']}: validation loss {best['eval_loss']:.4f}; {weights} has {weights.stat().st_size:,} bytes")
