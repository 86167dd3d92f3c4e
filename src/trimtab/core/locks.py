"""Files that one process at a time has, so that two do not write into one folder."""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from trimtab.core.errors import StorageError
from trimtab.core.files import writing

try:
    import fcntl
except ImportError:  # pragma: no cover (Windows)
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Nobody else has the file `path` within the block; the system lets go of it if the process dies.

    Yields:
        Whether that is so: some file systems know no locks.

    Raises:
        StorageError: Another process has it.
    """
    with writing(path.parent):
        while (found := _lock(path)) is None:
            pass
    file, held = found
    with file:
        yield held


def _lock(path: Path) -> tuple[BinaryIO, bool] | None:
    """The file, open, and whether it is locked; None if whoever had it has removed it meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = open(path, "ab")  # noqa: SIM115 (held for as long as it is locked)
    except FileNotFoundError:
        return None
    try:
        held = _flock(file, path)
        if held and not (path.exists() and os.path.samestat(os.stat(path), os.fstat(file.fileno()))):
            file.close()
            return None
        with contextlib.suppress(OSError):  # a disk that is full is not this file's to complain of
            file.truncate(0)
            os.write(file.fileno(), f"{os.getpid()} on {platform.node()}".encode())
    except BaseException:
        file.close()
        raise
    return file, held


def _flock(file: BinaryIO, path: Path) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = path.read_text(encoding="utf-8", errors="replace")
        raise StorageError(f"{path.parent}: another process ({who}) is training there. Wait for it, or stop it.") from None
    except OSError:
        return False
    return True
