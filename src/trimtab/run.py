"""One run, top to bottom: the script that carries a recipe out."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab import files
from trimtab.artifacts import State
from trimtab.base import Base
from trimtab.certificate import canaries, certify, refuse_failed
from trimtab.config import read
from trimtab.data import Example, Finding, Loaded, held_out_examples, refuse_problems, units
from trimtab.data.example import Sequence as Row
from trimtab.deploy import keep_adapter, save_adapter, versions
from trimtab.engine import FrozenBelow, Memory, Peak
from trimtab.errors import ArtifactError, DataError, NotMoved, RecipeError, StorageError, listing
from trimtab.evaluate import Loss, score_loss
from trimtab.examine import PACK_TOKENS
from trimtab.interrupts import afterwards
from trimtab.methods import Attached
from trimtab.preflight import check_disk, opened, preflight
from trimtab.prepare import prepared
from trimtab.recipe import Recipe
from trimtab.reference import logprobs
from trimtab.report import Silent, Watcher
from trimtab.resume import DECIDED, Unfinished, claimed, threads
from trimtab.saving import START, Progress, Run, Saver, end, keep_adapters
from trimtab.train import Optimizer, PlannedSteps, Step, peak_learning_rate, planned_memory, train

MOVED_BY = 3
"""Steps by which everything that is trained must have moved: of two factors, the second one moves the first a step later."""


def run_recipe(recipe: Recipe, watch: Watcher | None = None) -> Run:
    """Carry a recipe out, or go on with its unfinished run.

    Raises:
        TrimtabError: Any of `errors.py`. Until the first step, nothing has been written; afterwards the run can be gone on
            with from where it was saved last.
        KeyboardInterrupt: After everything as it stood has been saved.
    """
    watch = watch or Silent()
    with claimed(recipe, watch.noticed) as before:
        if before is not None:
            before.check_recipe(recipe)
        ready = _made_ready(recipe, before, watch)
        run = _begin(ready, before)
        return _carried_out(run, ready, before.state if before else None, watch)


@dataclass
class _Ready:
    """Everything that training needs."""

    recipe: Recipe
    base: Base
    adapter: Attached
    data: Loaded
    steps: PlannedSteps
    facts: dict[str, Any]
    findings: list[Finding]
    """Of the data's proof, and what else was looked at."""


def _made_ready(recipe: Recipe, before: Unfinished | None, watch: Watcher) -> _Ready:
    given = opened(recipe, before.moment if before is not None else None, watch.began)
    recipe, base, adapter, data = given.recipe, given.base, given.adapter, given.data
    watch.began("checking what will be trained on")
    findings = preflight(given)
    check_disk(findings)
    refuse_problems(findings)
    rows = (data.train, data.eval)
    if recipe.objective.compares:
        watch.began("computing what the reference model makes of the examples")
    objective, (data.train, data.eval), reference = prepared(
        recipe.objective, base, adapter, rows, recipe.train.seed, given.limit
    )
    recipe = recipe.model_copy(update={"objective": objective})
    watch.began("planning the memory")
    memory = before.memory() if before is not None else None
    memory = memory or planned_memory(base, recipe.train, data.train, data.eval)
    steps = PlannedSteps(data.train, recipe.train, memory)
    facts = {**_facts(recipe, base, adapter, data, steps), "start": given.origin, "reference": reference}
    watch.planned(facts, data.accounts, len(units(data.train)), len(units(data.eval)))
    for one in findings:
        if one.status == "note" and one.name != "rows" and (data.eval or one.name != "held out"):  # the others are said already
            watch.noticed(f"{one.name}: {one.words}")
    if before is not None:
        before.check(recipe, facts, data.plain()["files"], watch.noticed)
        if recipe.train.repeats and FrozenBelow(base.model, 0).lowest:
            watch.noticed("what frozen lower layers made of rows is computed anew: results may differ by rounding from here on")
        watch.noticed(f"goes on with {before.folder} after step {before.step} of {len(steps)}")
    return _Ready(recipe, base, adapter, data, steps, facts, findings)


def _carried_out(run: Run, ready: _Ready, state: State | None, watch: Watcher) -> Run:
    try:
        done, unmoved = _train(run, ready, state, watch)
        ready.base.check_unchanged()
        best = done.best or done.last
        if (run.folder / "adapter").exists():  # the run ended in the middle of its end
            files.remove_folder(run.folder / "adapter")
        keep_adapter(ready.base, run.folder / best["folder"], run.folder / "adapter")
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        with suppress(KeyboardInterrupt, StorageError), afterwards():  # what went wrong first is what matters
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


