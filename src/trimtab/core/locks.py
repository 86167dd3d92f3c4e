"""File locks, so that no two processes write into one folder."""

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from trimtab.core.errors import LockHeld
from trimtab.core.files import storage_errors

try:
    import fcntl
except ImportError:  # pragma: no cover (Windows)
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def file_lock(path: Path, doing: str = "training") -> Iterator[bool]:
    """Hold an exclusive lock on the file `path` within the block. The system releases it if the process dies.

    Args:
        doing: What the process that holds it does, for the error of others.

    Yields:
        Whether the lock is held: some file systems do not support locks.

    Raises:
        LockHeld: Another process holds it.
    """
    with storage_errors(path.parent):
        while (opened := _open_locked(path, doing)) is None:
            pass
    file, held = opened
    with file:
        yield held


def is_locked(path: Path) -> bool | None:
    """Whether a process holds the lock on a file; None if this system can't say. The file is not changed."""
    try:
        with open(path, "rb") as file:
            if fcntl is None:
                return None
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def _open_locked(path: Path, doing: str) -> tuple[BinaryIO, bool] | None:
    """The open file, and whether it is locked; None if the previous holder removed it meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = open(path, "ab")  # noqa: SIM115 (held for as long as it is locked)
    except FileNotFoundError:
        return None
    try:
        held = _flock(file, path, doing)
        if held and not (path.exists() and os.path.samestat(os.stat(path), os.fstat(file.fileno()))):
            file.close()
            return None
        with contextlib.suppress(OSError):  # on a full disk, only the text is missing
            file.truncate(0)
            os.write(file.fileno(), f"{os.getpid()} on {platform.node()}".encode())
    except BaseException:
        file.close()
        raise
    return file, held


def _flock(file: BinaryIO, path: Path, doing: str, *, patient: bool = True) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if patient:  # `is_locked` may be asking at this moment
            time.sleep(0.05)
            return _flock(file, path, doing, patient=False)
        holder = path.read_text(encoding="utf-8", errors="replace")
        raise LockHeld(f"{path.parent}: another process ({holder}) is {doing} there. Wait for it, or stop it.") from None
    except OSError:
        return False
    return True
