"""The C code in `c/`, compiled for this machine at first use and loaded.

Where there is no compiler, or a system on which its library could not be loaded safely, the torch back end computes.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from trimtab.core.cache import cache_folder
from trimtab.core.errors import StorageError
from trimtab.core.files import TEMPORARY, is_private, make_private_folder, sha256_file, write_bytes

SOURCE = Path(__file__).parent / "c" / "kernels.c"
_FLAGS = "-march=native -fPIC -shared -fno-math-errno -fno-trapping-math -fopenmp"


@cache
def load_library() -> ctypes.CDLL | None:
    """kernels.c compiled for this machine, from the cache if it is there; None where it cannot be compiled."""
    if os.name != "posix":
        return None
    try:
        return compile_library(SOURCE, cache_folder() / f"kernels-{os.getuid()}")
    except (OSError, StorageError, subprocess.SubprocessError):
        return None


def compile_library(source: Path, folder: Path, optimization: str = "-O3") -> ctypes.CDLL | None:
    """Compile a source, with the headers beside it, into a folder, unless the folder has it already. None without a compiler.

    A library in the folder is code that would run, so it is loaded only if no other user can have written it (owner and mode
    of file and folder) and its content has the hash in its name, and from a folder that no other user can read. Otherwise the
    source is compiled anew.
    """
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None or not Path("/proc/self/maps").exists():
        return None
    # torch's own OpenMP: threads of a second one would wait for those of the first.
    openmp = re.search(r"/\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so[^/\s]*", Path("/proc/self/maps").read_text())
    if openmp is None:
        return None
    text = "".join(path.read_text() for path in (source, *sorted(source.parent.glob("*.h"))))
    machine = re.search(r"^(flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    key = "\n".join([text, optimization, _FLAGS, compiler, openmp[0], machine[0] if machine else ""])
    name, private = hashlib.sha256(key.encode()).hexdigest()[:16], make_private_folder(folder)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder if private else None) as scratch:
        library = Path(scratch) / "kernels.so"
        if private and (content := _cached(folder, name)) is not None:
            write_bytes(library, content)
        else:
            command = [compiler, optimization, *_FLAGS.split(), str(source), openmp[0], "-lm", "-o", str(library)]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            if private:
                write_bytes(folder / f"{name}-{sha256_file(library)}.so", library.read_bytes(), private=True)
        return ctypes.CDLL(str(library))


def _cached(folder: Path, name: str) -> bytes | None:
    """The content of the compiled library of this name that may be loaded."""
    for path in sorted(folder.glob(f"{name}-*.so")):
        with suppress(OSError), open(path, "rb") as file:
            content = file.read()
            if is_private(os.fstat(file.fileno())) and path.stem == f"{name}-{hashlib.sha256(content).hexdigest()}":
                return content
    return None
