"""The losses of a run's validation examples, one by one, on disk: what two runs are compared by."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimtab.artifacts.run_folder import CERTIFICATE, LOSSES, read_certificate
from trimtab.core import files
from trimtab.core.errors import ArtifactError

FORMAT = 1


@dataclass(frozen=True)
class LossExample:
    """A validation example, recognized by its content, so that its losses in two runs can be compared."""

    digest: str
    """Of its token rows: tokens, targets and weights."""
    where: str
    """file:line."""
    tokens: int
    """Its target tokens, those of a rejected answer included."""
    items: float
    """By what its loss is divided: the target tokens by their weights, or 1 for a pair or a judged answer."""
    text: str | None = None
    """The digest of the text that is trained on, for bases with other tokenizers; None where texts are not comparable."""
    size: int = 0
    """The bytes of that text."""


@dataclass(frozen=True)
class ExampleLosses:
    """Each example's loss, summed over its items."""

    examples: Sequence[LossExample]
    before: Sequence[float] | None
    """Of the model that training started from; None if it was not evaluated."""
    best: Sequence[float]
    """Of the best adapter."""
    step: int
    """After which that one was saved."""

    def __post_init__(self) -> None:
        if any(len(losses) != len(self.examples) for losses in (self.best, self.before) if losses is not None):
            raise ValueError("not one loss an example")


def write_losses(run: Path, losses: ExampleLosses) -> None:
    """Replace a run's losses atomically. Raises StorageError."""
    files.write_manifest(run / LOSSES, FORMAT, {**asdict(losses), "examples": [asdict(each) for each in losses.examples]})


def read_losses(run: Path) -> ExampleLosses | None:
    """A run's losses; None if it has none: it held no examples out, evaluated none yet, or is older than this file.

    Raises:
        ArtifactError: They were changed since they were saved or certified, or are missing though they were certified.
    """
    path = run / LOSSES
    certified = read_certificate(run)["files"].get(LOSSES) if (run / CERTIFICATE).is_file() else None
    if not path.is_file() and certified is None:
        return None
    if certified is not None and (not path.is_file() or files.sha256_file(path) != certified):
        raise ArtifactError(f"{path}: is missing, or changed since it was certified. Restore it from a copy.")
    value: dict[str, Any] = files.read_manifest(path, FORMAT, {"examples", "before", "best", "step"})
    try:
        examples = [LossExample(**each) for each in value["examples"]]
        return ExampleLosses(examples, value["before"], value["best"], value["step"])
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: does not hold the losses of a run ({error}). Restore it from a copy.") from None
