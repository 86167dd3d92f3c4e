"""Training that the processes of a group run together, or one alone: python tests/sharded.py JOB.json, where a job is a list of cases.

`run_group` starts such processes; each case's results come back as JSON data, with the adapter's tensors beside them.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STEPS = 10


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run_group(cases: list[dict[str, Any]], size: int, timeout: float = 300, here: int | None = None) -> Any:
    """The results of the cases by process: of each a list, or the error by which it ended.

    Args:
        here: How many processes a machine has; all unless given.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps(cases))
        started = []
        group = {
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(here or size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        for rank in range(size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank % (here or size))} | group if size > 1 else {}
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHELASTIC_USE_AGENT_STORE": "False"} | own
            out = Path(folder) / f"{rank}.json"
            command = [sys.executable, __file__, str(job), str(out)]
            started.append((subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True), out))
        try:
            errors = [process.communicate(timeout=timeout)[1] for process, _ in started]
        finally:
            for process, _ in started:
                process.kill()
        return [
            json.loads(out.read_text()) if out.exists() else error[-3000:]
            for (_, out), error in zip(started, errors, strict=True)
        ]


def _model(case: dict[str, Any]) -> Any:
    import torch
    from families import FAMILIES, tiny
    from kinds import KINDS

    dtype = getattr(torch, case.get("dtype", "float32"))
    if case.get("family", "llama") in FAMILIES:
        return tiny(case.get("family", "llama"), dtype)
    torch.manual_seed(0)
    model = KINDS[case["family"]]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model.eval().requires_grad_(False).to(dtype)


def _memory(level: str) -> Any:
    from trimtab.engine import MemoryPlan
    from trimtab.engine.memory_probe import MemoryCost

    costs = {"none": (("none", MemoryCost(0.0, 0.0)),), "mlp": (("mlp", MemoryCost(0.0, 0.0)),), "full": ()}[level]
    return MemoryPlan(64, costs, 1.0 if level != "full" else 0.0, 1e6, 0.0, 0.0, "")


def trained(case: dict[str, Any], patch: Any) -> dict[str, Any]:
    """Train an adapter by what a case says; what came of it."""
    import torch
    from families import method_of, perturb
    from invariants.suite import FORKED, JUDGED, PAIRS, ROWS, SAMPLE

    from trimtab.artifacts import write_tensors
    from trimtab.base import Base, ModelConfig
    from trimtab.core.processes import processes
    from trimtab.data import pack_all
    from trimtab.distributed import Engine
    from trimtab.engine import ensure_checked, generate, pack_logprobs
    from trimtab.engine.patching import layers_by_hand
    from trimtab.evaluate.reference import logprobs
    from trimtab.methods import Method, attach
    from trimtab.objectives import Objective
    from trimtab.train import TrainConfig, optimizer_bytes, train

    base = Base(_model(case))
    _ = base.fingerprint
    method = Method.pick(case["method"]) if isinstance(case.get("method"), dict) else method_of(case.get("method", "lora"))
    objective = Objective.pick(case.get("objective", "sft"))
    rows = {"answers": [*ROWS, *FORKED], "pairs": PAIRS, "judged": JUDGED}[objective.data_kind]
    objective = objective.resolve_auto(rows)
    engine, model = Engine.pick(case.get("engine", "ddp")), ModelConfig(name="tiny", device="cpu")
    config = TrainConfig(schedule="constant", warmup=0.0, epochs=1.0, **case.get("train", {}))
    engine.check(model, method, objective, config)
    ensure_checked(base.model)
    adapter = attach(base.model, method, 0, sample=SAMPLE)
    if case.get("moved", False):
        perturb(adapter.parameters(), 0.1)
    pack_logprobs(base.model, pack_all(rows, 24)[0])
    before, plain = _bytes_of(base.model), base.model.num_parameters()
    engine.prepare(base, adapter, model)
    packs = pack_all(rows, case.get("pack_tokens", 24))
    calls = _counted_layers()
    _break(case.get("broken"), base, patch)
    memory = _memory(case["recompute"]) if "recompute" in case else None
    steps, optimizer = [packs] * case.get("steps", STEPS), engine.optimizer(adapter, config)
    losses = []
    for step in train(base, adapter, objective, steps, config, case.get("lr", 2e-3), memory, optimizer):
        losses.append([step.loss, step.grad_norm])
        if step.number == case.get("resumed_after"):
            break
    if "resumed_after" in case:
        optimizer = _resumed(optimizer, engine.optimizer(adapter, config))
        rest = train(base, adapter, objective, steps, config, case.get("lr", 2e-3), memory, optimizer)
        losses += [[step.loss, step.grad_norm] for step in rest]
    result = {
        "losses": losses,
        "trained": _bytes_of(base.model, trained=True),
        "moments": sum(t.nbytes for held in optimizer._states() for t in held.values() if hasattr(t, "nbytes") and t.ndim),
        "planned": [optimizer_bytes(base, config, of_all=of_all) for of_all in (False, True)],
        "packs": len(packs),
        "digests": [*optimizer.digests().values()],
        "held": _bytes_of(base.model),
        "kept": sum(t.untyped_storage().nbytes() for t in {id(t): t for t in base._frozen_weights.values()}.values()),
        "before": before,
        "parameters": [plain, base.model.num_parameters()],
        "by hand": calls["by hand"],
        "layers": layers_by_hand(base.model),
        "plain": all(type(p.data) is torch.Tensor for p in adapter.parameters().values()),
    }
    with adapter.disabled():
        result["reference"] = logprobs(base, rows, 64)
    result["scores"] = logprobs(base, rows, 64)
    if case.get("answers"):
        result["answers"] = [
            list(map(int, a)) for a in generate(base.model, [rows[0].ids[:4], rows[1].ids[:6]], (2,), max_new_tokens=6)
        ]
    base.check_unchanged()
    if case.get("broken") == "save":  # what this process has
        write_tensors(Path(case["tensors"]), optimizer.named)
    state = optimizer.state()
    if processes.first and "tensors" in case:
        from safetensors.torch import save_file

        with optimizer.whole_in(state):
            save_file(adapter.state(), case["tensors"])
    processes.equal_passes = False
    base.release()
    result["after release"] = _bytes_of(base.model)
    return result


