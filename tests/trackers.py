"""The trackers' real packages: what they hold is read back from their own files. `make trackers` runs this; test_track.py has the rest."""

import glob
import importlib
import inspect
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_track import METRICS, NAMES, SHOWN, STAND_INS, folder, sent  # noqa: F401 (a fixture)

from trimtab.track import Tracker, TrackerProcess

pytestmark = pytest.mark.filterwarnings("ignore")  # the packages' own
Points = dict[tuple[str, int], list[float]]
NO_NETWORK = {
    "wandb": {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"},
    "swanlab": {"SWANLAB_API_KEY": "0" * 21, "SWANLAB_API_HOST": "http://127.0.0.1:9"},
    "mlflow": {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"},
}
"""A login, and nobody there."""


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "src"))
    monkeypatch.chdir(tmp_path)


def add(points: Points, name: str, step: int, value: float) -> None:
    points.setdefault((name, step), []).append(value)


def of_tensorboard(kept: Path) -> tuple[Points, list[str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (place,) = glob.glob(f"{kept}/*/*")
    read, points = EventAccumulator(place, size_guidance={"scalars": 0, "tensors": 0}), {}
    read.Reload()
    for name in read.Tags()["scalars"]:
        for event in read.Scalars(name):
            add(points, name, event.step, event.value)
    texts = [event.tensor_proto.string_val[0].decode() for name in read.Tags()["tensors"] for event in read.Tensors(name)]
    return points, texts


def of_wandb(kept: Path) -> tuple[Points, list[str]]:
    """W&B's file is a log of protobuf records in LevelDB's form: blocks of 32 KB, and a header of 7 bytes a piece."""
    from wandb.proto import wandb_internal_pb2 as messages

    (path,) = glob.glob(f"{kept}/offline-run-*/*.wandb")
    content, place, points, texts, whole = Path(path).read_bytes(), 7, {}, [], b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind not in (1, 4):  # whole, or its last piece
            continue
        record = messages.Record()
        record.ParseFromString(whole)
        whole = b""
        items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for name, value in items.items():
            if isinstance(value, int | float) and not name.startswith(("_", "eval/samples/")):
                add(points, name, items["train/global_step"], value)
        texts += [json.dumps({item.key: json.loads(item.value_json) for item in record.run.config.update})]
    texts += [
        Path(table).read_text() for table in glob.glob(f"{kept}/offline-run-*/files/media/table/**/*.json", recursive=True)
    ]
    return points, texts


def of_swanlab(kept: Path) -> tuple[Points, list[str]]:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    (path,) = glob.glob(f"{kept}/run-*/*.swanlab")
    reader, points = DataStoreReader(), {}
    reader.open(path)
    contents = list(reader)
    reader.close()
    for content in contents:
        record = Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "scalar":
            add(points, record.scalar.key, record.scalar.step, record.scalar.value.number)
    files = [*glob.glob(f"{kept}/run-*/files/config.yaml"), *glob.glob(f"{kept}/run-*/media/**/*.json", recursive=True)]
    return points, [Path(file).read_text() for file in files]


def of_mlflow(kept: Path) -> tuple[Points, list[str]]:
    from mlflow import MlflowClient

    client, points = MlflowClient(f"sqlite:///{kept}/mlflow.db"), {}
    (run,) = client.search_runs([client.get_experiment_by_name("trimtab").experiment_id])
    for name in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, name):
            add(points, name, metric.step, metric.value)
    tables = [Path(path).read_text() for path in glob.glob(f"{kept}/artifacts/**/*.json", recursive=True)]
    return points, [json.dumps(run.data.params), *tables]


def of_trackio(kept: Path) -> tuple[Points, list[str]]:
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S; (run,) = S.get_run_records('trimtab'); "
        "of = dict(run_id=run['id']); logs, config = (f('trimtab', run['name'], **of) for f in (S.get_logs, S.get_run_config)); "
        "print(json.dumps([logs, config], default=str))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRACKIO_DIR": str(kept)}, capture_output=True, text=True, check=True
    )
    logs, config = json.loads(done.stdout.splitlines()[-1])
    points: Points = {}
    for log in logs:
        for name, value in log.items():
            if "/" in name and isinstance(value, int | float):
                add(points, name, log["step"], value)
    return points, [
        json.dumps(config),
        json.dumps([value for log in logs for value in log.values() if isinstance(value, dict)]),
    ]


READ = {"tensorboard": of_tensorboard, "wandb": of_wandb, "swanlab": of_swanlab, "mlflow": of_mlflow, "trackio": of_trackio}


