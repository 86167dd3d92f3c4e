"""Atomic writes, the only ones in Trimtab; JSON, manifests and hashes.

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
"""Prefix of an unfinished file or folder."""


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Raise a StorageError for a failed write within the block, the operating system's or a library's."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: cannot write: {_explain(error, path)}") from error
    except Exception as error:
        # safetensors raises its own exception for a failed write, with the system's message in it.
        if type(error).__name__ == "SafetensorError" and ("os error" in str(error) or "I/O" in str(error)):
            raise StorageError(f"{path}: cannot write: {error}. {_free_space(path)}") from error
        raise


def write_bytes(path: Path, content: bytes, *, private: bool = False) -> None:
    """Replace the file `path` atomically. A `private` file may be read and written by this user alone.

    Raises StorageError; then the old file is untouched.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    with storage_errors(path):
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
    write_text(path, _dump(value))


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_json(value: Any) -> Any:
    """The value as JSON data. NaN and Inf, which JSON does not have, become the texts "nan", "inf" and "-inf"."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def append_line(path: Path, line: str) -> None:
    """Append a line to a log. A crash can leave the last line incomplete: readers must skip one without a newline."""
    with storage_errors(path), open(path, "ab") as file:
        file.write(line.encode() + b"\n")


def drop_incomplete_line(path: Path) -> int:
    """Cut off what a crash has left of a log's last line; the number of the lines that stay. Raises StorageError."""
    with storage_errors(path), open(path, "r+b") as file:
        lines = whole = 0
        for line in file:
            if line.endswith(b"\n"):
                lines, whole = lines + 1, whole + len(line)
        file.truncate(whole)
    return lines


def finish_file(unfinished: Path, path: Path) -> None:
    """Give a complete file its name, under which there is none yet. Raises StorageError."""
    refuse_existing(path)
    with storage_errors(path):
        _sync_file(unfinished)
        os.rename(unfinished, path)
        _sync_folder(path.parent)


def refuse_existing(path: Path) -> None:
    """Raise StorageError if there is something at `path`."""
    if os.path.lexists(path):
        raise StorageError(f"{path}: exists already, and is not overwritten. Give another name, or remove it first.")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill, renamed to `path` when the block succeeds.

    Raises:
        StorageError: `path` exists (nothing is ever overwritten), or writing failed; then nothing is left behind, or, if
            the disk failed after the last step, the complete folder.
    """
    path = Path(path)
    refuse_existing(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{path.name}-", dir=path.parent))
        try:
            yield temporary
            for file in filter(Path.is_file, temporary.rglob("*")):
                _finish(file)
            _sync_folder(temporary)
            temporary.chmod(0o777 & ~_umask())
            os.rename(temporary, path)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, StorageError):  # it names a file in the temporary folder
                raise StorageError(str(error).replace(str(temporary), str(path))) from error
            raise
        _sync_folder(path.parent)


@contextlib.contextmanager
def passing_folder() -> Iterator[Path]:
    """An empty folder among the system's temporary files that is removed after the block. Raises StorageError."""
    with storage_errors(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def updated_folder(path: Path, last: str) -> Iterator[Path]:
    """A temporary folder to fill, whose files replace those of the same names in `path` when the block succeeds.

    They are moved one by one, the one named `last`, which lists the others' hashes, at the end. Raises StorageError.
    """
    if not path.exists():
        with new_folder(path) as new:
            yield new
        return
    with storage_errors(path), tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=path) as temporary:
        yield Path(temporary)
        for file in sorted(filter(Path.is_file, Path(temporary).rglob("*")), key=lambda file: file.name == last):
            _finish(file)
            (place := path / file.relative_to(temporary)).parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
        _sync_folder(path)


def _finish(path: Path) -> None:
    """Flush a file that a library has written, and give it the umask's mode: safetensors makes it private."""
    path.chmod(0o666 & ~_umask())
    _sync_file(path)


def make_private_folder(path: Path) -> bool:
    """Create the folder if it is missing; return whether nobody else can write into it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        return path.is_dir() and is_private(path.stat())
    except OSError:
        return False


def is_private(status: os.stat_result) -> bool:
    """Whether only this user and root can have written a file of this status."""
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & 0o022


def remove_file(path: Path) -> None:
    """Remove a file, if it is there. Raises StorageError."""
    with storage_errors(path):
        path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder, renaming it first, so that a crash leaves nothing that looks complete."""
    hidden = path.with_name(f"{TEMPORARY}removed-{os.getpid()}-{path.name}")
    with storage_errors(path):
        os.rename(path, hidden)
        shutil.rmtree(hidden)


def expand_user(name: str | Path) -> Path:
    """The path with `~` as the home folder; that of an unknown user stays as written."""
    return Path(os.path.expanduser(name))  # Path.expanduser would raise a RuntimeError


def read_json(path: Path) -> Any:
    """The value in a JSON file that Trimtab wrote. Raises ArtifactError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing.") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not valid JSON ({error}). The file is damaged; restore it from a copy.") from None


def write_manifest(path: Path, version: int, value: dict[str, Any]) -> None:
    """Replace a JSON file atomically by an object with a format version and a digest of its whole content."""
    value = {"format": version, **value}
    write_json(path, {**value, "digest": json_digest(value)})


def read_manifest(path: Path, version: int, keys: set[str]) -> dict[str, Any]:
    """A manifest of this format version and with these keys, unchanged to the byte. Raises ArtifactError."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: is not a manifest of Trimtab (not an object).")
    try:
        unchanged = _dump(value).encode() == path.read_bytes()
    except ValueError:  # NaN, or a lone surrogate
        unchanged = False
    rest = {key: part for key, part in value.items() if key != "digest"}
    if not unchanged or value.get("digest") != json_digest(rest):
        raise ArtifactError(f"{path}: changed since it was saved. Restore it from a copy.")
    if rest.get("format") != version or rest.keys() != {"format", *keys}:
        raise ArtifactError(
            f"{path}: was written by another version of Trimtab (its format is {rest.get('format')}; this one reads {version}). Use that one."
        )
    return value


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of JSON data, as hex, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: Path) -> None:
    if os.name == "posix":  # pragma: no branch (Windows cannot open a folder, and its rename is durable without it)
        _sync_file(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _explain(error: OSError, path: Path) -> str:
    """The system's message about a failed write, and what to do."""
    message = f"{error.strerror or error}."
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        message += f" {_free_space(path)}"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        message += " Choose a folder that you may write to."
    elif blocking := [p for p in path.absolute().parents if os.path.isfile(p)]:
        message += f" {blocking[0]} is a file, not a folder."
    if cache_folder().absolute() in path.absolute().parents:
        message += " It is Trimtab's cache: the environment variable TRIMTAB_CACHE can name another folder."
    return message


def _free_space(path: Path) -> str:
    """How much space is free on the disk of `path`, and what to do."""
    folder = next((p for p in Path(path).absolute().parents if os.path.isdir(p)), Path("/"))
    try:
        free = f"{shutil.disk_usage(folder).free / 1e6:.1f} MB are free there: free"
    except OSError:
        free = "Free"
    return f"{free} some, or choose another folder."
