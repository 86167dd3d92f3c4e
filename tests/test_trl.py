"""Losses and gradients of ten optimizer steps are TRL's: the same model, rows, order and first weights, in float32.

But for label smoothing, which TRL 1.16 takes for the sigmoid loss and does nothing with.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peers import run_peer
from safetensors.torch import load_file
from test_objectives import rows_of
from worlds import WHOLE, make_model

from trimtab.base import Base
from trimtab.data import pack_all, row_groups
from trimtab.data.mismatched import with_mismatched
from trimtab.deploy import load_adapter, save_adapter
from trimtab.evaluate.reference import add_reference_logprobs
from trimtab.methods import attach
from trimtab.methods.lora import LoRA
from trimtab.objectives import Objective
from trimtab.train import TrainConfig, train

SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
import run_peer, torch, transformers
from safetensors.torch import save_file
torch.set_num_threads(1)
spec, losses, gradients = json.load(open(sys.argv[2])), [], {}
trainer = run_peer.preference_trainer(spec, transformers.AutoTokenizer.from_pretrained(spec["model"]), losses)
real = trainer.training_step
def step(*given, **named):
    loss = real(*given, **named)
    for name, p in trainer.model.named_parameters():
        if p.requires_grad:
            gradients[f"{len(losses) - 1}/{name}"] = p.grad.detach().clone()
    return loss
trainer.training_step = step
trainer.train()
save_file(gradients, sys.argv[3])
json.dump([float(loss) for loss in losses], open(sys.argv[4], "w"))
"""
SETTINGS = [
    {"name": "dpo", "beta": 0.2},
    {"name": "dpo", "loss_type": "ipo", "beta": 0.3},
    {"name": "dpo", "loss_type": "hinge", "beta": 0.2},
    {"name": "kto", "beta": 0.2},
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("how", SETTINGS if WHOLE else SETTINGS[::3], ids=lambda how: "-".join(map(str, how.values())))
def test_ten_steps_are_trls(tmp_path, monkeypatch, how):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    make_model(tmp_path / "tiny", 0)
    base = Base.load_folder(tmp_path / "tiny", torch.float32, torch.device("cpu"))
    fresh = attach(base.model, LoRA(rank=4, alpha=8.0))
    save_adapter(base, fresh, tmp_path / "start")
    fresh.detach()
    objective = Objective.pick(how)
    rows = rows_of(objective.data_kind, 40, seed=1)
    objective = objective.resolve_auto(rows)
    if objective.estimates_kl:
        rows = with_mismatched(rows, 0)
    theirs, gradients = _trl(tmp_path, rows, objective)

    adapter = load_adapter(base, tmp_path / "start")
    rows = add_reference_logprobs(base, adapter, "auto", rows, 64).rows
    whole = row_groups(rows)
    steps = [pack_all([rows[n] for unit in whole[at : at + 4] for n in unit], 32) for at in range(0, len(whole), 4)]
    assert any(len(step) > 1 + objective.estimates_kl for step in steps), "micro-batches of a step"
    seen: dict[str, torch.Tensor] = {}
    clip = torch.nn.utils.clip_grad_norm_

    def clipped(*given):
        seen.update({name: parameter.grad.clone() for name, parameter in adapter.parameters().items()})
        return clip(*given)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    config = TrainConfig(schedule="constant", warmup=0.0)
    ours = []
    for step in train(base, adapter, objective, steps, config, 5e-3):
        ours.append(step.loss)
        for name, mine in seen.items():
            path, _, factor = name.rpartition(".")
            their = gradients[f"{step.number - 1}/base_model.model.{path}.lora_{factor}.default.weight"]
            assert float((mine - their).norm()) <= 1e-4 * float(their.norm()) + 1e-7, f"step {step.number}: {name}"
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert len(ours) == 10
    assert abs(ours[-1] - ours[0]) > 1e-3, "something was learned on the way"


def _trl(folder, rows, objective):
    spec = {
        "device": "cpu",
        "dtype": "float32",
        "model": str(folder / "tiny"), "start": str(folder / "start"), "scratch": str(folder / "scratch"),
        "rows": [{"ids": row.ids, "targets": row.target_indices, "side": row.side} for row in rows],
        "rows_per_step": 4, "lr": 5e-3, "objective": objective.plain(), "recompute": False, "grouped": False,
    }  # fmt: skip
    (folder / "spec.json").write_text(json.dumps(spec))
    files = [str(folder / name) for name in ("spec.json", "gradients.safetensors", "losses.json")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(Path(run_peer.__file__).parent), *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "losses.json").read_text()), load_file(folder / "gradients.safetensors")
