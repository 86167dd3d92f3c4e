"""The cache folder: results that take long to compute, stored under a hash of everything they depend on."""

import functools
import hashlib
import os
import tempfile
from pathlib import Path
from types import ModuleType


def cache_folder() -> Path:
    """Trimtab's cache: $TRIMTAB_CACHE, or `trimtab` in the user's cache folder."""
    if chosen := os.environ.get("TRIMTAB_CACHE"):
        return Path(chosen)
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "trimtab"
    try:
        return Path.home() / ".cache" / "trimtab"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / f"trimtab-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"


def keep_newest(folder: Path, pattern: str, count: int) -> None:
    """Evict all but the `count` most recently written or touched files."""
    for old in sorted(folder.glob(pattern), key=lambda path: -path.stat().st_mtime)[count:]:
        old.unlink(missing_ok=True)


@functools.cache
def code_hash(*modules: ModuleType) -> str:
    """SHA-256, as hex, of these modules' code (of a package, its whole folder), on which cached results depend."""
    digest = hashlib.sha256()
    for module in modules:
        file = Path(module.__file__ or "")
        paths = sorted(file.parent.rglob("*")) if hasattr(module, "__path__") else [file]
        for path in (path for path in paths if path.is_file() and path.suffix != ".pyc"):
            content = path.read_bytes()
            digest.update(f"{module.__name__} {path.relative_to(file.parent)} {len(content)} ".encode() + content)
    return digest.hexdigest()
