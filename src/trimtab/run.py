"""One run, top to bottom: the script that carries a recipe out."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab import files
from trimtab.artifacts import read_adapter, write_adapter
from trimtab.base import Base
from trimtab.config import read
from trimtab.data import Example, Loaded, Pack, held_out_examples, load_data, pack_all, plan_steps, units
from trimtab.deploy import load_adapter, sample, save_adapter, versions
from trimtab.engine import Memory, check_packing
from trimtab.errors import ArtifactError, DataError, RecipeError, StorageError
from trimtab.evaluate import Loss, score_loss
from trimtab.methods import Attached, attach
from trimtab.prepare import continued, prepared
from trimtab.recipe import Recipe
from trimtab.report import Silent, Watcher
from trimtab.train import Step, peak_learning_rate, planned_memory, train


@dataclass
class Run:
    """A run's folder, and what is known about it. `state` is what run.json holds."""

    folder: Path
    state: dict[str, Any] = field(default_factory=dict)

    def write(self, **news: Any) -> None:
        """Add to run.json."""
        self.state |= news
        files.write_json(self.folder / "run.json", self.state)

    def log(self, **line: Any) -> None:
        """Add a line to metrics.jsonl."""
        files.append_line(self.folder / "metrics.jsonl", json.dumps(line))


def run_recipe(recipe: Recipe, watch: Watcher | None = None) -> Run:
    """Carry a recipe out.

    Raises:
        TrimtabError: Any of `errors.py`. Until the first step, nothing has been written; afterwards, the newest adapter
            that was saved is whole, in the run's `checkpoints`.
        KeyboardInterrupt: After the adapter as it stood has been saved.
    """
    watch = watch or Silent()
    if recipe.output.exists() and (not recipe.output.is_dir() or any(recipe.output.iterdir())):
        files.refuse_existing(recipe.output)
    recipe, origin = continued(recipe)
    base = Base.load(recipe.model)
    base.add_tokens(recipe.method.new_tokens)
    with ThreadPoolExecutor(max_workers=1) as background:  # hashing the weights beside tokenizing the data
        fingerprint = background.submit(lambda: base.fingerprint)
        check_packing(base.model)
        # By absolute paths, as the run's recipe.yaml has them, so that its held-out rows are found again.
        limit = base.context_length - recipe.method.positions if base.context_length is not None else None
        data = load_data(recipe.absolute().data, base, limit, recipe.train.seed, recipe.objective.learns_from)
        fingerprint.result()
    if origin is None:
        adapter = attach(base.model, recipe.method, recipe.train.seed, sample=sample(base, data.train))
    else:
        adapter = load_adapter(base, origin["folder"])
    rows = (data.train, data.eval)
    objective, (data.train, data.eval), reference = prepared(recipe.objective, base, adapter, rows, recipe.train.seed, limit)
    recipe = recipe.model_copy(update={"objective": objective})
    memory = planned_memory(base, recipe.train, data.train)
    steps = Steps(data, recipe, memory)
    facts = {**_facts(recipe, base, adapter, data, steps), "start": origin, "reference": reference}
    watch.planned(facts, data.accounts, len(units(data.train)), len(units(data.eval)))

    run = _begin(recipe, {"status": "running", **facts}, data)
    try:
        done = _train(run, recipe, base, adapter, data, steps, watch)
        base.check_unchanged()
        best = done.best or done.last
        write_adapter(run.folder / "adapter", read_adapter(run.folder / best["folder"]))
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        with suppress(StorageError):  # what went wrong first is what matters
            run.write(status="interrupted") if interrupted else run.write(status="failed", error=str(error))
        raise
    run.write(status="done", best=best, last=done.last, seconds=done.seconds, tokens=done.tokens, computed_tokens=done.computed)
    watch.finished(run.state, run.folder)
    return run


def _facts(recipe: Recipe, base: Base, adapter: Attached, data: Loaded, steps: "Steps") -> dict[str, Any]:
    """What is known before the first step, as JSON data."""
    rate, formula = peak_learning_rate(recipe.train, base, recipe.method, recipe.objective, steps.rows_per_step)
    trained = sum(p.numel() for p in adapter.parameters().values())
    return {
        "base": {"source": base.source, "fingerprint": base.fingerprint},
        "method": recipe.method.plain(),
        "objective": recipe.objective.plain(),
        "trainable_parameters": trained,
        "positions": recipe.method.positions,
        "base_parameters": base.model.num_parameters() - trained,
        "steps": len(steps),
        "memory": steps.memory.words,
        "peak_lr": rate,
        "lr_formula": formula,
        "learned_tokens": sum(len(row.learned) for row in data.train if row.side != "mismatched"),
        "data_digest": data.digest,
        "versions": versions(),
    }


