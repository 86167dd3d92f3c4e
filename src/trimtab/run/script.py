"""One run, top to bottom: the script that carries a recipe out."""

from contextlib import suppress
from typing import Any

from trimtab.artifacts import State
from trimtab.artifacts.run_folder import ADAPTER, DATA, RECIPE, START
from trimtab.base import Base
from trimtab.certify.certificate import canaries, certify, refuse_failed
from trimtab.certify.fresh_process import PACK_TOKENS
from trimtab.core import files
from trimtab.core.errors import NotMoved, StorageError, listing
from trimtab.core.interrupts import interrupts_deferred
from trimtab.data.example import TokenRow
from trimtab.deploy import keep_adapter, save_adapter
from trimtab.engine import Memory, Peak
from trimtab.evaluate import Loss, score_loss
from trimtab.evaluate.reference import logprobs
from trimtab.report import RunObserver, Silent
from trimtab.run.checkpoints import Progress, Run, Saver, end, keep_adapters
from trimtab.run.recipe import Recipe
from trimtab.run.resume import DECIDED, Unfinished, claim_output
from trimtab.run.start import PreparedRun, prepare
from trimtab.train import Optimizer, Step, train

MOVED_BY = 3
"""Steps by which everything that is trained must have moved: of two factors, the second one moves the first a step later."""


def run_recipe(recipe: Recipe, watch: RunObserver | None = None) -> Run:
    """Carry a recipe out, or go on with its unfinished run.

    Raises:
        TrimtabError: Any of `errors.py`. Until the first step, nothing has been written; afterwards the run can be gone on
            with from where it was saved last.
        KeyboardInterrupt: After everything as it stood has been saved.
    """
    watch = watch or Silent()
    with claim_output(recipe, watch.noticed) as before:
        if before is not None:
            before.check_recipe(recipe)
        ready = prepare(recipe, before, watch)
        run = _begin(ready, before)
        return _carried_out(run, ready, before.state if before else None, watch)


def _carried_out(run: Run, ready: PreparedRun, state: State | None, watch: RunObserver) -> Run:
    try:
        done, unmoved = _train(run, ready, state, watch)
        ready.base.check_unchanged()
        best = done.best or done.last
        if (run.folder / ADAPTER).exists():  # the run ended in the middle of its end
            files.remove_folder(run.folder / ADAPTER)
        keep_adapter(ready.base, run.folder / best["folder"], run.folder / ADAPTER)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        with suppress(KeyboardInterrupt, StorageError), interrupts_deferred():  # what went wrong first is what matters
            run.write(status="interrupted") if interrupted else run.write(status="failed", error=str(error))
        raise
    run.state.pop("error", None)
    run.write(status="done", best=best, last=done.last, seconds=done.seconds, tokens=done.tokens, computed_tokens=done.computed)
    keep_adapters(run.folder, {best["folder"], done.last["folder"]})
    watch.finished(run.state, run.folder)
    if ready.recipe.certify:
        watch.began("certifying what was saved, in a process of its own")
        ready.base.release()  # a fresh process loads it: it need not be held twice
        try:
            certificate = certify(run.folder, ready.base, ready.data, ready.recipe.objective, best, unmoved, done.skipped)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("training is done; the same command certifies what came of it") from None
        watch.certified(certificate)
    end(run.folder)  # until here, the same command comes back to certify
    if ready.recipe.certify:
        refuse_failed(certificate, run.folder)
    return run


def _begin(ready: PreparedRun, before: Unfinished | None) -> Run:
    """The run's folder with all that is known before the first step; `run.json`, written last, makes it a run."""
    folder = ready.recipe.output
    if before is not None:
        before.clear()
    files.write_text(folder / RECIPE, ready.recipe.to_yaml())
    proof = [one.plain() for one in ready.findings if one.name != "disk"]
    files.write_json(folder / DATA, {**ready.data.plain(), "proof": proof})
    reference = ready.facts["reference"]
    if (
        reference is not None
        and reference["kind"] == "start"
        and ready.facts["start"] is None
        and not (folder / START).exists()
    ):
        save_adapter(ready.base, ready.adapter, folder / START)
    facts = ready.facts if before is None else {**before.facts, **{key: ready.facts[key] for key in DECIDED}}
    run = Run(folder, {"status": "running", **facts} | {"status": "running"})
    run.write()
    return run


