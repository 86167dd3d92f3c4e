"""Limits of a chat template, which comes with a model from wherever: how long it may take, and how much it may write and hold.

Transformers runs it in Jinja's immutable sandbox, which keeps it from Python, and from nothing else.
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from trimtab.core.errors import DataError

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

SECONDS, LOOK_EVERY = 10.0, 0.25
CHARACTERS = 50_000_000
"""The longest text that a template may make of a conversation."""
FACTOR = 10_000
"""The largest number that it may multiply by, which with a text takes memory at once."""
MEMORY = 8 << 30
"""Bytes that it may ask the system for. The base is hashed meanwhile, and its largest matrix may be copied for that."""
_deadlines: dict[int, float] = {}
"""By the identity of a thread: when what it runs must have ended."""
_lock = threading.Lock()
_watching: list[threading.Thread] = []
_rendering = threading.Lock()
"""Held while the process has little memory, which is so for all of its threads."""


class TooLong(Exception):
    """Raised in the thread whose time is over."""


@contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """What Python runs in the block has to end in time, or TooLong is raised there."""
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
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TooLong))


@contextmanager
def _little_memory() -> Iterator[None]:
    """In the block, whoever asks the system for more than MEMORY gets a MemoryError; where the system can be told so."""
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


def rendered(template: str, render: Callable[[], str], seconds: float = SECONDS) -> str:
    """What the template makes of a conversation. Raises DataError if it does not accept it, or exceeds a limit."""
    if (factor := _factor(template)) is not None:
        raise DataError(f"the model's chat template multiplies by {factor:,}, which could take all memory: it is not run.")
    try:
        with _little_memory(), limited(seconds):
            text = render()
    except TooLong:
        raise DataError(f"the model's chat template does not end within {seconds:g} s") from None
    except MemoryError:
        raise DataError(f"the model's chat template needs more than {MEMORY / 1e9:.1f} GB of memory") from None
    except Exception as error:  # templates raise what they like
        raise DataError(f"the model's chat template does not accept it: {error}") from None
    if len(text) > CHARACTERS:
        raise DataError(f"the model's chat template makes {len(text):,} characters of it")
    return text


@lru_cache(maxsize=8)
def _factor(template: str) -> int | None:
    """A number in the template that is too large a factor; None if there is none, or if it is no template."""
    from jinja2 import nodes

    tree = parsed(template)
    for kind in (nodes.Mul, nodes.Pow) if tree is not None else ():
        for node in tree.find_all(kind):
            for number in node.find_all(nodes.Const):
                if isinstance(number.value, int | float) and abs(number.value) > FACTOR:
                    return int(number.value)
    return None


@lru_cache(maxsize=8)
def parsed(template: str) -> Any:
    """The template as Jinja's tree, read as Transformers reads it (with `{% generation %}`); None if it is no template."""
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
