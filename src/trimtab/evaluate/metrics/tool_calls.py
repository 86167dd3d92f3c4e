"""Tool calls: whether the answer calls the expected tools with the expected arguments."""

from collections.abc import Sequence

from trimtab.evaluate.intervals import Measured
from trimtab.evaluate.metrics._base import Metric, ScoredAnswer
from trimtab.evaluate.metrics._calls import Call, find_calls


class ToolCalls(Metric):
    """The share of answers whose tool calls are the expected ones, in any order; and of those in which at least the tools are.

    An answer without calls is right where none were expected. Calls are read in the notation of the model's chat template.
    """

    def measure(self, answers: Sequence[ScoredAnswer]) -> Measured:
        expected = [_expected(answer) for answer in answers]
        if not any(expected):
            self.refuse(["none of the expected answers has tool_calls"])
        said = [find_calls(answer.raw) for answer in answers]
        pairs = list(zip(said, expected, strict=True))
        right = [float(_are_equal(one, wanted)) for one, wanted in pairs]
        names = [float(sorted(call.name for call in one) == sorted(call.name for call in wanted)) for one, wanted in pairs]
        return Measured.means({"tool_calls": right, "tool_names": names}, shares=["tool_calls", "tool_names"])


def _expected(answer: ScoredAnswer) -> list[Call]:
    message = next(message for message in reversed(answer.example.messages) if message["role"] == "assistant")
    calls = [call["function"] for call in message.get("tool_calls") or []]
    return [Call(call["name"], call["arguments"]) for call in calls]


def _are_equal(said: list[Call], expected: list[Call]) -> bool:
    left = list(expected)
    for call in said:
        match = next((other for other in left if call.equals(other)), None)
        if match is None:
            return False
        left.remove(match)
    return not left