def _train(run: Run, ready: PreparedRun, state: State | None, watch: RunObserver) -> tuple[Progress, list[str]]:
    """What was saved, and the names of what training has not moved."""
    recipe, steps = ready.recipe, ready.steps
    optimizer, first, peak = _optimizer(ready, state)
    progress, few = Progress(**state.facts) if state is not None else Progress(), canaries(ready.data)
    saver = Saver(run, ready.base, optimizer, progress, lambda scored: _seen(ready.base, few, scored))
    every = recipe.train.evaluate_every or max(1, -(-len(steps) // 4))
    # What the base without the adapter can't read, or is not the start of, is compared with as it starts.
    as_it_starts = bool(recipe.method.new_tokens) or recipe.objective.needs_reference or recipe.start is not None

    def look(number: int, train_loss: float | None) -> None:
        # The base's loss, to compare with; measured now, so that training starts at once.
        if not saver.done.compared:
            with ready.adapter.disabled():
                _evaluate(run, ready, 0, watch)
        saver.done.compared = True
        saver.save(number, train_loss, _evaluate(run, ready, number, watch))

    if as_it_starts and state is None:
        _evaluate(run, ready, 0, watch)
        saver.done.compared = True
    elif state is not None and ready.data.eval and saver.unseen(every, len(steps)):  # it was interrupted before it had looked
        look(state.step, saver.done.last["train_loss"])
    logged: Step | None = None
    try:
        for step in train(
            ready.base, ready.adapter, recipe.objective, steps, recipe.train, run.state["peak_lr"], steps.memory, optimizer
        ):
            with interrupts_deferred():
                saver.done.tokens += step.tokens
                saver.done.computed += step.computed
                run.log(kind="train", step=step.number, **_step_line(step))
                logged = step
            watch.stepped(step, len(steps))
            if step.skipped is not None:
                watch.noticed(step.skipped)
            if step.number == MOVED_BY and (still := _unmoved(first, optimizer)):
                raise NotMoved(f"after {MOVED_BY} steps, training has not moved {listing(still)}")
            if step.number % every == 0 or step.number == len(steps):
                look(step.number, step.loss)
    except KeyboardInterrupt:
        # Between an update and its line in the log, what was saved last stays the newest.
        with suppress(KeyboardInterrupt), interrupts_deferred():  # another one changes nothing
            if logged is not None and optimizer.taken == logged.number and saver.done.last.get("step") != logged.number:
                watch.began(f"saving step {logged.number}")
                saver.save(logged.number, logged.loss, None)
        raise KeyboardInterrupt(saver.words()) from None
    if logged is not None:
        run.write(memory_held=_held(peak, steps.memory))
    return saver.done, _unmoved(first, optimizer) if len(steps) >= MOVED_BY else []


def _optimizer(ready: PreparedRun, state: State | None) -> tuple[Optimizer, dict[str, str], Peak]:
    """The optimizer as the checkpoint has it, what its parameters were at first, and the peak of memory from now on."""
    optimizer, already = Optimizer(ready.adapter, ready.recipe.train.weight_decay), 0
    first = optimizer.digests()
    if state is not None:
        optimizer.load(state.tensors, state.step, state.facts["skipped"])
        already = sum(tensor.nbytes for name, tensor in state.tensors.items() if not name.startswith("value/"))
        state.tensors.clear()  # they are the optimizer's by now
    return optimizer, first, Peak(ready.base.device, already)


def _held(peak: Peak, memory: Memory) -> dict[str, float] | None:
    """The most that this process has held while it trained, beside what was planned, in bytes; None if the system doesn't say."""
    most = peak.most
    if most is None or peak.start is None:
        return None
    return {"planned": peak.start + memory.most, "measured": most, "before": peak.start}


def _seen(base: Base, rows: list[TokenRow], scored: Loss | None) -> list[tuple[str, float]]:
    """Each canary's place, and its Σ log p in the model as it stands: they are the first of the rows that were measured, if any were."""
    values = scored.logprobs[: len(rows)] if scored else logprobs(base, rows, PACK_TOKENS)
    return [(row.where, value) for row, value in zip(rows, values, strict=True)]


def _unmoved(first: dict[str, str], optimizer: Optimizer) -> list[str]:
    now = optimizer.digests()
    return [name for name, digest in first.items() if now[name] == digest]


def _evaluate(run: Run, ready: PreparedRun, step: int, watch: RunObserver) -> Loss | None:
    if not ready.data.eval:
        return None
    watch.began("measuring on the held-out rows")
    scored = score_loss(ready.base, ready.data.eval, ready.steps.memory.pack_tokens, ready.recipe.objective)
    low, high = scored.interval
    run.log(kind="eval", step=step, loss=scored.loss, low=low, high=high, tokens=scored.tokens, **scored.measures)
    watch.evaluated(step, scored)
    return scored


def _step_line(step: Step) -> dict[str, Any]:
    return {
        "loss": step.loss,
        "lr": step.lr,
        "grad_norm": step.grad_norm,
        "items": step.items,
        "tokens": step.tokens,
        "computed": step.computed,
        "seconds": round(step.seconds, 4),
        **({"skipped": step.skipped} if step.skipped else {}),
        **step.measures,
    }
