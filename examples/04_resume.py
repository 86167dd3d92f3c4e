"""Step 4: a run that is interrupted is resumed by the same call, and ends with the same adapter, to the last bit.

    python examples/04_resume.py

It needs the file of step 2, as every step from here on.
"""

import os
from pathlib import Path
from typing import Any

import trimtab

MODEL = "smollm2-135m-instruct"  # or "Qwen/Qwen2.5-1.5B"
STEPS = int(os.environ.get("COURSE_STEPS", "6"))


def recipe(output: str) -> trimtab.Recipe:
    data = {"train": {"belle": {"path": "runs/course/data/belle.jsonl", "limit": 8 * STEPS}}, "eval": 0}
    method = {"name": "lora", "rank": 8, "alpha": 32, "dropout": 0.1, "targets": ["q_proj", "v_proj"]}
    train = {"rows_per_step": 8, "max_steps": STEPS, "save_every": 1, "lr": 1e-3}
    return trimtab.Recipe.parse(
        {"model": MODEL, "data": data, "method": method, "train": train, "output": output, "certify": False}
    )


class Interrupted(trimtab.RunObserver):
    """Ctrl-C in the middle of the run."""

    def logged(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if kind == "train" and step == STEPS // 2:
            raise KeyboardInterrupt


try:
    trimtab.run_recipe(recipe("runs/course/interrupted"), Interrupted())
except KeyboardInterrupt as end:
    print("interrupted:", end)
print("saved:", ", ".join(sorted(path.name for path in Path("runs/course/interrupted/checkpoints").iterdir())))
resumed = trimtab.run_recipe(recipe("runs/course/interrupted"))
whole = trimtab.run_recipe(recipe("runs/course/whole"))
files = [run.folder / "adapter" / "adapter_model.safetensors" for run in (resumed, whole)]
print("the resumed adapter is that of a run without interruption:", files[0].read_bytes() == files[1].read_bytes())
