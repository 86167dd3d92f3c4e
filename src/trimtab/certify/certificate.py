"""The certificate: that a run's adapter, loaded again by a fresh process, is the model that was trained, and what it gained and lost."""

import json
import math
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trimtab.artifacts import advice, is_adapter, is_run, read_adapter
from trimtab.artifacts.run_folder import ADAPTER, CERTIFICATE, CERTIFICATE_TEXT, CHECKPOINTS, certified_files
from trimtab.base import Base
from trimtab.core import files
from trimtab.core.errors import ArtifactError, NotCertified
from trimtab.core.process import environment, fresh_process
from trimtab.data import LoadedData, last_answer_start, row_groups
from trimtab.data.example import TokenRow
from trimtab.deploy import versions
from trimtab.evaluate import paired
from trimtab.objectives import Objective

FORMAT = 2
KEYS = {"passed", "tests", "canaries", "answers", "losses", "files", "base", "data_digest", "versions"}
CANARIES, SAMPLES = 4, 8
"""Rows whose log-probabilities are compared, and prompts that are answered."""
FORGOTTEN = 0.5
"""Nats a token on general text from which forgetting is pointed out."""


@dataclass(frozen=True)
class Tested:
    """One thing that was tested."""

    name: str
    status: Literal["passed", "noted", "failed"]
    words: str


def canaries(data: LoadedData) -> list[TokenRow]:
    """A few rows by which a model is recognized: the first that are held out, or else short ones that are learned."""
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
    """Have a fresh process look at a finished run's adapter, and write what came of it into its folder. It is also returned.

    Args:
        best: What the run knows of the adapter that it ended with, its `canaries` above all.
        unmoved: Tensors of the adapter that training has not moved.
        skipped: Steps that were not taken, because a number was none.
    """
    job = {
        "folder": str(folder / ADAPTER),
        "model": None,
        "canaries": [asdict(row) for row in canaries(data)],
        **_asked(data),
        "measure": True,
        "rows": [asdict(row) for row in data.eval],
        "objective": objective.plain(),
    }
    found = _examine(job)
    tests = [
        _reloaded(best["canaries"], found["canaries"], found["near"]),
        _same_base(found, base),
        _moved(unmoved),
        *(
            [Tested("steps", "noted", f"{skipped} were skipped, because a loss or gradient was not a number")]
            if skipped
            else []
        ),
        *_stopped(found["answers"]),
        *_held_out(found, objective),
        _remembered(found),
    ]
    certificate = _written_down(folder, base, data, best, tests, found)
    files.write_manifest(folder / CERTIFICATE, FORMAT, certificate)
    files.write_text(folder / CERTIFICATE_TEXT, certificate_text(certificate))
    return certificate


def _written_down(
    folder: Path, base: Base, data: LoadedData, best: dict[str, Any], tests: Sequence[Tested], found: dict[str, Any]
) -> dict[str, Any]:
    return {
        "passed": all(one.status != "failed" for one in tests),
        "tests": [asdict(one) for one in tests],
        "canaries": [{**asdict(row), "logprob": value} for row, value in zip(canaries(data), best["canaries"], strict=True)],
        "answers": found["answers"],
        "losses": {name: {of: one["loss"] for of, one in found[name].items()} for name in ("adapter", "base")},
        "files": {name: files.sha256_file(folder / name) for name in certified_files(folder)},
        "base": base.fingerprint,
        "data_digest": data.digest,
        "versions": versions(),
    }


def refuse_failed(certificate: dict[str, Any], folder: Path) -> None:
    """Raise NotCertified if something has failed."""
    failed = [f"  {one['name']}: {one['words']}" for one in certificate["tests"] if one["status"] == "failed"]
    if failed:
        raise NotCertified(
            f"{folder} is finished, and its adapter is not what it should be:\n"
            + "\n".join([*failed, *advice(certificate["tests"])])
        )


def certificate_text(certificate: dict[str, Any]) -> str:
    """For people: a line for each test."""
    head = "Trimtab certificate: " + ("passed" if certificate["passed"] else "NOT PASSED")
    tests = [f"{one['status']:7} {one['name']}: {one['words']}" for one in certificate["tests"]]
    cut = {"stopped": "", "length": "(cut off) ", "context": "(cut off by the context) "}
    said = [f"  {cut[one['ended']]}{one['text']!r}" for one in certificate["answers"]]
    return "\n".join([head, "", *tests, "", *(["Samples:", *said] if said else [])]).rstrip() + "\n"


