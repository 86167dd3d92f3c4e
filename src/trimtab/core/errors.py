"""Every error a user can cause, as one tree; its exit code is what the command line returns.

* TrimtabError                1   catch this to catch whatever a user can mend
  x RecipeError               2   a command, recipe or argument that does not describe a run
    + NoSuchModule            2   a target that names nothing in this model
  x UnsupportedModel          2   a base model that Trimtab cannot train exactly, and why
  x NotMergeable              2   a method whose effect is not a change of weights
  x DataError                 3   rows that can't be read or learned from
  x ArtifactError             4   an adapter, run or model folder that is damaged or does not fit
  x NonFinite                 5   a loss or gradient that is not a number
  x BaseChanged               5   the frozen base is not what it was
  x NotMoved                  5   something that is to be trained, and that no gradient reaches
  x WrongReference            5   a preference objective's reference that is not what training starts from
  x StorageError              6   the disk, a permission, the network
  x NotCertified              7   a finished run whose adapter, loaded again, is not what it should be

Exit code 130 is an interruption (Ctrl-C, SIGTERM or SIGHUP). A message says what is wrong, where, and what to do.
"""

from pathlib import Path


class TrimtabError(Exception):
    """Base class: catch this to catch whatever a user can mend."""

    exit_code = 1
    free: Path | None = None
    """Where a run could go instead, if the folder that it was to go to is taken."""


class RecipeError(TrimtabError):
    """A command, recipe or argument that does not describe a run."""

    exit_code = 2


class NoSuchModule(RecipeError):
    """A target that names nothing in this model."""


class UnsupportedModel(TrimtabError):
    """A base model that Trimtab cannot train exactly, and why."""

    exit_code = 2


class NotMergeable(TrimtabError):
    """A method whose effect is not a change of weights."""

    exit_code = 2


class DataError(TrimtabError):
    """Rows that can't be read or learned from."""

    exit_code = 3


class ArtifactError(TrimtabError):
    """An adapter, run or model folder that is damaged or does not fit."""

    exit_code = 4


class NonFinite(TrimtabError):
    """A loss or gradient that is not a number."""

    exit_code = 5


class BaseChanged(TrimtabError):
    """The frozen base is not what it was."""

    exit_code = 5


class NotMoved(TrimtabError):
    """Something that is to be trained, and that no gradient reaches."""

    exit_code = 5


class WrongReference(TrimtabError):
    """A preference objective's reference that is not what training starts from."""

    exit_code = 5


class StorageError(TrimtabError):
    """The disk, a permission or the network."""

    exit_code = 6


class NotCertified(TrimtabError):
    """A finished run whose adapter, loaded again, is not what it should be."""

    exit_code = 7


def listing(problems: list[str], most: int = 5) -> str:
    """The first few problems, a line each, and how many more there are."""
    shown = [f"  {problem}" for problem in problems[:most]]
    if len(problems) > most:
        shown.append(f"  … and {len(problems) - most} more")
    return "\n".join(shown)
