"""Runs of several processes: python tests/together.py FOLDER JOBS, once for each rank, as `run_together` starts them.

JOBS is JSON: a list of words of r.yaml each, or a mapping with `words` and the `fault` that the processes are to have. Instead of `words`,
a `command` has those of a command, whose output is kept, and `count` names functions whose calls are counted. Jobs are carried out one
after another by the same processes. The last line that each prints is JSON: what became of each job.
"""

import contextlib
import importlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from trimtab.core.errors import DataError, NotCertified, StorageError

RECIPE = """\
model: tiny
data: {train: rows.jsonl, eval: 12, seed: 0}
method: {rank: 4}
train: {epochs: 2, rows_per_step: 16, lr: 2e-3, evaluate_every: 4, pack_tokens: 96}
output: run
certify: false
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def variables(rank, size, port, **more):
    """What launchers say to a process."""
    ours = os.pathsep.join([str(Path(__file__).parents[1] / "src"), str(Path(__file__).parent)])
    return {
        **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": ours,
        "TRIMTAB_CACHE": os.environ.get("TRIMTAB_CACHE", "cache"), **more,
    }  # fmt: skip


def start_together(command, size, folder, **more):
    """The processes of a group, with their outputs piped."""
    port = free_port()
    return [
        subprocess.Popen(
            command,
            cwd=folder,
            env=variables(rank, size, port, **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def run_together(folder, jobs, size=2, seconds=300, **more):
    """What each process of a group says of its jobs. More variables of the environment may be given."""
    processes = start_together([sys.executable, Path(__file__), str(folder), json.dumps(jobs)], size, folder, **more)
    try:
        said = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * size, [errors[-3000:] for _, errors in said]
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def train_alone(folder, words):
    """The same job by one process, this one."""
    from trimtab.run.recipe import Recipe
    from trimtab.run.script import run_recipe

    return run_recipe(Recipe.read(Path(folder) / "r.yaml", words))


def _forgets_others(patch):
    """As DDP does whose forward is gone around: gradients are never added up."""
    from trimtab.train.optimizer import Optimizer

    patch.setattr(Optimizer, "sum_gradients", lambda self: None)


def _starts_elsewhere(patch):
    """One process's adapter has other first values, and is not sent the others'."""
    from trimtab.core.processes import Processes, processes
    from trimtab.run import start

    attach = start.attach
    patch.setattr(start, "attach", lambda model, method, seed=0, **more: attach(model, method, seed + processes.rank, **more))
    patch.setattr(Processes, "from_first_", lambda self, tensor: None)


def _divides_by_own(patch):
    """Each process divides by its own items, as means of means do."""
    from trimtab.core.processes import processes
    from trimtab.train import loop

    gradients = loop._Passes.gradients

    def own(self, number, packs, items, scale):
        mine = sum(self.objective.items(turn.pack) for turn in packs.own if turn.is_own and not turn.pack.mismatched)
        return gradients(self, number, packs, mine * processes.size, scale)

    patch.setattr(loop._Passes, "gradients", own)


def _other_base(patch):
    """One machine has another version of the model."""
    from trimtab.core.processes import processes

    if processes.rank:
        patch.chdir("elsewhere")


def _other_order(patch):
    """One machine's recipe has another seed of the data."""
    from trimtab.core.processes import processes
    from trimtab.run.recipe import Recipe

    patch.setattr(Recipe, "data_seed", property(lambda self: processes.rank))


def _fails(place, rank, error):
    """A fault: in one of the processes, what is called there raises an error."""

    def fault(patch):
        from importlib import import_module

        from trimtab.core.processes import processes

        def fails(*_, **__):
            raise error

        module, _, name = place.rpartition(".")
        if processes.rank == rank:
            patch.setattr(import_module(f"trimtab.{module}"), name, fails)

    return fault


def _few_tasks_small_packs(patch):
    """The harness knows no tasks but those of files, since it takes seconds to read its own; and there are several packs."""
    from lm_eval.tasks import TaskManager

    from trimtab.evaluate import answers, harness, packed_model

    patch.setattr(harness, "TaskManager", lambda **of: TaskManager(include_defaults=False, **of))
    patch.setattr(packed_model, "PACK_TOKENS", 64)
    patch.setattr(answers, "BATCH", 4)


