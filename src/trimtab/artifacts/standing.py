"""Whether an adapter has its run's certificate: what `show` says first, and what is merged only with `--force` if it has not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.artifacts.run_folder import ADAPTER, CERTIFICATE, CHECKPOINTS, is_run, read_record
from trimtab.core import files
from trimtab.core.errors import ArtifactError, NotCertified

ADVICE = {
    "reload": "Nothing in a recipe explains this: keep the folder, and report it.",
    "base": "The base's files are not what they were when training began: get them again, then train again.",
    "moved": "No gradient reaches what has not moved: give other method.targets, or a higher train.lr.",
    "stops": "It has learned too little to end its answers: train for more train.epochs, on more rows, or with a higher train.lr.",
    "gain": "It does worse on what it has not learned: train for fewer train.epochs, on more rows, or with a lower train.lr; and see that "
    "the held-out rows are of the same task.",
}
"""What to do about each test of a certificate that can fail."""


@dataclass(frozen=True)
class Standing:
    """How far a run has come."""

    words: str
    certified: bool
    tests: list[dict[str, Any]]
    """Of its certificate, if it has one: name, status, words."""

    def words_of(self, status: str) -> list[str]:
        """`name: words` of each test with this status."""
        return [f"{one['name']}: {one['words']}" for one in self.tests if one["status"] == status]


def advice(tests: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to do about those that failed."""
    return [ADVICE[one["name"]] for one in tests if one["status"] == "failed" and one["name"] in ADVICE]


def standing(run: Path) -> Standing:
    """What a run's records say of it; whether its files still are what was certified is for `trimtab verify` to say.

    Raises:
        ArtifactError: They can't be read.
    """
    facts = read_record(run)
    status = facts.get("status")
    if status != "done":
        step = (facts.get("last") or {}).get("step", 0)
        words = {"interrupted": "interrupted", "failed": "ended by an error", "running": "has not ended"}.get(
            str(status), str(status)
        )
        return Standing(f"{words} after step {step} of {facts.get('steps', '?')}", False, [])
    if not (run / CERTIFICATE).is_file():
        return Standing("done, without a certificate", False, [])
    certificate = files.read_json(run / CERTIFICATE)
    try:
        passed, tests = (
            bool(certificate["passed"]),
            [{k: str(one[k]) for k in ("name", "status", "words")} for one in certificate["tests"]],
        )
    except (TypeError, KeyError):
        raise ArtifactError(f"{run / CERTIFICATE}: is not a certificate. Restore it from a copy.") from None
    return Standing("done, certified" if passed else "done, NOT certified", passed, tests)


def refuse_uncertified(folder: Path) -> None:
    """Raise NotCertified if this is an adapter of a run that is not certified. What is in no run's folder has no certificate.

    Args:
        folder: The adapter's.
    """
    if is_run(folder.parent) and folder.name == ADAPTER:
        run, mine = folder.parent, True
    elif folder.parent.name == CHECKPOINTS and is_run(folder.parent.parent):
        run, mine = folder.parent.parent, False
    else:
        return
    how = standing(run)
    if not how.certified or not mine:
        why = [f"  {one}" for one in how.words_of("failed")]
        what = (
            f"{run} is {how.words}"
            if not how.certified
            else f"{folder} was saved on the way: the certificate speaks of {run / ADAPTER}"
        )
        after = [*why, *advice(how.tests), "With --force it is taken all the same."]
        raise NotCertified("\n".join([f"{what}, so this adapter is not certified.", *after]))
