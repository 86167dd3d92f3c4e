"""Limits for untrusted chat templates: how long rendering may take, and how much text and memory it may produce.

Transformers runs a template in Jinja's immutable sandbox, which keeps it away from Python and limits nothing else.
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

from trimtab.core.errors import DataError

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

T = TypeVar("T")
SECONDS, LOOK_EVERY = 10.0, 0.25
CHARACTERS = 50_000_000
"""The longest text that a template may render."""
FACTOR = 10_000
"""The largest number that it may multiply by: a text times a number takes memory at once."""
MEMORY = 8 << 30
"""Bytes that it may allocate. The base is hashed meanwhile, which may copy its largest matrix."""
_deadlines: dict[int, float] = {}
"""By the identity of a thread: the time at which its rendering is stopped."""
_lock = threading.Lock()
_watching: list[threading.Thread] = []
_rendering = threading.Lock()
"""Held while the process has limited memory, which holds for all of its threads."""


class RenderTimeout(Exception):
    """Raised in the thread whose rendering takes too long."""


@contextmanager
def limited_time(seconds: float = SECONDS) -> Iterator[None]:
    """Raise RenderTimeout in the block if it takes longer."""
    me = threading.get_ident()
    with _lock:
        _deadlines[me] = time.monotonic() + seconds
        if not _watching:
            _watching.append(threading.Thread(target=_watch, daemon=True, name="template limits"))
            _watching[0].start()
    try:
        yield
    finally:
        with _lock:
            _deadlines.pop(me, None)


def _watch() -> None:
    while True:
        time.sleep(LOOK_EVERY)
        with _lock:
            for thread, deadline in list(_deadlines.items()):
                if time.monotonic() > deadline:
                    del _deadlines[thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(RenderTimeout))


@contextmanager
def _limited_memory() -> Iterator[None]:
    """In the block, allocating more than MEMORY raises MemoryError, where the system supports such a limit."""
    if resource is None or not os.path.exists("/proc/self/statm"):
        yield
        return
    with _rendering:
        before = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
        if before[0] == resource.RLIM_INFINITY or limit < before[0]:
            resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)


def render_within_limits(template: str, render: Callable[[], str], seconds: float = SECONDS) -> str:
    """The text that the template renders. Raises DataError if it rejects the conversation, or exceeds a limit."""
    text = within_limits(template, render, seconds)
    if len(text) > CHARACTERS:
        raise DataError(f"the model's chat template renders it as {len(text):,} characters, more than {CHARACTERS:,}")
    return text


def within_limits(template: str, work: Callable[[], T], seconds: float = SECONDS) -> T:
    """What this work with the template gives: Jinja computes constants already while it compiles. Raises DataError as rendering does."""
    if (factor := _large_factor(template)) is not None:
        raise DataError(f"the model's chat template multiplies by {factor:,}, which could exhaust memory: it is not run.")
    try:
        with _limited_memory(), limited_time(seconds):
            return work()
    except RenderTimeout:
        raise DataError(f"the model's chat template does not finish within {seconds:g} s") from None
    except MemoryError:
        raise DataError(f"the model's chat template needs more than {MEMORY / 1e9:.1f} GB of memory") from None
    except Exception as error:  # templates raise any kind
        raise DataError(f"the model's chat template does not accept it: {error}") from None


@lru_cache(maxsize=8)
def _large_factor(template: str) -> int | None:
    """A factor in the template that is larger than FACTOR; None if there is none, or if it is no template."""
    from jinja2 import nodes

    tree = parse_template(template)
    for kind in (nodes.Mul, nodes.Pow) if tree is not None else ():
        for node in tree.find_all(kind):
            for number in node.find_all(nodes.Const):
                if isinstance(number.value, int | float) and abs(number.value) > FACTOR:
                    return int(number.value)
    return None


@lru_cache(maxsize=8)
def parse_template(template: str) -> Any:
    """The template's syntax tree, parsed as Transformers does (with `{% generation %}`); None if it is no template."""
    from jinja2 import Environment
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        return Environment(extensions=[Generation, "jinja2.ext.loopcontrols"]).parse(template)
    except TemplateError:
        return None