def _asked(data: LoadedData) -> dict[str, Any]:
    """Prompts of a few rows, and how long their answers are; none of plain texts, which nothing asks for."""
    rows = data.eval or data.train
    asked = [rows[unit[0]] for unit in row_groups(rows)]
    chosen = [(row.ids[:start], len(row.ids) - start) for row in asked if (start := last_answer_start(row)) > 1][:SAMPLES]
    return {"prompts": [ids for ids, _ in chosen], "longest": max((length for _, length in chosen), default=0)}


def _examine(job: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        fresh_process("trimtab.certify.fresh_process"), input=json.dumps(job), capture_output=True, text=True, check=False,
        env=environment(),
    )  # fmt: skip
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise NotCertified(f"A fresh process could not load and run {job['folder']}: {last[0]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in result:
        raise NotCertified(f"A fresh process could not load and run {job['folder']}: {result['error']}")
    return result


def _reloaded(live: Sequence[float], found: Sequence[float], near: tuple[float, float]) -> Tested:
    nats, share = near
    off = max((abs(a - b) for a, b in zip(live, found, strict=True)), default=math.inf)
    words = f"a fresh process gives {len(found)} rows the log-probabilities that training had, to {off:.1e} nats"
    same = len(live) == len(found) and all(abs(a - b) <= nats + share * abs(a) for a, b in zip(live, found, strict=True))
    if same:
        return Tested("reload", "passed", words)
    return Tested(
        "reload",
        "failed",
        f"a fresh process gives a row a log-probability {off:.3g} nats off: what is saved is not what was trained",
    )


def _same_base(found: dict[str, Any], base: Base) -> Tested:
    changed = [part for part, value in base.fingerprint.items() if found["fingerprint"][part] != value]
    if changed or not found["finite"]:
        return Tested(
            "base", "failed", f"different {', '.join(changed)}" if changed else "the adapter holds values that are not finite"
        )
    return Tested("base", "passed", "the base is what it was, weights, tokenizer and template; the adapter's values are finite")


def _moved(unmoved: Sequence[str]) -> Tested:
    if unmoved:
        return Tested(
            "moved", "failed", f"training has not moved {unmoved[0]}{f' and {len(unmoved) - 1} more' if unmoved[1:] else ''}"
        )
    return Tested("moved", "passed", "training has moved every tensor of the adapter")


def _stopped(answers: Sequence[dict[str, Any]]) -> list[Tested]:
    if not answers:
        return []
    ends = [one["ended"] for one in answers]
    stopped, full = ends.count("stopped"), ends.count("context")
    words = f"{stopped} of {len(answers)} answers end by themselves"
    words += f", and {full} were cut off because the model's context was full, which says nothing of them" if full else ""
    failed = not stopped and full < len(answers)
    return [Tested("stops", "passed" if stopped == len(answers) else "failed" if failed else "noted", words)]


def _held_out(found: dict[str, Any], objective: Objective) -> list[Tested]:
    if "held_out" not in found["adapter"]:
        return [Tested("gain", "noted", "no rows were held out, so nothing says what was gained")]
    if "held_out" not in found["base"]:
        return [Tested("gain", "noted", "the base can't read the held-out rows, which have new tokens")]
    ours, theirs = found["adapter"]["held_out"], found["base"]["held_out"]
    difference, (low, high) = paired(ours["sums"], theirs["sums"], ours["counts"])
    other = "the reference" if objective.needs_reference else "the base"
    words = (
        f"on {len(ours['counts']):,} held-out rows the loss ({objective.name}) is {ours['loss']:.4f}, and {other}'s "
        f"{theirs['loss']:.4f}: {difference:+.4f} (95 %: {low:+.4f} to {high:+.4f})"
    )
    return [Tested("gain", "failed" if low > 0 else "passed" if high < 0 else "noted", words)]


def _remembered(found: dict[str, Any]) -> Tested:
    ours, theirs = found["adapter"]["general"], found["base"]["general"]
    difference, (low, high) = paired(ours["sums"], theirs["sums"], ours["counts"])
    words = (
        f"on general text the loss is {ours['loss']:.4f}, and the base's {theirs['loss']:.4f}: "
        f"{difference:+.4f} (95 %: {low:+.4f} to {high:+.4f})"
    )
    return Tested("forgetting", "noted" if difference > FORGOTTEN else "passed", words)


def whole(folder: Path) -> dict[str, Any]:
    """A run's certificate, if every file is what it was when it was written, and no adapter has one more.

    Raises:
        ArtifactError: Which is not.
    """
    certificate = files.read_manifest(folder / CERTIFICATE, FORMAT, KEYS)
    text = folder / CERTIFICATE_TEXT
    if not text.is_file() or text.read_bytes() != certificate_text(certificate).encode():
        raise ArtifactError(f"{text}: is missing, or says something else than {CERTIFICATE}.")
    if (folder / ADAPTER).is_dir():
        read_adapter(folder / ADAPTER, ours=True)  # says which tensor it is
    for name, digest in certificate["files"].items():
        if not (folder / name).is_file() or files.sha256_file(folder / name) != digest:
            raise ArtifactError(f"{folder / name}: is missing, or changed since it was certified.")
    more = [name for name in certified_files(folder) if name not in certificate["files"]]
    if more := [name for name in more if name.startswith((f"{ADAPTER}/", f"{CHECKPOINTS}/"))]:
        raise ArtifactError(f"{folder / more[0]}: was not there when the run was certified.")
    return certificate


def verified(folder: Path, model: str | None = None) -> dict[str, Any]:
    """Repeat what a certificate says of the run's files and adapter; the certificate, if it still holds. Of an adapter's folder,
    what can be said without.

    Args:
        model: Where the base is, if not where it was.

    Raises:
        ArtifactError: There is none, or a file is not what it was.
        NotCertified: The adapter does not do what it did, or can't be used.
    """
    if is_adapter(folder):
        return _verified_alone(folder, model)
    if is_run(folder) and not (folder / CERTIFICATE).exists():
        raise ArtifactError(
            f"{folder}: has no certificate.json: the run has not ended, was told not to make one (certify: false), or has lost it. "
            f"Its adapter alone can be verified: trimtab verify {folder / ADAPTER}"
        )
    certificate = whole(folder)
    rows = [{key: value for key, value in row.items() if key != "logprob"} for row in certificate["canaries"]]
    found = _examine(_looked_at(folder / ADAPTER, rows, model))
    nats, share = found["near"]
    for row, value in zip(certificate["canaries"], found["canaries"], strict=True):
        if not abs(value - row["logprob"]) <= nats + share * abs(row["logprob"]):
            raise NotCertified(
                f"{folder}: the adapter gives {row['where']} log p = {value:.6g}, and gave it {row['logprob']:.6g}."
            )
    return certificate


def _verified_alone(folder: Path, model: str | None) -> dict[str, Any]:
    """What its manifest says of an adapter, by a fresh process that loads it on its base; as much of a certificate as there is."""
    adapter = read_adapter(folder)
    if adapter.method is None:
        raise ArtifactError(f"{folder}: has no manifest of Trimtab's (trimtab.json), so nothing says what it was.")
    found = _examine(_looked_at(folder, [], model))
    tests = [
        Tested("files", "passed", f"the adapter's {len(adapter.tensors)} tensors and its configuration are what was saved"),
        Tested("base", "passed", "the base is the one that it was trained on, weights, tokenizer and template")
        if found["finite"]
        else Tested("base", "failed", "the adapter holds values that are not finite"),
        Tested("certificate", "noted", "an adapter by itself has none: the folder of its run does"),
    ]
    return {"passed": found["finite"], "tests": [asdict(one) for one in tests], "answers": []}


def _looked_at(folder: Path, canaries: list[dict[str, Any]], model: str | None) -> dict[str, Any]:
    """A job that only loads an adapter and recognizes it."""
    return {"folder": str(folder), "model": model, "canaries": canaries, "prompts": [], "longest": 0, "measure": False}
