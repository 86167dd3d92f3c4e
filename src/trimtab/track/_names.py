"""The lines of metrics.jsonl under the names that trackers show: those of Hugging Face's Trainer and TRL, and ours beside them."""

import json
from typing import Any, NamedTuple

PREFERENCES = {
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "chosen_logp": "logps/chosen",
    "rejected_logp": "logps/rejected",
    "kl": "kl",
}
"""What preference objectives measure, as TRL calls it."""
TRAIN = PREFERENCES | {"lr": "learning_rate"}
EVAL = PREFERENCES | {"low": "loss_low", "high": "loss_high"}
LEFT_OUT = {"kind", "step", "sources", "answers", "skipped"}
PERFORMANCE = {"tokens", "computed", "seconds", "took", "waited", "items", "rows"}
"""What is not shown as it is: counts, and times."""
COLUMNS = ("question", "expected", "answer", "right")


class Line(NamedTuple):
    """A line of metrics.jsonl as trackers show it."""

    number: int
    """Of the line, from 0: larger than that of every line before, which its step need not be."""
    kind: str
    step: int
    values: dict[str, float]
    rows: list[list[Any]]
    """Of a table of sampled answers, with `COLUMNS`."""

    def as_markdown(self) -> str:
        """The table, for trackers that have none."""

        def cell(value: Any) -> str:
            return str(value).replace("|", "\\|").replace("\n", "<br>")

        rows = [list(COLUMNS), ["---"] * len(COLUMNS), *self.rows]
        return "\n".join(f"| {' | '.join(map(cell, row))} |" for row in rows)


class Namer:
    """Names the lines of a metrics.jsonl, one after the other from its beginning: some numbers are sums over all before."""

    def __init__(self) -> None:
        self.lines = self.tokens = 0

    def line(self, text: bytes) -> Line | None:
        """A line as trackers show it; None if it is not one, as a run that was killed can leave it."""
        try:
            raw = json.loads(text)
            kind, step = raw["kind"], raw["step"]
        except (ValueError, KeyError, TypeError):
            return None
        values = self._train(raw) if kind == "train" else _evaluated(raw)
        rows = [[answer.get(column) for column in COLUMNS] for answer in raw.get("answers", [])]
        self.lines += 1
        return Line(self.lines - 1, kind, step, values, rows)

    def _train(self, raw: dict[str, Any]) -> dict[str, float]:
        self.tokens += raw.get("tokens", 0)
        named = {f"train/{TRAIN.get(key, key)}": value for key, value in raw.items() if key not in LEFT_OUT | PERFORMANCE}
        named |= {"train/global_step": raw["step"], "train/num_input_tokens_seen": self.tokens}
        if raw.get("took"):
            named |= {"perf/tokens_per_s": raw["tokens"] / raw["took"], "perf/seconds": raw["seconds"]}
        named["perf/waited"] = raw.get("waited")
        return _numbers(named)


def _evaluated(raw: dict[str, Any]) -> dict[str, float]:
    named = {f"eval/{EVAL.get(key, key)}": value for key, value in raw.items() if key not in LEFT_OUT | PERFORMANCE}
    for source, values in raw.get("sources", {}).items():
        named |= {
            f"eval/{source}/{EVAL.get(key, key)}": value for key, value in values.items() if key not in LEFT_OUT | PERFORMANCE
        }
    return _numbers(named)


def _numbers(named: dict[str, Any]) -> dict[str, float]:
    """Without what is missing, or is NaN or Inf, which metrics.jsonl holds as a text and most trackers refuse."""
    return {name: value for name, value in named.items() if isinstance(value, int | float) and not isinstance(value, bool)}
