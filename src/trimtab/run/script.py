"""One run, top to bottom: the script that carries a recipe out."""

import secrets
import string
from collections.abc import Iterator
from contextlib import suppress

from trimtab.artifacts import State
from trimtab.artifacts.run_folder import ADAPTER, DATA, RECIPE, START
from trimtab.base import room_to_use
from trimtab.certify.certificate import certify, refuse_failed
from trimtab.core import files
from trimtab.core.determinism import deterministic
from trimtab.core.errors import DataError, NonFinite, NotMoved, ProcessesDiffer, StorageError, listing
from trimtab.core.interrupts import interrupts_deferred
from trimtab.core.processes import processes
from trimtab.deploy import copy_adapter, save_adapter
from trimtab.engine import MemoryPlan, PeakMemory
from trimtab.launch import refuse_other_devices
from trimtab.report import RunObserver, Together
from trimtab.run.checkpoints import Checkpointer, Progress, Run, keep_adapters, newest_checkpoints, remove_states, same_command
from trimtab.run.claim import claim_together
from trimtab.run.recipe import Recipe
from trimtab.run.report_page import ReportPage
from trimtab.run.resume import IDENTIFIED, UnfinishedRun
from trimtab.run.start import PreparedRun, prepare
from trimtab.run.tracking import tracked
from trimtab.run.validation import Validation
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
    refuse_other_devices(recipe.devices, recipe.model.device)
    processes.open()
    observer = observer if observer is not None and processes.first else RunObserver()
    with (
        processes.failing_together(),
        claim_together(recipe, observer.on_notice) as unfinished,
        deterministic(recipe.train.deterministic),
    ):
        prepared = prepare(recipe, unfinished, observer)
        if not processes.first:
            return _carry_out_beside_first(prepared, unfinished)
        run = _begin(prepared, unfinished)
        observer = Together(observer, ReportPage(run.folder, observer.on_notice))
        with tracked(prepared.recipe, run.folder, observer) as trackers:
            run = _carry_out(run, prepared, unfinished.state if unfinished else None, Together(observer, trackers))
        processes.wait()
        return run


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
        save_adapter(prepared.base, prepared.adapter, folder / START, tokenizer=False)
    if unfinished is not None:
        facts = {**unfinished.facts, **{key: facts[key] for key in IDENTIFIED}}
    run = Run(folder, {"status": "", "id": _new_id(), **facts})
    run.write(status="running")
    return run


def _carry_out_beside_first(prepared: PreparedRun, unfinished: UnfinishedRun | None) -> Run:
    """Train as the first process does, which alone writes and certifies; and wait for it."""
    run = Run(prepared.recipe.output, {**prepared.facts, **(unfinished.facts if unfinished is not None else {})})
    processes.wait()  # until it has begun
    _train(run, prepared, unfinished.state if unfinished is not None else None, RunObserver())
    prepared.base.check_unchanged()
    prepared.base.release()
    processes.wait()
    return run


