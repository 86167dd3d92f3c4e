"""The evaluations of a run on its held-out examples: when they are due, what they log, and whether they end it."""

from dataclasses import asdict
from typing import Any

from trimtab.core.interrupts import interrupts_deferred
from trimtab.evaluate import Loss, score_loss
from trimtab.report import RunObserver
from trimtab.run.checkpoints import Checkpointer
from trimtab.run.early_stopping import Standing
from trimtab.run.losses import of_start
from trimtab.run.start import PreparedRun


class Validation:
    """Evaluates the model of a run, and logs what it finds; whether it has to stop early is noted in the run's progress."""

    def __init__(self, prepared: PreparedRun, checkpointer: Checkpointer, observer: RunObserver) -> None:
        self.prepared, self.checkpointer, self.observer = prepared, checkpointer, observer
        self.latest: tuple[int, Loss] | None = None
        """The last evaluation, and the step it was made after."""

    def before_training(self) -> None:
        """Evaluate what training starts from, if that is compared with; or if the base model can't read new tokens without the adapter."""
        recipe = self.prepared.recipe
        if recipe.method.new_tokens or recipe.objective.needs_reference or recipe.start is not None:
            self.evaluate(0)
            self.checkpointer.progress.evaluated_before_training = True

    def after(self, step: int) -> Loss | None:
        """Evaluate after an optimizer step; the first time the base model as well, only now, so that training starts at once."""
        if not self.checkpointer.progress.evaluated_before_training:
            with self.prepared.adapter.disabled():
                self.evaluate(0)
            self.checkpointer.progress.evaluated_before_training = True
        return self.evaluate(step)

    def of(self, step: int) -> Loss | None:
        """The evaluation after this step, if it has been made."""
        return self.latest[1] if self.latest is not None and self.latest[0] == step else None

    def evaluate(self, step: int) -> Loss | None:
        """Evaluate the model as it is, and log it; None without held-out examples."""
        prepared = self.prepared
        if not prepared.data.eval:
            return None
        self.observer.on_stage("evaluating on the held-out examples")
        scored = score_loss(prepared.base, prepared.data.eval, prepared.steps.memory.pack_tokens, prepared.recipe.objective)
        values = {
            "loss": scored.loss,
            "low": scored.interval[0],
            "high": scored.interval[1],
            "tokens": scored.tokens,
            "rows": scored.rows,
            **scored.measures,
            **scored.by_source,
        }
        samples = self._answer_samples()
        with interrupts_deferred():  # what is logged, what stops the run and what may still be saved belong together
            self.checkpointer.run.logged("eval", step, values)
            if samples is not None:
                self.checkpointer.run.logged("samples", step, samples)
            if not step:
                self.checkpointer.progress.losses = of_start(self.checkpointer.progress.losses, scored)
            else:
                self.latest = step, scored
                self._count(step, scored)
        self.observer.logged("eval", step, values)
        if samples is not None:
            self.observer.logged("samples", step, samples)
        return scored

    def _answer_samples(self) -> dict[str, Any] | None:
        """The model's answers to the sampled examples, and what they measure, as JSON data; None if there are no samples."""
        if self.prepared.exam is None:
            return None
        self.observer.on_stage("answering validation examples")
        taken = self.prepared.exam.take()
        if taken.function_error is not None:
            self.observer.on_notice(taken.function_error)
        return {**taken.values, "answers": [answer.plain() for answer in taken.answers]}

    def _count(self, step: int, scored: Loss) -> None:
        """Whether this evaluation has improved on an earlier one, and whether the run has waited for that for long enough."""
        config, progress = self.prepared.recipe.train, self.checkpointer.progress
        if config.patience is None:
            return
        before = Standing(**progress.standing) if progress.standing else None
        standing = before.after(step, scored, config.min_improvement) if before else Standing(step, scored.loss, scored.sums)
        progress.standing = asdict(standing)
        if standing.waited >= config.patience:
            best = min(scored.loss, progress.best["eval_loss"] if progress.best else scored.loss)
            progress.stopped = standing.reason(step, best)
