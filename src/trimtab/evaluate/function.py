"""A metric of the user's own: the only code that Trimtab runs which it did not bring along, and only where the user names it."""

import hashlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from importlib.abc import ExecutionLoader
from pathlib import Path
from typing import Any

from trimtab.core.errors import RecipeError
from trimtab.core.files import expand_user
from trimtab.evaluate.intervals import Measured
from trimtab.evaluate.metrics._base import ScoredAnswer


class FunctionFailed(RecipeError):
    """The user's function raised an error, or returned something else than numbers."""


class UserFunction:
    """A function from a file of the user's.

    Args:
        function: file.py:name.
        on_notice: Is told what will be executed, before it is.

    Raises:
        RecipeError: There is no such file or function, or the file can't be executed.
    """

    def __init__(self, function: str, on_notice: Callable[[str], None] = lambda _: None) -> None:
        file, _, self.name = function.rpartition(":")
        self.path = Path(expand_user(file)).absolute()
        try:
            source = self.path.read_bytes()
        except OSError as error:
            raise RecipeError(f"eval.function: {self.path} cannot be read: {error.strerror}.") from None
        self.sha256 = hashlib.sha256(source).hexdigest()
        on_notice(f"eval.function: executing {self.path} (sha256 {self.sha256}), and its {self.name}() on every answer")
        self._function = self._load(source)
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        takes = [p for p in inspect.signature(self._function).parameters.values() if p.kind in positional]
        if not 2 <= len(takes) <= 3:
            raise RecipeError(
                f"eval.function: {self.name} of {self.path} takes {len(takes)} arguments; it is called with the answer, the expected "
                "answer and, if it takes three, the example."
            )
        self._takes_example = len(takes) == 3

    def _load(self, source: bytes) -> Callable[..., Any]:
        """The function, from the very bytes whose hash was said."""
        path, code = str(self.path), source

        class Loader(ExecutionLoader):
            def get_source(self, fullname: str) -> str:
                return importlib.util.decode_source(code)

            def get_filename(self, fullname: str) -> str:
                return path

        spec = importlib.util.spec_from_loader("eval_function", Loader(), origin=path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise RecipeError(f"eval.function: {path} fails when it is executed: {_told(error, self.path)}") from error
        function = getattr(module, self.name, None)
        if not callable(function):
            raise RecipeError(f"eval.function: {path} has no function {self.name}.")
        return function

    def measure(self, answers: Sequence[ScoredAnswer], taken: Sequence[str] = ()) -> Measured:
        """Means of its values over the answers.

        Args:
            taken: Names that its values can't have.

        Raises:
            FunctionFailed: It raised an error, or did not return the same numbers by name for every answer.
        """
        each: dict[str, list[float]] = {}
        for number, answer in enumerate(answers):
            values = self._call(answer)
            if number and values.keys() != each.keys():
                raise FunctionFailed(
                    f"eval.function: {self.name} returned {', '.join(values)} for {answer.where}, and {', '.join(each)} before."
                )
            if both := [name for name in values if name in taken]:
                raise FunctionFailed(f"eval.function: {self.name} returned a value named {both[0]}, which another one has.")
            for name, value in values.items():
                each.setdefault(name, []).append(value)
        return Measured.means(each)

    def _call(self, answer: ScoredAnswer) -> dict[str, float]:
        example = {"where": answer.where, "messages": list(answer.example.messages), "tools": list(answer.example.tools)}
        try:
            returned = self._function(answer.answer, answer.expected, *([example] if self._takes_example else []))
        except (Exception, SystemExit) as error:
            raise FunctionFailed(f"eval.function: {self.name} failed on {answer.where}: {_told(error, self.path)}") from error
        values = returned if isinstance(returned, dict) else {self.name: returned}
        for name, value in values.items():
            if not isinstance(name, str) or not isinstance(value, int | float) or not math.isfinite(value):
                raise FunctionFailed(
                    f"eval.function: {self.name} returned {returned!r} for {answer.where}; expected a finite number, or a mapping of names to "
                    "such numbers."
                )
        return {name: float(value) for name, value in values.items()}


def _told(error: BaseException, path: Path) -> str:
    """An error, and the line of the user's file that it comes from."""
    trace, line = error.__traceback__, ""
    while trace is not None:
        line = f" ({path.name}:{trace.tb_lineno})" if trace.tb_frame.f_code.co_filename == str(path) else line
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}{line}"
