"""One run, top to bottom: the script that carries a recipe out."""

from contextlib import suppress

from trimtab.artifacts import State
from trimtab.artifacts.run_folder import ADAPTER, DATA, RECIPE, START
from trimtab.certify.certificate import canaries, certify, refuse_failed
from trimtab.certify.fresh_process import PACK_TOKENS
from trimtab.core import files
from trimtab.core.determinism import deterministic
from trimtab.core.errors import NotMoved, StorageError, listing
from trimtab.core.interrupts import interrupts_deferred
from trimtab.deploy import copy_adapter, save_adapter
from trimtab.engine import MemoryPlan, PeakMemory
from trimtab.evaluate import Loss, score_loss
from trimtab.evaluate.reference import logprobs
from trimtab.report import RunObserver
from trimtab.run.checkpoints import Checkpointer, Progress, Run, keep_adapters, remove_states
from trimtab.run.recipe import Recipe
from trimtab.run.resume import IDENTIFIED, UnfinishedRun, claim_output
from trimtab.run.start import PreparedRun, prepare
from trimtab.train import LossScale, Optimizer, Step, train

MOVED_BY = 3
"""Steps by which every trained tensor must have moved: of two factors, the second one moves the first a step later."""


def run_recipe(recipe: Recipe, observer: RunObserver | None = None) -> Run:
    """Carry a recipe out, or resume its unfinished run.

    Raises:
        TrimtabError: Any of `core/errors.py`. Before the first step, nothing has been written; afterwards the run can be resumed
            from its last checkpoint.
        KeyboardInterrupt: After a checkpoint has been saved.
    """
    observer = observer or RunObserver()
    with claim_output(recipe, observer.on_notice) as unfinished, deterministic(recipe.train.deterministic):
        if unfinished is not None:
            unfinished.check_recipe(recipe)
        prepared = prepare(recipe, unfinished, observer)
        run = _begin(prepared, unfinished)
        return _carry_out(run, prepared, unfinished.state if unfinished else None, observer)


def _begin(prepared: PreparedRun, unfinished: UnfinishedRun | None) -> Run:
    """The run's folder with all that is known before the first step; `run.json`, written last, makes it a run."""
    folder, facts = prepared.recipe.output, prepared.facts
    if unfinished is not None:
        unfinished.clear()
    files.write_text(folder / RECIPE, prepared.recipe.to_yaml())
    findings = [finding.plain() for finding in prepared.findings if finding.name != "disk"]
    files.write_json(folder / DATA, {**prepared.data.plain(), "proof": findings})
    reference = facts["reference"]
    new_start = reference is not None and reference["kind"] == "start" and facts["start"] is None
    if new_start and not (folder / START).exists():
        save_adapter(prepared.base, prepared.adapter, folder / START)
    if unfinished is not None:
        facts = {**unfinished.facts, **{key: facts[key] for key in IDENTIFIED}}
    run = Run(folder, {"status": "", **facts})
    run.write(status="running")
    return run