def _documents_divided(patch):
    """The harness divides its documents among the processes, which divide packs."""
    from trimtab.core.processes import processes
    from trimtab.evaluate.packed_model import PackedModel

    patch.setattr(PackedModel, "rank", processes.rank)
    patch.setattr(PackedModel, "world_size", processes.size)
    patch.setattr(PackedModel, "all_gather", lambda self, tensor: tensor.repeat(processes.size))


def _others_part_is_wrong(patch):
    """What another process than the first computes for it is half of what it should be."""
    from trimtab.core.processes import processes
    from trimtab.evaluate import packed_model

    _few_tasks_small_packs(patch)
    score = packed_model.pack_target_scores
    patch.setattr(packed_model, "pack_target_scores", lambda *of: score(*of) / (1 + processes.rank))


FAULTS = {
    fault.__name__.strip("_"): fault
    for fault in (
        _forgets_others, _starts_elsewhere, _divides_by_own, _other_base, _other_order, _few_tasks_small_packs, _documents_divided,
        _others_part_is_wrong,
    )
} | {
    "disk": _fails("run.start.check_disk", 0, StorageError("there is no room")),
    "data": _fails("run.start.load_data", 1, DataError("rows.jsonl is not here")),
    "data of the first": _fails("run.start.load_data", 0, DataError("rows.jsonl is not here")),
    "library": _fails("run.start.preflight", 1, ValueError("it is odd")),
    "folder": _fails("run.script._begin", 0, StorageError("it can't be written")),
    "tracker": _fails("run.script.tracked", 0, StorageError("it can't be reached")),
    "certificate": _fails("run.script.certify", 0, NotCertified("it is no better")),
    "metrics": _fails("core.files.append_line", 0, StorageError("the disk is full")),
}  # fmt: skip


def carry_out(words):
    """A command in this process: its exit code, and what it says."""
    from trimtab import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        arguments = cli._parsed(cli._parser, words)
        code = arguments.run(arguments) or 0
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def counted(patch, name):
    """A list that has an entry for each call of a function from now on."""
    module, _, attribute = name.rpartition(".")
    module, calls = importlib.import_module(module), []
    function = getattr(module, attribute)
    patch.setattr(module, attribute, lambda *args, **more: (calls.append(0), function(*args, **more))[1])
    return calls


def _main(folder, jobs):
    import pytest
    import torch
    import transformers

    from trimtab.core.errors import TrimtabError
    from trimtab.core.processes import processes
    from trimtab.report import RunObserver
    from trimtab.run.recipe import Recipe
    from trimtab.run.script import run_recipe

    class Interrupts(RunObserver):
        def __init__(self, at):
            self.at = at

        def logged(self, kind, step, values):
            if kind == "train" and step == self.at:
                os.kill(os.getpid(), 2)

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    found = []
    for job in jobs:
        job = job if isinstance(job, dict) else {"words": job}
        try:
            with pytest.MonkeyPatch.context() as patch:
                if "fault" in job:
                    FAULTS[job["fault"]](patch)
                if "command" in job:
                    processes.open()
                    calls = [counted(patch, name) for name in job.get("count", ())]
                    found.append({"status": "done", **carry_out(job["command"]), "calls": list(map(len, calls))})
                    continue
                run = run_recipe(Recipe.read(Path(folder) / "r.yaml", job["words"]), Interrupts(job.get("interrupted_at")))
            found.append({"status": "done", "steps": run.record["steps"]})
        except (TrimtabError, ValueError) as error:
            found.append({"status": type(error).__name__, "code": getattr(error, "exit_code", 1), "message": str(error)})
        except KeyboardInterrupt as error:
            found.append({"status": "interrupted", "message": str(error)})
            processes.told_to_stop = False
            processes._interrupts.clear()
    sys.stdout.write("\n" + json.dumps(found) + "\n")
    sys.stdout.flush()
    processes.close()


if __name__ == "__main__":
    _main(sys.argv[1], json.loads(sys.argv[2]))
