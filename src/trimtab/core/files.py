"""The only place that writes to disk, and how its files are hashed and read back.

A file or folder is written under a temporary name beside its destination, flushed to the disk and renamed, so a reader
sees the old one, the new one, or nothing. What a crash leaves behind starts with `TEMPORARY` and is never read.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimtab.core.cache import cache_folder
from trimtab.core.errors import ArtifactError, StorageError

TEMPORARY = ".writing-"
"""Prefix of a file or folder that is not finished."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system, or a library writing for us, says about a failed write into a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: cannot write: {_reason(error, path)}") from error
    except Exception as error:
        # safetensors reports a failed write as an exception of its own, with the system's words in it.
        if type(error).__name__ == "SafetensorError" and ("os error" in str(error) or "I/O" in str(error)):
            raise StorageError(f"{path}: cannot write: {error}. {_free(path)}") from error
        raise


def write_bytes(path: Path, content: bytes, *, private: bool = False) -> None:
    """Replace the file `path` atomically, by one that nobody else may read or write if it is `private`.

    Raises StorageError; then the old file is untouched.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                if private:
                    os.fchmod(file.fileno(), 0o600)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def write_text(path: Path, content: str) -> None:
    """Replace the text file `path` atomically, as UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace the JSON file `path` atomically."""
    write_text(path, _as_text(value))


def _as_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_json(value: Any) -> Any:
    """The value as JSON data, which has no numbers for NaN and Inf: they become the texts "nan", "inf" and "-inf"."""
    if isinstance(value, dict):
        return {key: as_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(one) for one in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def append_line(path: Path, line: str) -> None:
    """Add a line to a log. A crash can tear the last line, and readers must skip one without a newline."""
    with writing(path), open(path, "ab") as file:
        file.write(line.encode() + b"\n")


def refuse_existing(path: Path) -> None:
    """Raise StorageError if there is something at `path`."""
    if os.path.lexists(path):
        raise StorageError(f"{path}: exists already, and is not overwritten. Give another name, or remove it first.")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that appears as `path` only when the block ends well.

    Raises:
        StorageError: `path` exists (nothing is ever overwritten), or writing failed; then nothing is left behind, or, if
            the disk failed after the last step, the whole folder.
    """
    path = Path(path)
    refuse_existing(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{path.name}-", dir=path.parent))
        try:
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    let_be_read(file)
                    _sync_file(file)
            _sync_folder(temporary)
            temporary.chmod(0o777 & ~_umask())
            os.rename(temporary, path)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, StorageError):  # of a file in the block: it was to be in `path`
                raise StorageError(str(error).replace(str(temporary), str(path))) from error
            raise
        _sync_folder(path.parent)


@contextlib.contextmanager
def filled_folder(path: Path, last: str) -> Iterator[Path]:
    """A folder to fill, whose files stand in `path` only when the block ends well, instead of any of the same names.

    They are put there one by one; `last` names the one that comes last, and vouches for the others. Raises StorageError.
    """
    if not path.exists():
        with new_folder(path) as new:
            yield new
        return
    with writing(path), tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=path) as temporary:
        yield Path(temporary)
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == last):
            let_be_read(file)
            _sync_file(file)
            os.replace(file, path / file.name)
        _sync_folder(path)


def let_be_read(path: Path) -> None:
    """Give a file that a library has written, safetensors' for oneself alone, the mode that files have here."""
    path.chmod(0o666 & ~_umask())


def private_folder(path: Path) -> bool:
    """Whether this folder, which is made if need be, is one that nobody else can write into."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        return path.is_dir() and is_private(path.stat())
    except OSError:
        return False


def is_private(status: os.stat_result) -> bool:
    """Whether nobody but this user and the system's administrator can have written what has this status."""
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & 0o022


def remove_file(path: Path) -> None:
    """Remove a file, if it is there. Raises StorageError."""
    with writing(path):
        path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder, hiding it first, so that a crash half-way leaves nothing that looks whole."""
    hidden = path.with_name(f"{TEMPORARY}removed-{os.getpid()}-{path.name}")
    with writing(path):
        os.rename(path, hidden)
        shutil.rmtree(hidden)


def expanded(name: str | Path) -> Path:
    """The path of a name, with `~` as the home folder; one of a user who is not known stays as it is written."""
    return Path(os.path.expanduser(name))  # Path.expanduser would raise a RuntimeError


def read_json(path: Path) -> Any:
    """The value in a JSON file of ours. Raises ArtifactError with what is wrong and where."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing.") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not valid JSON ({error}). The file is damaged; restore it from a copy.") from None


def write_manifest(path: Path, form: int, value: dict[str, Any]) -> None:
    """Replace a JSON file atomically, by an object with the version of its form and a digest over all of it."""
    value = {"format": form, **value}
    write_json(path, {**value, "digest": json_digest(value)})


def read_manifest(path: Path, form: int, keys: set[str]) -> dict[str, Any]:
    """What `write_manifest` wrote, to the last byte, if it is of this form and has these keys. Raises ArtifactError."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: is not a manifest of Trimtab's (not an object).")
    try:
        same = _as_text(value).encode() == path.read_bytes()
    except ValueError:  # NaN, or half of a character
        same = False
    rest = {key: part for key, part in value.items() if key != "digest"}
    if not same or value.get("digest") != json_digest(rest):
        raise ArtifactError(f"{path}: changed since it was saved. Restore it from a copy.")
    if rest.get("format") != form or rest.keys() != {"format", *keys}:
        raise ArtifactError(
            f"{path}: was written by another version of Trimtab (its format is {rest.get('format')}; this one reads {form}). Use that one."
        )
    return value


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of JSON data, as hex, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: Path) -> None:
    if os.name == "posix":  # pragma: no branch (elsewhere a folder cannot be opened, and rename is durable without it)
        _sync_file(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _reason(error: OSError, path: Path) -> str:
    words = f"{error.strerror or error}."
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        words += f" {_free(path)}"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        words += " Choose a folder that you may write to."
    elif blocking := [p for p in path.absolute().parents if os.path.isfile(p)]:
        words += f" {blocking[0]} is a file, not a folder."
    if cache_folder().absolute() in path.absolute().parents:
        words += " It is Trimtab's cache: the environment variable TRIMTAB_CACHE can name another folder."
    return words


def _free(path: Path) -> str:
    """How much room there is where `path` was to go, and what to do."""
    folder = next((p for p in Path(path).absolute().parents if os.path.isdir(p)), Path("/"))
    try:
        room = f"{shutil.disk_usage(folder).free / 1e6:.1f} MB are free there: free"
    except OSError:
        room = "Free"
    return f"{room} some, or choose another folder."
