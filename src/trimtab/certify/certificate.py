"""The certificate: that a run's adapter, loaded by a new process, is the model that was trained, and how much better and worse it is."""

import json
import math
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trimtab.artifacts import failure_advice, is_adapter, is_run, read_adapter, read_certificate
from trimtab.artifacts.run_folder import (
    ADAPTER,
    CERTIFICATE,
    CERTIFICATE_FORMAT,
    CERTIFICATE_TEXT,
    CHECKPOINTS,
    certified_files,
)
from trimtab.base import Base, ModelConfig, room_to_use
from trimtab.core import files
from trimtab.core.errors import ArtifactError, NotCertified, RecipeError
from trimtab.core.process import environment_alone, module_command
from trimtab.data import LoadedData, last_answer_start, row_groups
from trimtab.data.example import TokenRow
from trimtab.deploy import versions
from trimtab.evaluate import paired_difference
from trimtab.objectives import Objective

CANARIES, SAMPLES = 4, 8
"""How many rows' log-probabilities are compared, and how many prompts are answered."""
FORGOTTEN = 0.5
"""Nats a token on general text from which forgetting is noted."""


@dataclass(frozen=True)
class Test:
    """One test of a certificate."""

    name: str
    status: Literal["passed", "noted", "failed"]
    words: str
    difference: tuple[float, float, float] | None = None
    """Of a loss, from the base model's to the adapter's, and the ends of its 95 % interval."""


def canaries(data: LoadedData) -> list[TokenRow]:
    """A few rows by which a model is recognized: the first held-out ones, or else short ones of the training set."""
    if data.eval:
        return [row for row in data.eval if row.side != "mismatched"][:CANARIES]
    first = [row for row in data.train[:64] if row.side != "mismatched"]
    return sorted(first, key=lambda row: len(row.ids))[:CANARIES]


def certify(
    folder: Path,
    base: Base,
    data: LoadedData,
    objective: Objective,
    best: dict[str, Any],
    unmoved: Sequence[str],
    skipped: int = 0,
) -> dict[str, Any]:
    """Have a new process measure a finished run's adapter, and write the certificate into its folder. It is also returned.

    Args:
        best: The record of the adapter that the run ended with, its `canaries` above all.
        unmoved: Tensors of the adapter that training has not moved.
        skipped: Steps that were not taken, because the loss or gradient was NaN or Inf.
    """
    job = {
        "folder": str(folder / ADAPTER),
        "model": None,
        "canaries": [asdict(row) for row in canaries(data)],
        **_prompts(data),
        "measure": True,
        "rows": [asdict(row) for row in data.eval],
        "objective": objective.plain(),
    }
    measured = _measure_in_new_process(job)
    tests = [
        _test_reload(best["canaries"], measured["canaries"], measured["near"]),
        _test_base(measured, base),
        _test_moved(unmoved),
        *([Test("steps", "noted", f"{skipped} were skipped: the loss or gradient was NaN or Inf")] if skipped else []),
        *_test_stops(measured["answers"]),
        _test_gain(measured, objective),
        _test_forgetting(measured),
    ]
    certificate = _contents(folder, base, data, best, tests, measured)
    files.write_manifest(folder / CERTIFICATE, CERTIFICATE_FORMAT, certificate)
    files.write_text(folder / CERTIFICATE_TEXT, certificate_text(certificate))
    return certificate


def _contents(
    folder: Path, base: Base, data: LoadedData, best: dict[str, Any], tests: Sequence[Test], measured: dict[str, Any]
) -> dict[str, Any]:
    return {
        "passed": all(test.status != "failed" for test in tests),
        "tests": [asdict(test) for test in tests],
        "canaries": [{**asdict(row), "logprob": value} for row, value in zip(canaries(data), best["canaries"], strict=True)],
        "answers": measured["answers"],
        "losses": {model: {on: loss["loss"] for on, loss in measured[model].items()} for model in ("adapter", "base")},
        "files": {name: files.sha256_file(folder / name) for name in certified_files(folder)},
        "base": base.fingerprint,
        "data_digest": data.digest,
        "versions": versions(),
    }


def refuse_uncertifiable(model: ModelConfig) -> None:
    """Raise RecipeError, before hours of training, if one process has no memory for a base that several divide: the new process has it whole."""
    try:
        room_to_use(model)
    except RecipeError as error:
        raise RecipeError(f"certify: {error} Or leave the certificate out (certify: false).") from None