def _facts(recipe: Recipe, base: Base, adapter: Attached, data: Loaded, steps: PlannedSteps) -> dict[str, Any]:
    """What is known before the first step, as JSON data."""
    rate, formula = peak_learning_rate(recipe.train, base, recipe.method, recipe.objective, steps.rows_per_step)
    trained = sum(p.numel() for p in adapter.parameters().values())
    return {
        "base": {"source": base.source, "fingerprint": base.fingerprint},
        "moment": base.moment.isoformat(),
        "method": recipe.method.plain(),
        "objective": recipe.objective.plain(),
        "trainable_parameters": trained,
        "positions": recipe.method.positions,
        "base_parameters": base.model.num_parameters() - trained,
        "steps": len(steps),
        "epochs": steps.epochs,
        "rows_per_step": steps.rows_per_step,
        "memory": steps.memory.words,
        "plan": steps.memory.plain(),
        "threads": threads(),
        "device": str(base.device),
        "peak_lr": rate,
        "lr_formula": formula,
        "learned_tokens": sum(len(row.learned) for row in data.train if row.side != "mismatched"),
        "data_digest": data.digest,
        "versions": versions(),
    }


def _begin(ready: _Ready, before: Unfinished | None) -> Run:
    """The run's folder with all that is known before the first step; `run.json`, written last, makes it a run."""
    folder = ready.recipe.output
    if before is not None:
        before.clear()
    files.write_text(folder / "recipe.yaml", ready.recipe.to_yaml())
    proof = [one.plain() for one in ready.findings if one.name != "disk"]
    files.write_json(folder / "data.json", {**ready.data.plain(), "proof": proof})
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


def held_out(folder: Path) -> tuple[list[Example], str]:
    """The rows that a run held out, and a name for them."""
    if not (folder / "run.json").is_file():
        raise RecipeError(f"{folder} is not a run folder, so it has no held-out rows of its own: give rows with --data.")
    recipe, remembered = read(Recipe, folder / "recipe.yaml"), files.read_json(folder / "data.json")
    if not isinstance(remembered, dict) or not {"files", "held_out"} <= remembered.keys():
        raise ArtifactError(
            f"{folder / 'data.json'}: does not say which rows were held out. Restore it from a copy, or give rows with --data."
        )
    examples = held_out_examples(recipe.data, remembered, recipe.objective.learns_from)
    if not examples:
        raise DataError(f"{folder} held out no rows: give rows with --data.")
    return examples, f"held-out rows of {folder}"


def _train(run: Run, ready: _Ready, state: State | None, watch: Watcher) -> tuple[Progress, list[str]]:
    """What was saved, and the names of what training has not moved."""
    recipe, steps = ready.recipe, ready.steps
    optimizer, first, peak = _optimizer(ready, state)
    progress, few = Progress(**state.facts) if state is not None else Progress(), canaries(ready.data)
    saver = Saver(run, ready.base, optimizer, progress, lambda scored: _seen(ready.base, few, scored))
    every = recipe.train.evaluate_every or max(1, -(-len(steps) // 4))
    # What the base without the adapter can't read, or is not the start of, is compared with as it starts.
    as_it_starts = bool(recipe.method.new_tokens) or recipe.objective.compares or recipe.start is not None

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
            with afterwards():
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
        with suppress(KeyboardInterrupt), afterwards():  # another one changes nothing
            if logged is not None and optimizer.taken == logged.number and saver.done.last.get("step") != logged.number:
                watch.began(f"saving step {logged.number}")
                saver.save(logged.number, logged.loss, None)
        raise KeyboardInterrupt(saver.words()) from None
    if logged is not None:
        run.write(memory_held=_held(peak, steps.memory))
    return saver.done, _unmoved(first, optimizer) if len(steps) >= MOVED_BY else []


def _optimizer(ready: _Ready, state: State | None) -> tuple[Optimizer, dict[str, str], Peak]:
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


def _seen(base: Base, rows: list[Row], scored: Loss | None) -> list[tuple[str, float]]:
    """Each canary's place, and its Σ log p in the model as it stands: they are the first of the rows that were measured, if any were."""
    values = scored.logprobs[: len(rows)] if scored else logprobs(base, rows, PACK_TOKENS)
    return [(row.where, value) for row, value in zip(rows, values, strict=True)]


def _unmoved(first: dict[str, str], optimizer: Optimizer) -> list[str]:
    now = optimizer.digests()
    return [name for name, digest in first.items() if now[name] == digest]


def _evaluate(run: Run, ready: _Ready, step: int, watch: Watcher) -> Loss | None:
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
