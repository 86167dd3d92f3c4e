"""Several processes train the run that one would: real groups of processes, on the CPU."""

import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from together import RECIPE, run_together, start_together, train_alone
from worlds import make_model, write_rows

import trimtab
from trimtab.core.errors import ProcessLost
from trimtab.core.processes import Processes
from trimtab.data import pack_all
from trimtab.data.example import TokenRow
from trimtab.engine import MemoryPlan, PackCost
from trimtab.evaluate import evaluator
from trimtab.evaluate.function import FunctionFailed

pytestmark = pytest.mark.usefixtures("one_thread")

DRAW = random.Random(0)
ROWS = [
    {
        "prompt": f"Is {n} even? {'x' * DRAW.randint(0, 30)}",
        "completion": ("yes " if n % 2 == 0 else "no ") * DRAW.randint(1, 6),
    }
    for n in range(76)
]
PAIRS = [{"prompt": f"Is {n} one?", "chosen": "yes " * DRAW.randint(1, 4), "rejected": "no, it is not"} for n in range(44)]
JUDGED = [{"prompt": f"Is {n} one?", "completion": "yes " * DRAW.randint(1, 4), "label": n % 3 > 0} for n in range(44)]
JOBS = {
    "sft, dropout, samples": ["method.dropout=0.2", "eval.samples=5"],
    "dpo": ["objective=dpo", "data.train=pairs.jsonl"],
    "kto, recomputed": ["objective=kto", "data.train=judged.jsonl", "train.recompute=full"],
    "float64": [
        "model.dtype=float64",
        "method.dropout=0.1",
        f"train.optimizer={'muon' if hasattr(torch.optim, 'Muon') else 'adafactor'}",
    ],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    transformers.utils.logging.disable_progress_bar()
    make_model(folder / "tiny", 0)
    for name, rows in (("rows", ROWS), ("pairs", PAIRS), ("judged", JUDGED)):
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "occupied").mkdir()
    (folder / "occupied" / "file").touch()
    elsewhere = folder / "elsewhere"
    make_model(elsewhere / "tiny", 1)
    write_rows(elsewhere / "rows.jsonl", ROWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TRIMTAB_CACHE", str(folder / "cache"))
        for name, words in JOBS.items():
            train_alone(folder, [*words, f"output=one/{name}"])
        said = run_together(
            folder,
            [
                *([*words, f"output=two/{name}"] for name, words in JOBS.items()),
                {"words": ["output=interrupted", *JOBS["sft, dropout, samples"]], "interrupted_at": 2},
                ["output=interrupted", *JOBS["sft, dropout, samples"]],
                ["output=occupied"],
                {"words": ["output=halfway", *JOBS["float64"]], "interrupted_at": 3},
            ],
        )
        yield folder, said


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def off(run, other):
    """How far the losses, evaluations, gradient norms and adapters of two runs are apart, relatively."""
    ours, theirs = lines(run), lines(other)
    assert [(a["kind"], a["step"]) for a in ours] == [(b["kind"], b["step"]) for b in theirs]
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() - {"waited"} == b.keys() - {"waited"}
        for key in a.keys() & {"items", "tokens", "computed", "lr", "epoch", "rows"}:
            assert a[key] == b[key], key
        for key in a.keys() & {"loss", "low", "high", "kl", "accuracy"}:
            worst = max(worst, abs(a[key] - b[key]) / max(abs(b[key]), 1e-3))
    mine, its = adapter(run), adapter(other)
    norms = {name: float((mine[name].double() - its[name].double()).norm() / its[name].double().norm()) for name in its}
    assert mine.keys() == its.keys()
    return worst, max(norms.values())


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_train_the_run_of_one(name, made):
    folder, _ = made
    losses, adapters = off(folder / "two" / name, folder / "one" / name)
    assert (losses < 1e-12 and adapters < 1e-12) if name == "float64" else (losses < 1e-6 and adapters < 1e-4)
    record, other = (json.loads((folder / world / name / "run.json").read_text()) for world in ("two", "one"))
    assert (record["processes"], other["processes"]) == (2, 1)
    assert record["plan"]["pack_tokens"] == other["plan"]["pack_tokens"]
    for key in ("steps", "data_digest", "peak_lr", "tokens", "computed_tokens", "base"):
        assert record[key] == other[key]


def test_all_say_the_same_and_one_writes(made):
    folder, said = made
    assert (
        said[0][: len(JOBS)]
        == said[1][: len(JOBS)]
        == [{"status": "done", "steps": one["steps"]} for one in said[0][: len(JOBS)]]
    )
    samples = [
        [line for line in lines(folder / world / "sft, dropout, samples") if line["kind"] == "samples"]
        for world in ("one", "two")
    ]
    assert len(samples[0]) > 1
    assert [line["answers"] for line in samples[0]] == [line["answers"] for line in samples[1]]


def test_an_interrupt_stops_all_after_the_same_step_and_the_run_resumes(made):
    folder, said = made
    stopped, resumed = ([of_rank[len(JOBS) + n] for of_rank in said] for n in (0, 1))
    assert [one["status"] for one in stopped] == ["interrupted"] * 2
    assert stopped[0]["message"] == stopped[1]["message"]
    assert "after step 3" in stopped[0]["message"], "the one in which they hear of it"
    assert [one["status"] for one in resumed] == ["done"] * 2
    same = folder / "interrupted", folder / "two" / "sft, dropout, samples"
    assert off(*same) == (0.0, 0.0), "to the bit, by as many processes"


def test_a_run_of_two_processes_is_resumed_by_one(made, monkeypatch):
    folder, said = made
    assert said[0][-1]["status"] == "interrupted"
    train_alone(folder, ["output=halfway", *JOBS["float64"]])
    assert max(off(folder / "halfway", folder / "one" / "float64")) < 1e-12


def test_what_is_wrong_for_the_process_that_writes_is_so_for_all(made):
    _, said = made
    assert [of_rank[-2]["status"] for of_rank in said] == ["StorageError"] * 2


DRIFT = {
    "forgets_others": "the adapter after step 4",
    "starts_elsewhere": "the adapter after step 4",
    "other_base": "the base model",
    "other_order": "data.seed of the recipe",
}
DRIFT_WORDS = {"other_order": ["data.eval=0"]}  # the examples are the same then


ALONE = {
    "disk": "StorageError: there is no room",
    "data": "DataError: rows.jsonl is not here",
    "data of the first": "DataError: rows.jsonl is not here",
    "folder": "StorageError: it can't be written",
    "tracker": "StorageError: it can't be reached",
    "certificate": "NotCertified: it is no better",
}
"""Errors of one process, outside of steps."""


@pytest.fixture(scope="module")
def with_faults(made):
    """What becomes of runs whose processes have faults, one after the other in one script, which catches their errors."""
    folder, _ = made
    jobs = [{"words": [f"output=bad/{fault}", *DRIFT_WORDS.get(fault, [])], "fault": fault} for fault in DRIFT]
    jobs.append({"words": ["output=bad/means", *JOBS["sft, dropout, samples"]], "fault": "divides_by_own"})
    jobs += [{"words": [f"output=failed/{fault}", "certify=true"], "fault": fault} for fault in (*ALONE, "library")]
    jobs.append(["output=failed/none", *JOBS["sft, dropout, samples"]])
    jobs += [{"words": ["output=failed/metrics"], "fault": "metrics"}, ["output=failed/last"]]
    return run_together(folder, jobs)


@pytest.fixture(scope="module")
def faulty(with_faults):
    return [of_rank[: len(DRIFT) + 1] for of_rank in with_faults]


@pytest.fixture(scope="module")
def failing(with_faults):
    return [of_rank[len(DRIFT) + 1 :] for of_rank in with_faults]


@pytest.mark.parametrize("fault", DRIFT)
def test_processes_that_drift_apart_are_caught(fault, faulty):
    for of_rank in faulty:
        (found,) = (one for one, job in zip(of_rank, DRIFT, strict=False) if job == fault)
        assert (found["status"], found["code"]) == ("ProcessesDiffer", 5)
        assert f"Process 1 of 2 differs from process 0 in {DRIFT[fault]}" in found["message"]


def test_a_mean_of_means_would_be_seen(made, faulty):
    """The negative control of the comparisons above: replicas are equal, and the run is another one."""
    folder, _ = made
    assert faulty[0][-1]["status"] == "done"
    assert off(folder / "bad" / "means", folder / "one" / "sft, dropout, samples")[1] > 1e-3


# One process's view


@pytest.mark.parametrize("fault", ALONE)
def test_an_error_of_one_process_is_raised_in_all(fault, failing):
    for of_rank in failing:
        found = of_rank[list(ALONE).index(fault)]
        assert f"{found['status']}: {found['message']}" == ALONE[fault]


def test_an_error_of_another_kind_is_said_to_be_another_processs(failing):
    found = [of_rank[len(ALONE)] for of_rank in failing]
    assert [one["status"] for one in found] == ["ProcessLost", "ValueError"]
    assert found[0]["message"] == "Process 1 of 2 has failed: ValueError: it is odd"


def test_after_errors_that_were_caught_the_next_run_is_right(made, failing):
    folder, _ = made
    assert [of_rank[len(ALONE) + 1]["status"] for of_rank in failing] == ["done"] * 2
    assert off(folder / "failed" / "none", folder / "two" / "sft, dropout, samples") == (0.0, 0.0)


def test_an_error_of_one_within_steps_parts_the_processes(made, failing):
    folder, _ = made
    found = [of_rank[-2] for of_rank in failing]
    assert [one["status"] for one in found] == ["StorageError", "ProcessLost"]
    assert "can't be reached" in found[1]["message"]
    for of_rank in failing:
        assert of_rank[-1]["status"] == "ProcessLost", "rather than a run in which one waits for ever"
        assert "start the script again" in of_rank[-1]["message"]
    assert not (folder / "failed" / "last").exists()


def test_tasks_are_divided_evenly_and_each_once():
    costs = [9, 1, 1, 1, 8, 7, 2, 2]
    shares = [Processes(rank, 3).share(costs) for rank in range(3)]
    assert shares[0] == shares[1] == shares[2]
    assert sorted(task for share in shares[0] for task in share) == list(range(8))
    assert max(sum(costs[task] for task in share) for share in shares[0]) <= 4 / 3 * sum(costs) / 3 + 1
    equal = [Processes(rank, 3) for rank in range(3)]
    for one in equal:
        one.equal_passes, one._control = True, "connected"
    turns = [one.turns([5, 1, 1, 1]) for one in equal]
    assert len({len(of_one) for of_one in turns}) == 1
    assert sorted(task for of_one in turns for task, own in of_one if own) == [0, 1, 2, 3]
    assert any(not own for of_one in turns for _, own in of_one)
    assert equal[2].turns([1.0]) == [(0, False)], "a process without a task of its own computes one for the others' sake"


def test_what_a_pack_costs_follows_its_tokens_targets_and_pairs():
    from trimtab.testing import tiny_base

    cost = PackCost(tiny_base().model)
    short, long = (pack_all([TokenRow(list(range(3, 3 + n)), [n - 1], "x")], 999)[0] for n in (10, 20))
    many = pack_all([TokenRow(list(range(3, 23)), list(range(1, 20)), "x")], 999)[0]
    assert cost(short) < cost(long) < cost(many)
    assert cost(long) > 2 * cost(short) - cost.target


def test_packs_of_automatic_size_are_made_for_the_processes(monkeypatch):
    from trimtab.testing import tiny_base
    from trimtab.train import steps

    base, rows = tiny_base(), [TokenRow([number % 50 + 3] * 21, [20], f"row:{number}", 21) for number in range(24)]
    trimtab.attach(base.model, trimtab.LoRA(rank=2))

    def packs(size, **settings):
        group = Processes(0, size)
        group._control = "connected"
        monkeypatch.setattr(steps, "processes", group)
        config = trimtab.TrainConfig(rows_per_step=24, **settings)
        plan = steps.plan_training_memory(base, config, rows)
        assert MemoryPlan.from_plain(plan.plain()) == plan
        monkeypatch.setattr(
            steps, "processes", Processes()
        )  # a run that another number of processes resumes has the same packs
        return [len(pack.ids) for pack in steps.TrainingSteps(rows, config, plan)[0]]

    assert packs(1) == [480]
    assert packs(3) == [160] * 3
    assert packs(3, pack_tokens=400) == packs(1, pack_tokens=400) == [240] * 2, "a given size is kept"


def test_alone_everything_stays_with_the_process():
    alone, tensor = Processes(), torch.ones(2)
    alone.open()
    alone.sum_(tensor)
    assert tensor.tolist() == [1, 1]
    assert alone.tell({"a": 1}) == [{"a": 1}]
    assert alone.told_by_first(lambda: 3) == 3
    assert [int(one) for one in alone.each([1, 2], lambda n: torch.tensor([float(n)]))] == [0, 1]
    alone.agree("x", 1)
    with alone.first_here_first(), alone.interrupted_together():
        pass


SCRIPT = """
import os, pathlib
import torch.distributed as dist
import trimtab
base = trimtab.load("tiny")  # one process may do that, and the others something else
trimtab.attach(base.model, trimtab.LoRA(rank=2))
if os.environ["RANK"] == "1":
    assert trimtab.score_loss(base, trimtab.rows("rows.jsonl", base)).rows == 76, "alone, of all"
dist.init_process_group("gloo")  # as accelerate does
trimtab.run_recipe(trimtab.Recipe.read(pathlib.Path("r.yaml"), ["output=connected", "train.max_steps=2"]))
ours = dist.is_initialized()
from trimtab.core.processes import processes
processes.close()
print("still" if ours and dist.is_initialized() else "gone")
"""


def test_a_script_that_connects_its_processes_itself(made):
    folder, _ = made
    found = start_together([sys.executable, "-c", SCRIPT], 2, folder)
    said = [process.communicate(timeout=200) for process in found]
    assert [out.splitlines()[-1:] for out, _ in said] == [["still"]] * 2, said
    assert json.loads((folder / "connected" / "run.json").read_text())["processes"] == 2


def test_a_size_without_a_rank_is_nobodys(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert Processes.of_environment().started == 1
    monkeypatch.setenv("RANK", "1")
    assert (Processes.of_environment().started, Processes.of_environment().size) == (2, 1)
    with pytest.raises(ProcessLost, match="MASTER_ADDR"):
        Processes.of_environment().connect()


def test_processes_wait_for_the_users_function_where_they_may_wait_long(monkeypatch):
    def fails(*_, **__):
        raise FunctionFailed("no")

    waited = []
    monkeypatch.setattr(Processes, "wait", lambda self: waited.append(self))
    monkeypatch.setattr(evaluator, "answer_questions", lambda *_: ["an answer"])
    exam = evaluator.Exam(None, [], evaluator.EvalConfig(metrics=[]), SimpleNamespace(measure=fails))
    assert exam.take().function_error == "no"
    assert len(waited) == 1
