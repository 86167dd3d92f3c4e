"""Step 7: the same task by bottleneck adapters and by prefix tuning: one word of the recipe.

    python examples/07_adapter_and_prefix.py

Both train on the file of step 2, with the learning rate that suits each.
"""

import os

import trimtab

MODEL = "smollm2-135m-instruct"  # or "Qwen/Qwen2.5-1.5B"
SHORT = int(os.environ.get("COURSE_STEPS", "0"))

for method in ({"name": "bottleneck", "kind": "houlsby", "reduction": 16}, {"name": "prefix", "tokens": 20}):
    name = method["name"]
    recipe = trimtab.Recipe.parse(
        {
            "model": MODEL,
            "data": {
                "train": {"belle": {"path": "runs/course/data/belle.jsonl", "limit": 16 if SHORT else 240}},
                "eval": 0.1,
            },
            "method": method,  # lr: auto is another for each
            "train": {"rows_per_step": 8, "epochs": 1, "max_steps": SHORT or None},
            "output": f"runs/course/{name}",
            "certify": False,
        }
    )
    run = trimtab.run_recipe(recipe)
    print(f"{name}: {run.record['trainable_parameters']:,} parameters, validation loss {run.record['best']['eval_loss']:.4f}")
