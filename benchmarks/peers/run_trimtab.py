"""One training run by Trimtab, in a process of its own: python benchmarks/peers one SPEC.json."""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from peers.floor import synchronize
from peers.run_peer import peak_gb

from trimtab.base import Base, ModelConfig
from trimtab.data import pack_all, row_groups
from trimtab.data.example import TokenRow
from trimtab.deploy import load_adapter
from trimtab.engine import check_packing
from trimtab.evaluate.reference import PACK_TOKENS, add_reference_logprobs
from trimtab.objectives import Objective
from trimtab.train import TrainConfig, plan_training_memory, train


def run(spec: dict[str, Any]) -> dict[str, Any]:
    base = Base.load(ModelConfig(name=spec["model"], device=spec["device"], dtype=spec["dtype"]))
    adapter = load_adapter(base, Path(spec["start"]))
    config = TrainConfig(schedule="constant", warmup=0.0)
    rows = [
        TokenRow(row["ids"], row["targets"], f"row {n}", len(row["ids"]), row["side"]) for n, row in enumerate(spec["rows"])
    ]
    objective, each = Objective.pick(spec["objective"]), spec["rows_per_step"]
    check_packing(base.model)  # compiles what has not been yet
    if base.device.type != "cpu":
        plan_training_memory(base, config, rows)  # so does this there, with packs as large as those to come
    os.makedirs(spec["scratch"], exist_ok=True)
    os.environ["TRIMTAB_CACHE"] = tempfile.mkdtemp(dir=spec["scratch"])  # which knows no reference, not even the last run's
    started = time.perf_counter()
    if objective.needs_reference:
        rows = add_reference_logprobs(base, adapter, "base", rows, PACK_TOKENS).rows
    memory = plan_training_memory(base, config, rows)
    whole = row_groups(rows)
    steps = [
        pack_all([rows[n] for unit in whole[at : at + each] for n in unit], memory.pack_tokens)
        for at in range(0, len(whole), each)
    ]
    losses = [step.loss for step in train(base, adapter, objective, steps, config, spec["lr"], memory)]
    synchronize(base.device)
    return {"losses": losses, "seconds": time.perf_counter() - started, "peak_gb": peak_gb()}