def refuse_failed(certificate: dict[str, Any], folder: Path) -> None:
    """Raise NotCertified if a test has failed."""
    failed = [f"  {test['name']}: {test['words']}" for test in certificate["tests"] if test["status"] == "failed"]
    if failed:
        raise NotCertified(
            f"{folder} is finished, but its adapter failed certification:\n"
            + "\n".join([*failed, *failure_advice(certificate["tests"])])
        )


def certificate_text(certificate: dict[str, Any]) -> str:
    """For people: a line for each test, and the sampled answers."""
    head = "Trimtab certificate: " + ("passed" if certificate["passed"] else "NOT PASSED")
    tests = [f"{test['status']:7} {test['name']}: {test['words']}" for test in certificate["tests"]]
    ends = {"stopped": "", "length": "(cut off) ", "context": "(cut off by the context) "}
    answers = [f"  {ends[answer['ended']]}{answer['text']!r}" for answer in certificate["answers"]]
    return "\n".join([head, "", *tests, "", *(["Samples:", *answers] if answers else [])]).rstrip() + "\n"


def _prompts(data: LoadedData) -> dict[str, Any]:
    """Prompts of a few rows, and how long their answers are; plain texts have none."""
    rows = data.eval or data.train
    first = [rows[unit[0]] for unit in row_groups(rows)]
    chosen = [(row.ids[:start], len(row.ids) - start) for row in first if (start := last_answer_start(row)) > 1][:SAMPLES]
    return {"prompts": [ids for ids, _ in chosen], "longest": max((length for _, length in chosen), default=0)}