def _carry_out(run: Run, prepared: PreparedRun, state: State | None, observer: RunObserver) -> Run:
    try:
        progress, unmoved = _train(run, prepared, state, observer)
        prepared.base.check_unchanged()
        best = progress.best or progress.last
        if (run.folder / ADAPTER).exists():  # the run was killed between here and its end
            files.remove_folder(run.folder / ADAPTER)
        copy_adapter(prepared.base, run.folder / best["folder"], run.folder / ADAPTER)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        with suppress(KeyboardInterrupt, StorageError), interrupts_deferred():  # the first error is the one to report
            run.write(status="interrupted") if interrupted else run.write(status="failed", error=str(error))
        raise
    run.record.pop("error", None)
    tokens = {"tokens": progress.tokens, "computed_tokens": progress.computed}
    run.write(status="done", best=best, last=progress.last, seconds=progress.seconds, **tokens)
    keep_adapters(run.folder, {best["folder"], progress.last["folder"]})
    observer.on_finish(run.record, run.folder)
    if not prepared.recipe.certify:
        remove_states(run.folder)
        return run
    observer.on_stage("certifying the saved adapter in a new process")
    prepared.base.release()  # the new process loads it: it need not be held twice
    try:
        certificate = certify(
            run.folder, prepared.base, prepared.data, prepared.recipe.objective, best, unmoved, progress.skipped
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("training is done; the same command certifies the adapter") from None
    observer.on_certificate(certificate)
    remove_states(run.folder)  # until here, the same command comes back to certify
    refuse_failed(certificate, run.folder)
    return run


def _train(run: Run, prepared: PreparedRun, state: State | None, observer: RunObserver) -> tuple[Progress, list[str]]:
    """What was saved, and the names of the tensors that training has not moved."""
    recipe, steps = prepared.recipe, prepared.steps
    optimizer, first_values, peak = _optimizer(prepared, state)
    if notice := recipe.train.optimizer.notice(prepared.base.device):
        observer.on_notice(notice)
    between = _BetweenSteps(run, prepared, optimizer, state, observer)
    between.before_training(state)
    logged: Step | None = None
    try:
        for step in train(
            prepared.base,
            prepared.adapter,
            recipe.objective,
            steps,
            recipe.train,
            run.record["peak_lr"],
            steps.memory,
            optimizer,
        ):
            with interrupts_deferred():
                between.log(step)
                logged = step
            observer.logged("train", step.number, step.values)
            if step.skipped is not None:
                observer.on_notice(step.skipped)
            if step.number == MOVED_BY and (unmoved := _unmoved(first_values, optimizer)):
                raise NotMoved(_unmoved_message(unmoved))
            if step.number % between.every == 0 or step.number == len(steps):
                between.evaluate_and_save(step.number, step.loss)
    except KeyboardInterrupt:
        # Between an update and its line in the metrics, the last checkpoint stays the newest.
        with suppress(KeyboardInterrupt), interrupts_deferred():
            if logged is not None and optimizer.taken == logged.number:
                between.save_interrupted(logged)
        raise KeyboardInterrupt(between.checkpointer.resume_hint()) from None
    if logged is not None:
        run.write(memory_held=_memory_held(peak, steps.memory))
    return between.checkpointer.progress, _unmoved(first_values, optimizer) if len(steps) >= MOVED_BY else []


class _BetweenSteps:
    """What happens between the optimizer steps of a run: logging, evaluating, saving."""

    def __init__(
        self, run: Run, prepared: PreparedRun, optimizer: Optimizer, state: State | None, observer: RunObserver
    ) -> None:
        self.run, self.prepared, self.observer = run, prepared, observer
        self.canaries = canaries(prepared.data)
        progress = Progress(**state.facts) if state is not None else Progress()
        self.checkpointer = Checkpointer(run, prepared.base, optimizer, progress, self.score_canaries)
        self.every = prepared.recipe.train.evaluate_every or max(1, -(-len(prepared.steps) // 4))
        """Steps from one evaluation to the next."""

    def before_training(self, state: State | None) -> None:
        """Evaluate the model before the first step, if that is compared with rather than the base model; or what a resumed run lacks."""
        recipe, checkpointer = self.prepared.recipe, self.checkpointer
        if state is None:
            # The start is the reference; or the base model, without the adapter, can't read new tokens.
            if recipe.method.new_tokens or recipe.objective.needs_reference or recipe.start is not None:
                self.evaluate(0)
                checkpointer.progress.evaluated_before_training = True
        elif self.prepared.data.eval and checkpointer.lacks_evaluation(self.every, len(self.prepared.steps)):
            self.evaluate_and_save(state.step, checkpointer.progress.last["train_loss"])

    def log(self, step: Step) -> None:
        self.checkpointer.count(step)
        self.run.logged("train", step.number, step.values)

    def evaluate_and_save(self, step: int, train_loss: float | None) -> None:
        progress = self.checkpointer.progress
        if not progress.evaluated_before_training:  # the base model's loss; only now, so that training starts at once
            with self.prepared.adapter.disabled():
                self.evaluate(0)
        progress.evaluated_before_training = True
        self.checkpointer.save(step, train_loss, self.evaluate(step))

    def save_interrupted(self, step: Step) -> None:
        """Save the last step, unless it has been saved."""
        if self.checkpointer.progress.last.get("step") != step.number:
            self.observer.on_stage(f"saving step {step.number}")
            self.checkpointer.save(step.number, step.loss, None)

    def evaluate(self, step: int) -> Loss | None:
        prepared = self.prepared
        if not prepared.data.eval:
            return None
        self.observer.on_stage("evaluating on the held-out examples")
        scored = score_loss(prepared.base, prepared.data.eval, prepared.steps.memory.pack_tokens, prepared.recipe.objective)
        low, high = scored.interval
        values = {
            "loss": scored.loss,
            "low": low,
            "high": high,
            "tokens": scored.tokens,
            "rows": scored.rows,
            **scored.measures,
            **scored.by_source,
        }
        self.run.logged("eval", step, values)
        self.observer.logged("eval", step, values)
        return scored

    def score_canaries(self, evaluated: Loss | None) -> list[tuple[str, float]]:
        """Each canary's place, and its Σ log p in the model as it is; they are the first of the held-out rows, if there are any."""
        rows = self.canaries
        values = evaluated.logprobs[: len(rows)] if evaluated else logprobs(self.prepared.base, rows, PACK_TOKENS)
        return [(row.where, value) for row, value in zip(rows, values, strict=True)]


def _optimizer(prepared: PreparedRun, state: State | None) -> tuple[Optimizer, dict[str, str], PeakMemory]:
    """The optimizer as the checkpoint has it, digests of its parameters' first values, and the peak of memory from now on."""
    config, already = prepared.recipe.train, 0
    optimizer = Optimizer(prepared.adapter, config.weight_decay, config.optimizer)
    first_values = optimizer.digests()
    if state is not None:
        scale = LossScale(**state.facts["loss_scale"]) if state.facts.get("loss_scale") else None
        optimizer.load(state.tensors, state.step, state.facts["skipped"], scale)
        already = sum(tensor.nbytes for name, tensor in state.tensors.items() if not name.startswith("value/"))
        state.tensors.clear()  # they are the optimizer's by now
    return optimizer, first_values, PeakMemory(prepared.base.device, already)


def _unmoved(first_values: dict[str, str], optimizer: Optimizer) -> list[str]:
    now = optimizer.digests()
    return [name for name, digest in first_values.items() if now[name] == digest]


def _unmoved_message(unmoved: list[str]) -> str:
    advice = "No gradient reaches them, or train.lr is too low: use other method.targets, or a higher train.lr."
    return f"After {MOVED_BY} steps, training has not changed:\n{listing(unmoved)}\n{advice}"


def _memory_held(peak: PeakMemory, memory: MemoryPlan) -> dict[str, float] | None:
    """The most that this process has held while it trained, beside what was planned, in bytes; None if the system doesn't say."""
    most = peak.highest
    if most is None or peak.start is None:
        return None
    return {"planned": peak.start + memory.peak_bytes, "measured": most, "before": peak.start}
