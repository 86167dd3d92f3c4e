"""The status of a run, and whether an adapter is certified: `show` reports it, and `merge` requires it unless `--force` is given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.artifacts.run_folder import ADAPTER, CERTIFICATE, CHECKPOINTS, is_run, read_certificate, read_record
from trimtab.core.errors import NotCertified

ADVICE = {
    "reload": "No setting of a recipe explains this: keep the folder, and report it.",
    "base": "The base model's files have changed since training began: restore them, then train again.",
    "moved": "No gradient reaches the unchanged tensors: set other method.targets, or a higher train.lr.",
    "stops": "It was trained too little to end its answers: use more train.epochs, more examples, or a higher train.lr.",
    "gain": "It is worse on the validation examples than without training: use fewer train.epochs, more examples, or a lower train.lr; "
    "and check that the validation examples are of the same task.",
}
"""What to do about each test of a certificate that can fail."""


@dataclass(frozen=True)
class RunStatus:
    """How far a run is, and the tests of its certificate."""

    words: str
    certified: bool
    tests: list[dict[str, Any]]
    """Those of the certificate, if there is one, with the keys name, status and words."""

    @property
    def failures(self) -> list[str]:
        """`name: words` of each failed test."""
        return [f"{test['name']}: {test['words']}" for test in self.tests if test["status"] == "failed"]


def failure_advice(tests: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to do about the failed tests."""
    return [ADVICE[test["name"]] for test in tests if test["status"] == "failed" and test["name"] in ADVICE]


def run_status(run: Path) -> RunStatus:
    """The status by a run's record and certificate. `trimtab verify` also checks the certified files.

    Raises:
        ArtifactError: A file can't be read, or the certificate was changed.
    """
    record = read_record(run)
    status = str(record.get("status"))
    if status != "done":
        step = (record.get("last") or {}).get("step", 0)
        reached = {"failed": "ended by an error", "running": "unfinished"}.get(status, status)
        return RunStatus(f"{reached} after step {step} of {record.get('steps', '?')}", False, [])
    if not (run / CERTIFICATE).is_file():
        return RunStatus("done, without a certificate", False, [])
    certificate = read_certificate(run)
    passed = certificate["passed"]
    return RunStatus("done, certified" if passed else "done, NOT certified", passed, certificate["tests"])


def refuse_uncertified(folder: Path) -> None:
    """Raise NotCertified for an adapter folder of a run that is not certified. An adapter outside a run needs no certificate."""
    if is_run(folder.parent) and folder.name == ADAPTER:
        run, final = folder.parent, True
    elif folder.parent.name == CHECKPOINTS and is_run(folder.parent.parent):
        run, final = folder.parent.parent, False
    else:
        return
    status = run_status(run)
    if status.certified and final:
        return
    reason = (
        f"{run} is {status.words}"
        if not status.certified
        else f"{folder} is a checkpoint: the certificate is for {run / ADAPTER}"
    )
    advice = [*(f"  {failure}" for failure in status.failures), *failure_advice(status.tests), "Use --force to take it anyway."]
    raise NotCertified("\n".join([f"{reason}, so this adapter is not certified.", *advice]))