def _begin(recipe: Recipe, state: dict[str, Any], data: Loaded) -> Run:
    """The run's folder, which appears with all that is known before the first step, or (an empty one that is there) is filled."""
    with nullcontext(recipe.output) if recipe.output.exists() else files.new_folder(recipe.output) as folder:
        files.write_text(folder / "recipe.yaml", recipe.to_yaml())
        files.write_json(folder / "data.json", data.plain())
        Run(folder, state).write()
    return Run(recipe.output, state)


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


class Steps:
    """The packs of each optimizer step, made when it is taken."""

    def __init__(self, data: Loaded, recipe: Recipe, memory: Memory) -> None:
        if not data.train:
            raise DataError("data: there is nothing to learn from.")
        self._rows, self.memory = data.train, memory
        self._plan = plan_steps(
            data.train,
            epochs=recipe.train.epochs,
            seed=recipe.train.seed,
            rows=recipe.train.rows,
            tokens=recipe.train.tokens_per_step,
        )

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, number: int) -> list[Pack]:
        return pack_all([self._rows[n] for n in self._plan[number]], self.memory.pack_tokens)

    @property
    def rows_per_step(self) -> float:
        return sum(len(units(self._rows[n] for n in step)) for step in self._plan) / len(self._plan)


@dataclass
class _Done:
    """What training has saved, and how long it took."""

    best: dict[str, Any] | None = None
    last: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0
    computed: int = 0


def _train(run: Run, recipe: Recipe, base: Base, adapter: Attached, data: Loaded, steps: Steps, watch: Watcher) -> _Done:
    done, started, step = _Done(), time.perf_counter(), None
    every = recipe.train.evaluate_every or max(1, -(-len(steps) // 4))
    # What the base without the adapter can't read, or is not the start of, is compared with as it starts.
    as_it_starts = bool(recipe.method.new_tokens) or recipe.objective.compares or recipe.start is not None
    if as_it_starts:
        _evaluate(run, base, data, 0, recipe, steps, watch)
    try:
        for step in train(base, adapter, recipe.objective, steps, recipe.train, run.state["peak_lr"], steps.memory):
            done.tokens += step.tokens
            done.computed += step.computed
            run.log(kind="train", step=step.number, **_step_line(step))
            watch.stepped(step, len(steps))
            if step.number % every == 0 or step.number == len(steps):
                # The base's loss, to compare with; measured now, so that training starts at once.
                if not done.last and not as_it_starts:
                    with adapter.disabled():
                        _evaluate(run, base, data, 0, recipe, steps, watch)
                scored = _evaluate(run, base, data, step.number, recipe, steps, watch)
                _save(run, base, adapter, done, step, scored)
    except KeyboardInterrupt:
        if step is None:
            raise
        if done.last.get("step") != step.number:
            _save(run, base, adapter, done, step, None)
        raise KeyboardInterrupt(f"the adapter after step {step.number} is in {run.folder / done.last['folder']}") from None
    done.seconds = time.perf_counter() - started
    return done


def _evaluate(run: Run, base: Base, data: Loaded, step: int, recipe: Recipe, steps: Steps, watch: Watcher) -> Loss | None:
    if not data.eval:
        return None
    scored = score_loss(base, data.eval, steps.memory.pack_tokens, recipe.objective)
    low, high = scored.interval
    run.log(kind="eval", step=step, loss=scored.loss, low=low, high=high, tokens=scored.tokens, **scored.measures)
    watch.evaluated(step, scored)
    return scored


def _save(run: Run, base: Base, adapter: Attached, done: _Done, step: Step, scored: Loss | None) -> None:
    """Save the adapter, then let go of those that are neither the best nor the last."""
    name = f"checkpoints/step-{step.number:06d}"
    news = {"step": step.number, "folder": name, "train_loss": step.loss, "eval_loss": scored.loss if scored else None}
    if not (run.folder / name).exists():  # it does if an interruption came when it had just been saved
        facts = {key: run.state[key] for key in ("data_digest", "objective", "reference", "start")}
        save_adapter(base, adapter, run.folder / name, {**news, **facts})
    previous, done.last = done.last, news
    if scored and (done.best is None or scored.loss < done.best["eval_loss"]):
        previous_best, done.best = done.best, news
    else:
        previous_best = None
    run.write(best=done.best, last=done.last)
    kept = {done.last["folder"], (done.best or {}).get("folder")}
    for old in (previous, previous_best):
        if old and old["folder"] not in kept and (run.folder / old["folder"]).exists():
            files.remove_folder(run.folder / old["folder"])


def _step_line(step: Step) -> dict[str, Any]:
    return {
        "loss": step.loss,
        "lr": step.lr,
        "grad_norm": step.grad_norm,
        "items": step.items,
        "tokens": step.tokens,
        "computed": step.computed,
        "seconds": round(step.seconds, 4),
        **step.measures,
    }
