"""DeepSpeed's engines against one process: objectives, methods, models; resumed by other numbers of processes and other engines. Part of
`make scale`, which has DeepSpeed."""

import json
import sys
from contextlib import suppress

import pytest
from families import FAMILIES
from kinds import KINDS
from sharded import run_group
from test_fsdp import check_equal, trained
from test_processes import JUDGED, PAIRS, ROWS, off
from together import RECIPE, run_together, start_together, train_alone
from worlds import make_model, write_rows

from trimtab.core.errors import NotCertified
from trimtab.distributed._shares import REFUSED
from trimtab.methods import Method

pytest.importorskip("deepspeed")
ENGINES = ["zero1", "zero2", "zero3"]
CASES = {
    "sft": {"answers": True},
    "dpo": {"objective": "dpo"},
    "kto, tied, in unequal turns": {"objective": "kto", "family": "llama-tied", "pack_tokens": 16},
    "dropout": {"method": {"name": "lora", "rank": 4, "dropout": 0.1}},
    "recomputed": {"recompute": "full"},
    "recomputed MLPs": {"recompute": "mlp"},
    "no layers by hand": {"family": "gpt2"},
    "rates by factor": {"method": {"name": "lora", "rank": 4, "b_rate": 4.0}},
    "weight decay, no clipping": {"train": {"weight_decay": 0.1, "clip": None}},
    "clipped": {"train": {"clip": 0.01}},
}


@pytest.fixture(
    scope="module", params=[(engine, size) for engine in ENGINES for size in (2, 3)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def of_engine(request, tmp_path_factory):
    engine, size = request.param
    folder = tmp_path_factory.mktemp(engine)
    return *trained([*CASES.values(), {"dtype": "bfloat16"}], folder, size, engine), folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=CASES)
def test_processes_train_what_one_does(number, of_engine):
    check_equal(*of_engine, number)


def test_a_base_of_16_bits(of_engine):
    """A difference of 1e-7 may round an activation to the other side."""
    (*_, alone), several, _ = of_engine
    first, *others = [of_process[-1] for of_process in several]
    assert all(other["digests"] == first["digests"] for other in others)
    for ours, theirs in zip(first["losses"], alone["losses"], strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-3)


@pytest.mark.parametrize("size", [2, 3])
def test_zero3_is_data_parallel_training_to_the_bit_in_16_bits(size, tmp_path):
    """What DeepSpeed's hooks within layers would break: gradients of 16 bits would be added in another order (decision 065)."""
    cases = [{"dtype": "bfloat16", "family": "llama"}, {"dtype": "bfloat16", "family": "llama", "recompute": "full"}]
    shared, whole = (run_group([{**case, "engine": engine} for case in cases], size)[0] for engine in ("zero3", "ddp"))
    for ours, theirs in zip(shared, whole, strict=True):
        assert (ours["losses"], ours["digests"]) == (theirs["losses"], theirs["digests"])


METHODS = Method.names()


@pytest.fixture(scope="module", params=["zero2", "zero3"])
def by_method(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    names = [name for name in METHODS if request.param != "zero3" or name not in {*REFUSED, "full"}]
    return names, *trained([{"method": name, "moved": True, "steps": 4} for name in names], folder, 2, request.param), folder


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, by_method):
    names, *results = by_method
    if method not in names:
        pytest.skip("refused by name")
    check_equal(*results, names.index(method))


MODELS = [*FAMILIES, *KINDS]


@pytest.fixture(scope="module")
def by_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return *trained([{"family": name, "steps": 4} for name in MODELS], folder, 2, "zero3"), folder


@pytest.mark.parametrize("number", range(len(MODELS)), ids=MODELS)
def test_every_kind_of_model(number, by_model):
    check_equal(*by_model, number, adapter=2e-3)  # AdamW makes whole steps of gradients that are nothing but rounding


# Whole runs


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    make_model(folder / "tiny", 0)
    for name, rows in (("rows", ROWS), ("pairs", PAIRS), ("judged", JUDGED)):
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "r.yaml").write_text(RECIPE)
    return folder


RESUMED = [
    ("zero2", 2, "ddp", 1),
    ("ddp", 1, "zero2", 2),
    ("zero1", 2, "zero2", 3),
    ("zero3", 2, "zero2", 2),
    ("zero2", 3, "zero3", 2),
]