def _measure_in_new_process(job: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        module_command("trimtab.certify.fresh_process"), input=json.dumps(job), capture_output=True, text=True, check=False,
        env=environment_alone(),
    )  # fmt: skip
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
        raise NotCertified(f"A new process could not load and run {job['folder']}: {last[0]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in result:
        raise NotCertified(f"A new process could not load and run {job['folder']}: {result['error']}")
    return result


def _test_reload(live: Sequence[float], reloaded: Sequence[float], near: tuple[float, float]) -> Test:
    nats, share = near
    error = max((abs(a - b) for a, b in zip(live, reloaded, strict=True)), default=math.inf)
    if len(live) == len(reloaded) and all(abs(a - b) <= nats + share * abs(a) for a, b in zip(live, reloaded, strict=True)):
        message = f"reloaded in a new process, the adapter reproduces training log-probabilities on {len(reloaded)} examples"
        return Test("reload", "passed", f"{message} (largest error {error:.1e} nats)")
    message = f"reloaded in a new process, the adapter gives a log-probability that is {error:.3g} nats off"
    return Test("reload", "failed", f"{message}: what was saved is not what was trained")


def _test_base(measured: dict[str, Any], base: Base) -> Test:
    changed = [part for part, value in base.fingerprint.items() if measured["fingerprint"][part] != value]
    if changed or not measured["finite"]:
        return Test("base", "failed", f"different {', '.join(changed)}" if changed else "the adapter holds NaN or Inf")
    return Test("base", "passed", "the base model is unchanged (weights, tokenizer, template); the adapter's values are finite")


def _test_moved(unmoved: Sequence[str]) -> Test:
    if unmoved:
        return Test(
            "moved", "failed", f"training has not changed {unmoved[0]}{f' and {len(unmoved) - 1} more' if unmoved[1:] else ''}"
        )
    return Test("moved", "passed", "training has changed every tensor of the adapter")


def _test_stops(answers: Sequence[dict[str, Any]]) -> list[Test]:
    if not answers:
        return []
    ends = [answer["ended"] for answer in answers]
    stopped, full = ends.count("stopped"), ends.count("context")
    message = f"{stopped} of {len(answers)} answers stopped at EOS"
    message += f"; {full} were cut off because the model's context was full, and are not judged" if full else ""
    failed = not stopped and full < len(answers)
    return [Test("stops", "passed" if stopped == len(answers) else "failed" if failed else "noted", message)]


def _test_gain(measured: dict[str, Any], objective: Objective) -> Test:
    if "held_out" not in measured["adapter"]:
        return Test("gain", "noted", "no examples were held out, so the improvement is unknown")
    if "held_out" not in measured["base"]:
        return Test("gain", "noted", "the base model can't read the held-out examples, which have new tokens")
    ours, theirs = measured["adapter"]["held_out"], measured["base"]["held_out"]
    other = "reference model" if objective.needs_reference else "base model"
    losses, found = _compared(ours, theirs, other)
    _, low, high = found
    message = f"{objective.name} loss on {len(ours['counts']):,} held-out examples: {losses}"
    return Test("gain", "failed" if low > 0 else "passed" if high < 0 else "noted", message, found)


def _test_forgetting(measured: dict[str, Any]) -> Test:
    ours, theirs = measured["adapter"]["general"], measured["base"]["general"]
    losses, found = _compared(ours, theirs, "base model")
    return Test("forgetting", "noted" if found[0] > FORGOTTEN else "passed", f"loss on general text: {losses}", found)


def _compared(ours: dict[str, Any], theirs: dict[str, Any], other: str) -> tuple[str, tuple[float, float, float]]:
    """The losses of the adapter and of another model, in words, and their difference with its 95 % interval."""
    difference, (low, high) = paired_difference(ours["sums"], theirs["sums"], ours["counts"])
    words = f"adapter {ours['loss']:.4f}, {other} {theirs['loss']:.4f}, difference {difference:+.4f}"
    return f"{words} (95 % interval {low:+.4f} to {high:+.4f})", (difference, low, high)


def verify_files(folder: Path) -> dict[str, Any]:
    """A run's certificate, if every file is what it was then, and no file was added to an adapter.

    Raises:
        ArtifactError: With the file that is not.
    """
    certificate = read_certificate(folder)
    text = folder / CERTIFICATE_TEXT
    if not text.is_file() or text.read_bytes() != certificate_text(certificate).encode():
        raise ArtifactError(f"{text}: is missing, or differs from {CERTIFICATE}.")
    if (folder / ADAPTER).is_dir():
        read_adapter(folder / ADAPTER, ours=True)  # says which tensor it is
    for name, digest in certificate["files"].items():
        if not (folder / name).is_file() or files.sha256_file(folder / name) != digest:
            raise ArtifactError(f"{folder / name}: is missing, or changed since it was certified.")
    added = [name for name in certified_files(folder) if name not in certificate["files"]]
    if added := [name for name in added if name.startswith((f"{ADAPTER}/", f"{CHECKPOINTS}/"))]:
        raise ArtifactError(f"{folder / added[0]}: was not there when the run was certified.")
    return certificate


def verify(folder: Path, model: str | None = None) -> dict[str, Any]:
    """Repeat a certificate's tests of the run's files and adapter; the certificate, if it still holds. Of an adapter's folder,
    those tests that need no run.

    Args:
        model: Where the base is, if not where it was.

    Raises:
        ArtifactError: There is none, or a file is not what it was.
        NotCertified: The adapter does not do what it did, or can't be used.
    """
    if is_adapter(folder):
        return _verify_adapter(folder, model)
    if is_run(folder) and not (folder / CERTIFICATE).exists():
        raise ArtifactError(
            f"{folder}: has no certificate.json: the run has not ended, was told not to make one (certify: false), or the file was lost. "
            f"Its adapter alone can be verified: trimtab verify {folder / ADAPTER}"
        )
    certificate = verify_files(folder)
    rows = [{key: value for key, value in row.items() if key != "logprob"} for row in certificate["canaries"]]
    measured = _measure_in_new_process(_loading_job(folder / ADAPTER, rows, model))
    nats, share = measured["near"]
    for row, value in zip(certificate["canaries"], measured["canaries"], strict=True):
        if not abs(value - row["logprob"]) <= nats + share * abs(row["logprob"]):
            raise NotCertified(
                f"{folder}: the adapter gives {row['where']} the log-probability {value:.6g}; when it was certified, {row['logprob']:.6g}."
            )
    return certificate


def _verify_adapter(folder: Path, model: str | None) -> dict[str, Any]:
    """The tests that an adapter's own manifest allows, by a new process that loads it on its base model."""
    adapter = read_adapter(folder)
    if adapter.method is None:
        raise ArtifactError(f"{folder}: has no manifest of Trimtab (trimtab.json), so there is nothing to verify it against.")
    measured = _measure_in_new_process(_loading_job(folder, [], model))
    tests = [
        Test(
            "files",
            "passed",
            f"the adapter's {len(adapter.tensors)} tensors and its configuration are unchanged since they were saved",
        ),
        Test("base", "passed", "the base model is the one it was trained on (weights, tokenizer, template)")
        if measured["finite"]
        else Test("base", "failed", "the adapter holds NaN or Inf"),
        Test("certificate", "noted", "an adapter alone has none: its run's folder has"),
    ]
    return {"passed": measured["finite"], "tests": [asdict(test) for test in tests], "answers": []}


def _loading_job(folder: Path, canaries: list[dict[str, Any]], model: str | None) -> dict[str, Any]:
    """A job that only loads an adapter and recognizes it."""
    return {"folder": str(folder), "model": model, "canaries": canaries, "prompts": [], "longest": 0, "measure": False}
