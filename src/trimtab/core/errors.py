"""Every error that a user can cause. Each class has the exit code of the command line.

1 any other TrimtabError, 2 recipe or model, 3 data, 4 artifact, 5 NaN, Inf or a failed guard, 6 storage or a lost process, 7 certificate;
130 is an interruption (Ctrl-C, SIGTERM or SIGHUP). A message says what is wrong, where, and what to do.
"""

from pathlib import Path


class TrimtabError(Exception):
    """Base class: catch this to catch every error that a user can fix."""

    exit_code = 1
    free_folder: Path | None = None
    """An output folder that a run could use instead, if the one it was given is taken."""
    is_told: bool = False
    """Whether another process of the run has raised it, and told this one."""


class RecipeError(TrimtabError):
    """A command, recipe or argument that does not describe a run."""

    exit_code = 2


class NoSuchModule(RecipeError):
    """A target that matches no module of this model."""


class UnsupportedModel(TrimtabError):
    """A base model that Trimtab cannot train exactly, and why."""

    exit_code = 2


class NotMergeable(TrimtabError):
    """An adapter that cannot be merged into its base model."""

    exit_code = 2


class DataError(TrimtabError):
    """Examples that can't be read or trained on."""

    exit_code = 3


class ArtifactError(TrimtabError):
    """An adapter, run or model folder that is damaged or does not fit."""

    exit_code = 4


class NonFinite(TrimtabError):
    """A loss or gradient that is NaN or Inf."""

    exit_code = 5


class BaseChanged(TrimtabError):
    """A frozen base model whose weights have changed."""

    exit_code = 5


class NotMoved(TrimtabError):
    """A trainable tensor that no gradient reaches."""

    exit_code = 5


class WrongReference(TrimtabError):
    """A preference objective's reference model that is not the model that training starts from."""

    exit_code = 5


class StorageError(TrimtabError):
    """The disk, a permission or the network."""

    exit_code = 6


class ProcessLost(TrimtabError):
    """Another process of the same run that was killed, or whose machine can't be reached."""

    exit_code = 6


class ProcessesDiffer(TrimtabError):
    """Processes of one run that do not have the same model, data or adapter."""

    exit_code = 5


class LockHeld(StorageError):
    """A folder that another process is writing into."""


class NotCertified(TrimtabError):
    """A finished run whose adapter does not pass its certificate's tests."""

    exit_code = 7


def listing(problems: list[str], most: int = 5) -> str:
    """The first `most` problems, one per line, and the number of the others."""
    shown = [f"  {problem}" for problem in problems[:most]]
    if len(problems) > most:
        shown.append(f"  … and {len(problems) - most} more")
    return "\n".join(shown)
