"""What a process is told once: how it is started, not to look for garbage among a million imported objects, to give back memory."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def collector_paused() -> Iterator[None]:
    """Make many objects within the block without looking for garbage among them, which takes as long as making them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def without_collector() -> Iterator[None]:
    """Import within the block without looking for garbage, which takes a fifth of the time, nor ever after in what came of it."""
    with collector_paused():
        try:
            yield
        finally:
            gc.freeze()


def fresh_process(module: str) -> list[str]:
    """The command that runs a module of ours in another process, as `python -m` does, but for importing what lies in the folder
    that it is run in: `./random.py` there is somebody's file, and not Python's."""
    home = str(Path(__file__).parents[2])  # last: what is installed comes first, as in this process
    runs = f"import sys; sys.path.append({home!r}); import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return [sys.executable, "-P", "-c", runs]


WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
"""How OpenMP's threads wait for each other: asleep; with GNU's, which says it in more detail, after 1,000 looks (10 µs or so)."""


def environment() -> dict[str, str]:
    """The environment of a process of ours: this one's, with what libraries read as they are imported, where it is not set.

    By default, OpenMP's threads spin for milliseconds while they wait. Where other processes want the cores, what they wait for has none
    meanwhile, at every small operation, and two threads are many times slower than one.
    """
    ours = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    if not any(name in os.environ for name in (*WAITING, "KMP_BLOCKTIME")):
        ours |= WAITING
    return ours | os.environ


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""


def give_back_freed_memory() -> None:
    """Let the system have what this process has freed; with another malloc than glibc's this does nothing."""
    if libc := _glibc():
        libc.malloc_trim(0)


def never_keep_freed_memory() -> None:
    """Let this process give large blocks back to the system as soon as they are freed, so that it holds what is in use, and no more.

    By default, glibc's malloc keeps blocks of up to 32 MB once it has freed such ones. Before 2.38 it finds no place for an
    aligned block in a hole of the same size, so holes add up: to six times what is in use, where attention keeps its scores.
    It costs 1 to 4 % of a training step's time. With another malloc than glibc's this does nothing.
    """
    give_back_freed_memory()  # what imports have left
    if libc := _glibc():
        libc.mallopt(M_MMAP_THRESHOLD, 128 * 1024)  # the default; it stays, now that it is asked for
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") else None