def _new_id() -> str:
    """What trackers know a run by, before and after it is resumed: SwanLab asks for 21 letters and digits."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(21))


def _carry_out(run: Run, prepared: PreparedRun, state: State | None, observer: RunObserver) -> Run:
    try:
        processes.wait()
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
            observer.on_failure(error)
        raise
    run.record.pop("error", None)
    facts = {"tokens": progress.tokens, "computed_tokens": progress.computed, "stopped": progress.stopped}
    run.write(status="done", best=best, last=progress.last, seconds=progress.seconds, **facts)
    newest = newest_checkpoints(run.folder, prepared.recipe.train.keep)
    keep_adapters(run.folder, {best["folder"], progress.last["folder"], *newest})
    observer.on_finish(run.record, run.folder)
    if not prepared.recipe.certify:
        remove_states(run.folder)
        return run
    observer.on_stage("certifying the saved adapter in a new process")
    prepared.base.release()  # the new process loads it: it need not be held twice
    if prepared.engine.shards_base and (note := room_to_use(prepared.recipe.model)) is not None:
        observer.on_notice(f"the base model, for the certificate: {note}")
    try:
        certificate = certify(
            run.folder, prepared.base, prepared.data, prepared.recipe.objective, best, unmoved, progress.skipped
        )
    except KeyboardInterrupt:
        again = same_command(prepared.recipe)
        raise KeyboardInterrupt(f"training is done; {again} certifies the adapter") from None
    observer.on_certificate(certificate)
    remove_states(run.folder)  # until here, the same command comes back to certify
    refuse_failed(certificate, run.folder)
    return run


def _train(run: Run, prepared: PreparedRun, state: State | None, observer: RunObserver) -> tuple[Progress, list[str]]:
    """What was saved, and the names of the tensors that training has not moved."""
    with processes.interrupted_together(), processes.in_step(DataError, NonFinite, NotMoved, ProcessesDiffer):
        return _train_in_step(run, prepared, state, observer)


def _train_in_step(run: Run, prepared: PreparedRun, state: State | None, observer: RunObserver) -> tuple[Progress, list[str]]:
    optimizer, first_values, peak = _optimizer(prepared, state)
    if notice := prepared.recipe.train.optimizer.notice(prepared.base.device):
        observer.on_notice(notice)
    checkpointer = Checkpointer(run, prepared, optimizer, state)
    validation = Validation(prepared, checkpointer, observer)
    if state is None:
        validation.before_training()
    elif checkpointer.lacks_evaluation():
        checkpointer.save(state.step, checkpointer.progress.last["train_loss"], validation.after(state.step))
    logged: Step | None = None
    try:
        for step in _steps(prepared, run.record["peak_lr"], optimizer, checkpointer.progress.stopped):
            with interrupts_deferred():
                values = checkpointer.logged(step)
                logged = step
            observer.logged("train", step.number, values)
            if step.skipped is not None:
                observer.on_notice(step.skipped)
            if step.number == MOVED_BY and (unmoved := _unmoved(first_values, optimizer)):
                raise NotMoved(_unmoved_message(unmoved))
            evaluates = checkpointer.is_due(checkpointer.evaluate_every, step.number)
            checkpointer.after(step.number, step.loss, validation.after(step.number) if evaluates else None)
            if checkpointer.progress.stopped:
                optimizer.release()
                break
    except KeyboardInterrupt:
        # Between an update and its line in the metrics, the last checkpoint stays the newest.
        with suppress(KeyboardInterrupt), interrupts_deferred():
            together = processes.size == 1 or processes.told_to_stop
            if together and logged is not None and optimizer.taken == logged.number != checkpointer.progress.last.get("step"):
                observer.on_stage(f"saving step {logged.number}")
                checkpointer.save(logged.number, logged.loss, validation.of(logged.number))
        raise KeyboardInterrupt(checkpointer.resume_hint()) from None
    if logged is not None:
        run.write(memory_held=_memory_held(peak, prepared.steps.memory))
    return checkpointer.progress, _unmoved(first_values, optimizer) if optimizer.taken >= MOVED_BY else []


def _steps(prepared: PreparedRun, peak_lr: float, optimizer: Optimizer, stopped: str | None) -> Iterator[Step]:
    """The optimizer steps that are still to be taken: none of a run that was interrupted after it had stopped early."""
    if stopped is None:
        base, recipe, steps = prepared.base, prepared.recipe, prepared.steps
        yield from train(base, prepared.adapter, recipe.objective, steps, recipe.train, peak_lr, steps.memory, optimizer)


def _optimizer(prepared: PreparedRun, state: State | None) -> tuple[Optimizer, dict[str, str], PeakMemory]:
    """The optimizer as the checkpoint has it, digests of its parameters' first values, and the peak of memory from now on."""
    config, already = prepared.recipe.train, 0
    optimizer = prepared.engine.optimizer(prepared.adapter, config)
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
