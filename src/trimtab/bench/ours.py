"""One training run by Trimtab, in a process of its own: python -m trimtab.bench.ours SPEC.json."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trimtab.base import Base, ModelConfig
from trimtab.bench.peers import peak_gb
from trimtab.core.files import read_json
from trimtab.data import pack_all, units
from trimtab.data.example import TokenRow
from trimtab.deploy import load_adapter
from trimtab.engine import check_packing
from trimtab.evaluate.reference import PACK_TOKENS, refer
from trimtab.objectives import Objective
from trimtab.train import TrainConfig, plan_training_memory, train


def run(spec: dict[str, Any]) -> dict[str, Any]:
    base = Base.load(ModelConfig(name=spec["model"]))
    adapter = load_adapter(base, Path(spec["start"]))
    config = TrainConfig(schedule="constant", warmup=0.0)
    rows = [
        TokenRow(row["ids"], row["learned"], f"row {n}", len(row["ids"]), row["side"]) for n, row in enumerate(spec["rows"])
    ]
    objective, each = Objective.pick(spec["objective"]), spec["rows_per_step"]
    check_packing(base.model)  # compiles what has not been yet
    os.makedirs(spec["scratch"], exist_ok=True)
    # No reference is known there, not even the last run's.
    os.environ["TRIMTAB_CACHE"] = tempfile.mkdtemp(dir=spec["scratch"])
    started = time.perf_counter()
    if objective.needs_reference:
        rows = refer(base, adapter, "base", rows, PACK_TOKENS).rows
    memory = plan_training_memory(base, config, rows)
    whole = units(rows)
    steps = [
        pack_all([rows[n] for unit in whole[at : at + each] for n in unit], memory.pack_tokens)
        for at in range(0, len(whole), each)
    ]
    losses = [step.loss for step in train(base, adapter, objective, steps, config, spec["lr"], memory)]
    return {"losses": losses, "seconds": time.perf_counter() - started, "peak_gb": peak_gb()}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(read_json(Path(sys.argv[1])))) + "\n")