@pytest.mark.parametrize(("first", "before", "second", "after"), RESUMED)
def test_a_run_is_resumed_by_another_engine(first, before, second, after, work):
    name = f"{first}-{before}-{second}-{after}"
    words = ["train.epochs=1"]
    said = run_together(work, [{"words": [f"distributed={first}", f"output={name}", *words], "interrupted_at": 2}], before)
    assert {of_process[0]["status"] for of_process in said} == {"interrupted"}, said
    said = run_together(work, [[f"distributed={second}", f"output={name}", *words]], after)
    assert {of_process[0]["status"] for of_process in said} == {"done"}, said
    train_alone(work, [f"output={work / name}-whole", f"model={work / 'tiny'}", f"data.train={work / 'rows.jsonl'}", *words])
    losses, adapters = off(work / name, work / f"{name}-whole")
    assert losses < 2e-6
    assert adapters < 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_a_whole_run(engine, work):
    """With evaluations, checkpoints, the saved adapter and its certificate."""
    more = ["certify=true", "train.max_steps=6"]
    said, _ = run_together(work, [[f"distributed={engine}", f"output=whole-{engine}", *more]], 2, 500)
    assert said[0]["status"] in ("done", "NotCertified"), said  # six steps do not teach it to stop
    tests = json.loads((work / f"whole-{engine}" / "certificate.json").read_text())["tests"]
    assert {test["name"] for test in tests if test["status"] == "passed"} >= {"reload", "base", "moved", "gain"}
    if not (work / "whole").exists():
        with suppress(NotCertified):
            train_alone(
                work, [f"output={work / 'whole'}", f"model={work / 'tiny'}", f"data.train={work / 'rows.jsonl'}", *more]
            )
    losses, adapters = off(work / f"whole-{engine}", work / "whole")
    assert losses < 2e-6
    assert adapters < 1e-4
    ours, theirs = (json.loads((work / name / "run.json").read_text()) for name in (f"whole-{engine}", "whole"))
    assert ours["engine"] == engine
    assert ours["base_parameters"] == theirs["base_parameters"]


CONFIG = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 300, "allgather_bucket_size": 400, "overlap_comm": True}}


def test_a_configuration_acts_and_changes_no_result(work):
    (work / "ds.json").write_text(json.dumps(CONFIG))
    words = ["train.epochs=1"]
    jobs = [
        ["distributed=zero2", "output=plain", *words],
        ["distributed={engine: zero2, config: ds.json}", "output=told", *words],
    ]
    assert [job["status"] for job in run_together(work, jobs)[0]] == ["done", "done"]
    losses, adapters = off(work / "told", work / "plain")
    assert losses < 1e-6
    assert adapters < 1e-5


REFUSALS = {
    "distributed=zero3 method=full": "zero3 cannot train full",
    "distributed=zero3 method=prompt": "zero3 cannot train prompt",
    "distributed=zero3 model.quantize=nf4": "zero3 divides matrices of plain numbers alone",
    "distributed=zero2 train.optimizer=muon": "zero2 cannot divide what muon holds",
    "distributed=zero2 model.dtype=float16": "trains beside a base model in bfloat16 or float32",
}


def test_what_cannot_be_is_refused_by_name(work):
    jobs = [[*words.split(), f"output=refused-{number}"] for number, words in enumerate(REFUSALS)]
    for said in run_together(work, jobs):
        for job, text in zip(said, REFUSALS.values(), strict=True):
            assert job["status"] == "RecipeError", job
            assert text in job["message"]
    assert not list(work.glob("refused-*/adapter"))


def test_a_quantized_base(work):
    pytest.importorskip("bitsandbytes")
    words = ["model.quantize=nf4", "train.epochs=1"]
    jobs = [[f"distributed={engine}", f"output=nf4-{engine}", *words] for engine in ("zero1", "zero2", "ddp")]
    assert [job["status"] for job in run_together(work, jobs)[0]] == ["done"] * 3
    for engine in ("zero1", "zero2"):
        losses, adapters = off(work / f"nf4-{engine}", work / "nf4-ddp")
        assert losses < 1e-6
        assert adapters < 1e-4


def test_only_the_first_process_speaks_and_deepspeed_does_not(work):
    """Whatever DeepSpeed logs would come through the standard output, where run_together expects one line of JSON."""
    command = [
        sys.executable,
        "-m",
        "trimtab",
        "train",
        "r.yaml",
        "distributed=zero3",
        "output=quiet",
        "train.max_steps=2",
    ]
    said = [process.communicate(timeout=300) for process in start_together(command, 2, work)]
    assert "deepspeed" not in "".join(out + errors for out, errors in said).lower().replace("deepspeed 0.", ""), said
    assert said[1] == ("", "")