def _resumed(before: Any, optimizer: Any) -> Any:
    """The optimizer after the steps of another, by what that has saved: its values, which the weights have no longer, too."""
    import torch

    from trimtab.core.processes import processes

    state = {name: tensor.clone() for name, tensor in processes.tensors_of_first(before.state()).items()}
    with torch.no_grad():
        for part in before.parameters:
            part.fill_(7.0)
    optimizer.load(state, before.taken)
    return optimizer


def _bytes_of(model: Any, *, trained: bool = False) -> dict[str, int]:
    """Of the frozen weights that this process holds, in the model's layers and elsewhere; or of those that are trained."""
    held = {"layers": 0, "elsewhere": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad is trained:
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            held["layers" if ".layers." in name or ".h." in name else "elsewhere"] += (
                local.nbytes if trained else local.untyped_storage().nbytes()
            )
    return held


def _counted_layers() -> dict[str, int]:
    """How often layers are computed by hand, from now on."""
    from trimtab.engine import patching

    calls, own = {"by hand": 0}, patching.compute_layer

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls["by hand"] += 1
        return own(*args, **kwargs)

    patching.compute_layer = counting
    return calls


def _break(what: str | None, base: Any, patch: Any) -> None:
    """Let something go wrong, that has to be noticed."""
    import torch

    from trimtab.core.processes import processes
    from trimtab.distributed import _shared_optimizer
    from trimtab.distributed._shared_optimizer import SharedOptimizer, _Stretch
    from trimtab.train import Optimizer

    if what == "sum":
        patch.setattr(Optimizer, "sum_gradients", lambda self: None)
    elif what == "base":
        with torch.no_grad():
            next(t for name, t in base._frozen_weights.items() if ".layers." in name).add_(1.0)
    elif what in ("mean", "sync"):  # the latter as of a backward pass of which FSDP is told that others follow
        for module in base.model.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                module.set_gradient_divide_factor(float(processes.size)) if what == "mean" else (
                    module.set_requires_gradient_sync(False)
                )
    elif what == "norm":
        patch.setattr(SharedOptimizer, "clip", Optimizer.clip)
    elif what == "machines":
        patch.setattr(_shared_optimizer, "_same_places", lambda mesh: None)
    elif what == "stretch":
        patch.setattr(_Stretch, "send", lambda self: None)
    elif what == "passes":  # one more in the first process
        own = processes.turns
        patch.setattr(processes, "turns", lambda costs: own(costs) + own(costs)[:1] if processes.first else own(costs))


def main() -> None:
    import pytest
    import torch

    from trimtab.core import processes as core
    from trimtab.core.errors import TrimtabError
    from trimtab.core.processes import processes

    job, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    cases, results = json.loads(job.read_text()), []
    if "seconds" in cases[0]:
        core.STEP = timedelta(seconds=cases[0]["seconds"])
    processes.open()
    for case in cases:
        try:
            with pytest.MonkeyPatch.context() as patch:
                results.append(trained(case, patch))
        except TrimtabError as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
        except Exception as error:
            error.add_note(f"case {case}")
            raise
    out.write_text(json.dumps(results))
    processes.close()


if __name__ == "__main__":
    main()
