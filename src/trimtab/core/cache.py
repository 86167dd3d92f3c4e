"""The folder in which what takes long to make is kept from one run to the next, under a hash of all that it is made from."""

import functools
import hashlib
import os
import tempfile
from pathlib import Path
from types import ModuleType


def cache_folder() -> Path:
    """Where what was made once is kept, such as converted models: $TRIMTAB_CACHE, or `trimtab` in the user's cache folder."""
    if chosen := os.environ.get("TRIMTAB_CACHE"):
        return Path(chosen)
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "trimtab"
    try:
        return Path.home() / ".cache" / "trimtab"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / f"trimtab-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"


def keep_newest(folder: Path, pattern: str, count: int) -> None:
    """Of a cache's files, keep those that were written or asked for last."""
    for old in sorted(folder.glob(pattern), key=lambda path: -path.stat().st_mtime)[count:]:
        old.unlink(missing_ok=True)


@functools.cache
def code_hash(*modules: ModuleType) -> str:
    """SHA-256, as hex, of the code of these modules, of a package all that is in its folder: what is kept on disk was made by it."""
    digest = hashlib.sha256()
    for module in modules:
        file = Path(module.__file__ or "")
        inside = sorted(file.parent.rglob("*")) if hasattr(module, "__path__") else [file]
        for path in (path for path in inside if path.is_file() and path.suffix != ".pyc"):
            digest.update(
                f"{module.__name__} {path.relative_to(file.parent)} {hashlib.sha256(path.read_bytes()).hexdigest()} ".encode()
            )
    return digest.hexdigest()
