"""Step 6: preferences on top: DPO on pairs of answers, then KTO on answers that are judged good or bad.

    python examples/06_preferences.py

Each goes on from an adapter (`start`). The reference is that adapter as it starts: its log-probabilities are computed once, before
training, so there is one model in memory, and no second one.
"""

import os

import trimtab

MODEL = "smollm2-135m-instruct"  # or "Qwen/Qwen2.5-1.5B"
SHORT = int(os.environ.get("COURSE_STEPS", "0"))

for name, objective, file, start in (
    ("dpo", {"name": "dpo", "beta": 0.1}, "pairs.jsonl", "runs/course/lora"),
    ("kto", {"name": "kto", "beta": 0.1}, "judged.jsonl", "runs/course/dpo"),
):
    limit = 8 if SHORT else 80
    recipe = trimtab.Recipe.parse(
        {
            "model": MODEL,
            "data": {"train": {name: {"path": f"runs/course/data/{file}", "limit": limit}}, "eval": 0.25},
            "start": start,
            "objective": objective,
            "train": {"rows_per_step": 8, "epochs": 1, "max_steps": SHORT or None},
            "output": f"runs/course/{name}",
            "certify": False,
        }
    )
    run = trimtab.run_recipe(recipe)
    best, reference = run.record["best"], run.record["reference"]
    print(f"{name}: reference {reference['kind']}; validation loss {best['eval_loss']:.4f} at step {best['step']}")