def faults(name: str, run: Path) -> list[str]:
    """What the tracker's own files do not hold, or hold twice."""
    points, texts = READ[name](run / "trackers" / name)
    expected = {(key, step): value for step, line in SHOWN for key, value in line.items()} | {("perf/memory_gb", 3): 2.0}
    points = {key: values for key, values in points.items() if name != "wandb" or key[0] != "train/global_step"}
    expected = {key: value for key, value in expected.items() if name != "wandb" or key[0] != "train/global_step"}
    found = [f"lacks {key}" for key in expected.keys() - points.keys()] + [
        f"invents {key}" for key in points.keys() - expected.keys()
    ]
    found += [
        f"{key}: {values}" for key, values in points.items() if values != [pytest.approx(expected.get(key, 0.0), rel=1e-6)]
    ]
    said = " ".join(texts)
    found += [f"lacks {text}" for text in ("peak_lr", "tiny", "expected", "2?") if text not in said]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_stand_in_takes_what_the_real_one_takes(name):
    """Every parameter of a stand-in's functions is one of the real one's."""
    package = Tracker.member(name).package
    real = importlib.import_module(package)
    pairs = {
        "wandb": lambda m: [m.init, m.Table, m.teardown],
        "swanlab": lambda m: [m.init, m.finish],
        "trackio": lambda m: [m.init, m.Table, m.Api.runs],
        "mlflow": lambda m: [value for key, value in vars(m.MlflowClient).items() if not key.startswith("_")],
        "tensorboard": lambda m: [m.EventFileWriter],
    }[name]
    if name == "tensorboard":
        real = importlib.import_module("tensorboard.summary.writer.event_file_writer")
    if name == "mlflow":
        real = importlib.import_module("mlflow")
    at = "tensorboard/summary/writer/event_file_writer.py" if name == "tensorboard" else f"{package}/__init__.py"
    code = compile((STAND_INS / at).read_text().replace("from mlflow.entities import Metric", ""), at, "exec")
    sys.path.insert(0, str(STAND_INS))
    module: dict = {"__name__": "stand-in"}
    exec(code, module)
    sys.path.remove(str(STAND_INS))
    for function in pairs(type("Module", (), module)):
        place = (
            f"MlflowClient.{function.__name__}"
            if name == "mlflow"
            else "Api.runs"
            if function.__name__ == "runs"
            else function.__name__
        )
        theirs = real
        for part in place.split("."):
            theirs = getattr(theirs, part)
        ours, known = inspect.signature(function).parameters, inspect.signature(theirs).parameters
        assert {key for key in ours if key != "self"} <= known.keys(), place


@pytest.mark.parametrize("name", NAMES)
def test_it_holds_all_that_the_metrics_have_once_also_after_it_was_cut_and_resumed(name, folder):  # noqa: F811
    assert sent(name, folder, patience=60) is None
    assert faults(name, folder) == []
    subprocess.run(["rm", "-r", str(folder / "trackers")], check=True)
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("".join(whole.splitlines(keepends=True)[:3]))
    process = TrackerProcess(Tracker.pick(name), folder)
    process.start()
    time.sleep(6)
    os.killpg(process._process.pid, signal.SIGKILL)  # the machine dies
    assert "its process has ended" in process.wait()
    (folder / "metrics.jsonl").write_text(whole)
    assert sent(name, folder, patience=60) is None
    assert faults(name, folder) == []


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_there_is_found(name, folder):  # noqa: F811
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS[:-1]))
    assert sent(name, folder, patience=60) is None
    assert any("lacks ('train/loss', 3)" in fault for fault in faults(name, folder))


@pytest.mark.parametrize("name", NO_NETWORK)
def test_a_login_without_a_network_is_one_message(name, folder, monkeypatch):  # noqa: F811
    for variable, value in NO_NETWORK[name].items():
        monkeypatch.setenv(variable, value)
    process = TrackerProcess(Tracker.pick(name), folder)
    started = time.perf_counter()
    process.start()
    process.finish("done")
    assert time.perf_counter() - started < 1
    said = process.wait(45)
    assert re.match(rf"track: {name}: .*It is off now", said), said
    for variable in NO_NETWORK[name]:
        monkeypatch.delenv(variable)
    assert sent(name, folder, patience=60) is None
    assert faults(name, folder) == [], "sent again, offline"


FULL = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_one_message_and_loses_nothing(name, folder, monkeypatch):  # noqa: F811
    """A limit on the size of files stands for it: writing fails in the middle of the tracker's own."""
    from trimtab.track import _process

    whole = _process.module_command
    monkeypatch.setattr(
        _process,
        "module_command",
        lambda module: [
            *(command := whole(module))[:-1],
            f"import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); {FULL}{command[-1]}",
        ],
    )
    said = sent(name, folder, patience=20)
    assert said is not None, "it failed silently"
    assert re.match(rf"track: {name}: ", said), said
    monkeypatch.setattr(_process, "module_command", whole)
    assert sent(name, folder, patience=60) is None
    assert faults(name, folder) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
