"""Settings of a process: how a new one is started, its environment, garbage collection, and malloc."""

import ctypes
import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause garbage collection within the block, where searching many new objects takes as long as creating them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def gc_frozen() -> Iterator[None]:
    """Pause garbage collection within the block, which saves a fifth of an import's time, and exempt its objects afterwards."""
    with gc_paused():
        try:
            yield
        finally:
            gc.freeze()


def module_command(module: str) -> list[str]:
    """The command that runs a module of Trimtab in a new process, like `python -m`, but without importing from the working
    folder: a file `./random.py` there must not replace Python's."""
    home = str(Path(__file__).parents[2])  # last: installed packages come first, as in this process
    code = f"import sys; sys.path.append({home!r}); import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return [sys.executable, "-P", "-c", code]


VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "GROUP_RANK", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_ERROR_FILE",
)  # fmt: skip
"""By which launchers say what a process is; one that it starts for itself alone must not see them."""
OPENMP_WAIT = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
"""How OpenMP's threads wait for each other: asleep; GNU's, which has a finer setting, after spinning 1,000 times (about 10 µs)."""


ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Settings of the allocator of CUDA devices. torch 2.9 ignores expandable segments under the second name (pytorch #183387)."""


def environment() -> dict[str, str]:
    """The environment of Trimtab's processes: this one's, and defaults for variables that libraries read on import.

    By default, OpenMP's threads spin for milliseconds while they wait. If other processes use the cores, the thread that is
    waited for has none meanwhile, at every small operation, and two threads are many times slower than one.

    By default, CUDA's allocator holds blocks of the sizes that it was once asked for. Packs are of many sizes, and what one has
    left is of no use to the next; segments that grow are.
    """
    defaults = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    if not any(name in os.environ for name in (*OPENMP_WAIT, "KMP_BLOCKTIME")):
        defaults |= OPENMP_WAIT
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR):
        defaults[ALLOCATOR[0]] = "expandable_segments:True"
    return defaults | os.environ


def environment_alone() -> dict[str, str]:
    """The same, for a process that is not one of those that train together, if this one is."""
    return {name: value for name, value in environment().items() if name not in VARIABLES}


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""From glibc's malloc.h."""


def give_back_freed_memory() -> None:
    """Return freed memory to the system. Without glibc's malloc, do nothing."""
    if libc := _glibc():
        libc.malloc_trim(0)


def never_keep_freed_memory() -> None:
    """Return large blocks to the system as soon as they are freed, so that the process holds only memory in use.

    By default, glibc's malloc keeps blocks of up to 32 MB once such blocks have been freed. Before 2.38 it does not reuse a hole for
    an aligned block of the same size, so holes accumulate: to six times the memory in use, where attention keeps its scores.
    It costs 1 to 4 % of a training step's time. Without glibc's malloc, do nothing.
    """
    give_back_freed_memory()  # left by imports
    if libc := _glibc():
        libc.mallopt(M_MMAP_THRESHOLD, 128 * 1024)  # the default, which is adapted no more once it is set
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") else None


def number_in_environment(name: str, otherwise: int) -> int:
    """A variable that is a whole number."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else otherwise


def first_line(error: BaseException) -> str:
    """What an error of torch says, without the place in its source."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return re.sub(r"^\[\S+:\d+\] ", "", line).partition(". This is typically")[0]
