"""What a run tells while it runs."""

from pathlib import Path
from typing import Any

from trimtab.data import SourceReport


class RunObserver:
    """Told what happens in a run, as it happens. Every method does nothing: derive from it and override those of interest."""

    def on_stage(self, stage: str) -> None:
        """Called before anything that may take a while, such as `loading the model`."""

    def on_plan(self, facts: dict[str, Any], reports: list[SourceReport], train_examples: int, eval_examples: int) -> None:
        """Called before the first step.

        Args:
            facts: What `run.json` will say.
            reports: Where the examples of each data source went.
        """

    def on_notice(self, message: str) -> None:
        """Called with what the user should know and nothing is refused for."""

    def on_tracker(self, name: str, place: str) -> None:
        """Called before the first step, with where a tracker of the recipe puts the run's numbers."""

    def logged(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Called after every optimizer step and evaluation, with what `metrics.jsonl` gets a line of.

        Args:
            kind: `train`, `eval` or `samples`; an evaluation at step 0 is of the model before training.
            values: Numbers by name, `loss` among them; under `sources`, those of each named source. Of samples, what `eval.metrics`
                measure, and under `answers` the questions with the expected answers and the model's.
        """

    def on_finish(self, record: dict[str, Any], folder: Path) -> None:
        """Called when training is done, with what `run.json` says now."""

    def on_certificate(self, certificate: dict[str, Any]) -> None: ...

    def on_failure(self, error: BaseException) -> None:
        """Called when the run ends by an error, or is interrupted (a KeyboardInterrupt), after `run.json` says so."""


class Together(RunObserver):
    """Several observers as one: each is told everything, in their order."""

    def __init__(self, *observers: RunObserver) -> None:
        self.observers = observers

    def on_stage(self, stage: str) -> None:
        for observer in self.observers:
            observer.on_stage(stage)

    def on_plan(self, facts: dict[str, Any], reports: list[SourceReport], train_examples: int, eval_examples: int) -> None:
        for observer in self.observers:
            observer.on_plan(facts, reports, train_examples, eval_examples)

    def on_notice(self, message: str) -> None:
        for observer in self.observers:
            observer.on_notice(message)

    def on_tracker(self, name: str, place: str) -> None:
        for observer in self.observers:
            observer.on_tracker(name, place)

    def logged(self, kind: str, step: int, values: dict[str, Any]) -> None:
        for observer in self.observers:
            observer.logged(kind, step, values)

    def on_finish(self, record: dict[str, Any], folder: Path) -> None:
        for observer in self.observers:
            observer.on_finish(record, folder)

    def on_certificate(self, certificate: dict[str, Any]) -> None:
        for observer in self.observers:
            observer.on_certificate(certificate)

    def on_failure(self, error: BaseException) -> None:
        for observer in self.observers:
            observer.on_failure(error)
