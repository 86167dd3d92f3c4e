"""What comes before the first step: base, data and adapter are loaded, checked, and prepared for the objective."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import torch
from torch import nn

from trimtab.artifacts import read_adapter
from trimtab.base import Base, locate_model, resolve_device
from trimtab.certify.certificate import refuse_uncertifiable
from trimtab.core import files
from trimtab.core.errors import RecipeError
from trimtab.core.hub import is_hub_name
from trimtab.core.processes import processes
from trimtab.core.wrapping import whole_shape
from trimtab.data import Finding, LoadedData, check_first_examples, load_data, refuse_problems, row_groups
from trimtab.data.example import TokenRow
from trimtab.data.mismatched import with_mismatched
from trimtab.deploy import adapter_folder, load_adapter, pinned_name, read_method, sample, versions
from trimtab.distributed import Engine
from trimtab.engine import FrozenLayerCache, ensure_checked
from trimtab.evaluate import Exam
from trimtab.evaluate.reference import PACK_TOKENS, add_reference_logprobs, check_start
from trimtab.methods import Attached, attach
from trimtab.objectives import Objective, ReferenceObjective
from trimtab.report import RunObserver
from trimtab.run.agreement import agree_on_files, least_memory
from trimtab.run.preflight import OpenedRecipe, check_disk, preflight
from trimtab.run.recipe import Recipe
from trimtab.run.resume import UnfinishedRun, threads
from trimtab.run.samples import sample_exam
from trimtab.train import CorpusSteps, TrainingSteps, memory_of, peak_learning_rate, steps_of

Rows = list[TokenRow]


@dataclass
class PreparedRun:
    """Everything that training needs."""

    recipe: Recipe
    base: Base
    adapter: Attached
    data: LoadedData
    steps: TrainingSteps | CorpusSteps
    facts: dict[str, Any]
    findings: list[Finding]
    """Of the checks before the first step."""
    exam: Exam | None
    """What is answered at each evaluation, if anything is."""
    engine: Engine
    """By which several processes train together."""


def prepare(recipe: Recipe, unfinished: UnfinishedRun | None, observer: RunObserver) -> PreparedRun:
    """Load, check and plan everything; of a run that is resumed, as it was. Raises TrimtabError, of many kinds."""
    for section in (
        "method",
        "objective",
        "train",
        "distributed",
        "eval",
        "certify",
    ):  # others hold paths, and are known by content
        processes.agree(f"{section} of the recipe. Start the same recipe on every machine.", recipe.plain()[section])
    # Of the same examples in another order, the digest is the same.
    processes.agree("data.seed of the recipe. Start the same recipe on every machine.", recipe.data_seed)
    opened = open_recipe(recipe, unfinished.moment if unfinished is not None else None, observer.on_stage)
    recipe, base, adapter, data = opened.recipe, opened.base, opened.adapter, opened.data
    observer.on_stage("checking the data, the adapter and the disk")
    findings = preflight(opened)
    if processes.first:  # who writes
        check_disk(findings)
    refuse_problems(findings)
    if recipe.objective.needs_reference:
        observer.on_stage("computing the reference model's log-probabilities")
    objective, (data.train, data.eval), reference = prepare_objective(
        recipe.objective, base, adapter, (data.train, data.eval), recipe.data_seed, opened.max_length
    )
    recipe = recipe.model_copy(update={"objective": objective})
    exam = sample_exam(recipe, base, data, observer.on_notice)
    observer.on_stage("planning the memory")
    memory = unfinished.memory() if unfinished is not None else None
    memory = memory or least_memory(memory_of(base, recipe.train, data))
    steps = steps_of(data, recipe.train, memory)
    facts = {**_facts(recipe, base, adapter, data, steps), "start": opened.start, "reference": reference}
    facts["engine"] = opened.engine.name
    observer.on_plan(facts, data.reports, data.examples, len(row_groups(data.eval)))
    for note in base.notes:
        observer.on_notice(note)
    if opened.start is not None and (dropout := opened.start.get("dropout")):
        observer.on_notice(
            f"the adapter was trained with dropout {dropout:g}, and is trained further without: {objective.name} compares with a reference"
        )
    for finding in findings:
        shown_already = finding.name == "rows" or (finding.name == "held out" and not data.eval)
        if finding.status == "note" and not shown_already:
            observer.on_notice(f"{finding.name}: {finding.message}")
    if unfinished is not None and processes.first:  # who has its folder
        unfinished.check(recipe, facts, data.plain()["files"], observer.on_notice)
        if memory.frozen_cache_bytes and recipe.train.keeps_frozen_outputs and FrozenLayerCache(base.model, 0).lowest:
            observer.on_notice("the cache of frozen layers' outputs starts empty: results may differ by rounding from here on")
        observer.on_notice(f"resuming {unfinished.folder} after step {unfinished.step} of {len(steps)}")
    return PreparedRun(recipe, base, adapter, data, steps, facts, findings, exam, opened.engine)


def open_recipe(
    recipe: Recipe, moment: datetime | None = None, on_stage: Callable[[str], None] = lambda _: None
) -> OpenedRecipe:
    """Load base and data, and attach the adapter. Raises TrimtabError, of many kinds.

    Args:
        moment: What a template writes as today's date; now unless given.
        on_stage: Is told what is being done.
    """
    on_stage("reading the recipe and the first examples")
    locate_model(recipe.model.name)
    for tracker in recipe.track:
        tracker.check_available()
    recipe.train.optimizer.check_available(resolve_device(recipe.model))
    recipe, start = with_start(recipe)
    engine = _engine(recipe)
    check_first_examples(recipe.data, recipe.objective.data_kind)
    on_stage(f"loading {recipe.model.name}")
    base = Base.load(engine.place(recipe.model), on_stage)
    engine.check_base(base)
    base.moment = datetime.fromisoformat(processes.told_by_first((moment or base.moment).isoformat))
    base.add_tokens(recipe.method.new_tokens)
    positions, context = recipe.method.virtual_token_count, base.context_length
    if context is not None and positions > context - 2:
        raise RecipeError(
            f"method.tokens: {positions:,} virtual tokens leave no room for examples in the {context:,} tokens of {base.source}'s context. "
            "Use fewer."
        )
    with ThreadPoolExecutor(max_workers=1) as background:  # hashing the weights beside tokenizing the data
        fingerprint = background.submit(lambda: base.fingerprint)
        ensure_checked(base.model)
        context = base.context_length  # which the check may have lowered
        on_stage("reading and tokenizing the data")
        # By absolute paths, as the run's recipe.yaml has them, so that its held-out examples are found again.
        with processes.first_here_first():
            config, kind = recipe.absolute().data, recipe.objective.data_kind
            data = load_data(config, base, context, recipe.data_seed, kind, positions=positions, on_stage=on_stage)
        on_stage("hashing the base model")
        fingerprint.result()
    if start is None:
        adapter = attach(base.model, recipe.method, recipe.train.seed, sample=sample(base, data.train))
    else:
        adapter = load_adapter(base, start["folder"])
        if "dropout" in start:
            _switch_dropout_off(adapter)
    agree_on_files(base, data)
    for parameter in adapter.parameters().values():  # a decomposition may differ by machine
        processes.from_first_(parameter.data)
    engine.prepare(base, adapter, recipe.model)
    return OpenedRecipe(recipe, start, engine, base, adapter, data, context - positions if context is not None else None)


def _engine(recipe: Recipe) -> Engine:
    """The engine that the recipe means here. Raises RecipeError if it cannot train what the recipe asks for."""
    engine = recipe.distributed.choose(recipe.model, recipe.method)
    engine.check(recipe.model, recipe.method, recipe.objective, recipe.train)
    if recipe.certify and engine.shards_base:
        refuse_uncertifiable(recipe.model)
    processes.equal_passes = False  # until the base is divided
    return engine


def with_start(recipe: Recipe) -> tuple[Recipe, dict[str, Any] | None]:
    """The recipe with the method of the adapter that it starts from, and what that adapter is; or as it is, and None.

    Raises:
        RecipeError: There is no such adapter, or the recipe asks for another method.
        ArtifactError: It is damaged.
    """
    if recipe.start is None:
        return recipe, None
    folder = adapter_folder(recipe.start)
    if folder is None:
        path = files.expand_user(recipe.start).absolute()
        elsewhere = ", and the hub has no adapter of that name" if is_hub_name(recipe.start) else ""
        raise RecipeError(f"start: {recipe.start} is no run or adapter folder (looked in {path}{elsewhere}).")
    stored = read_adapter(folder)
    method, _ = read_method(stored)
    asked = "method" in recipe.model_fields_set
    compares = isinstance(recipe.objective, ReferenceObjective) and not (asked and recipe.method == method)
    dropout = getattr(method, "dropout", 0.0) if compares else 0.0
    if dropout:  # it would be noise in the comparison
        method = method.model_copy(update={"dropout": 0.0})
    if asked and recipe.method != method:
        raise RecipeError(
            f"method: the adapter in {recipe.start}, which training starts from, has another ({method.plain()}). Leave out method, or start."
        )
    start = {
        "folder": str(folder.absolute()),
        "weights": files.sha256_file(folder / stored.weights),
        "trained": stored.trained,
        **({"dropout": dropout} if dropout else {}),
    }
    if (pinned := pinned_name(folder)) is not None:
        start["hub"] = pinned
    return recipe.model_copy(update={"method": method}), start


def _switch_dropout_off(adapter: Attached) -> None:
    """Let an adapter that was loaded be trained further by the same method without dropout."""
    adapter.method = adapter.method.model_copy(update={"dropout": 0.0})
    for layer in adapter.layers.values():
        base = set(layer.base.modules())
        for module in layer.modules():
            if isinstance(module, nn.Dropout) and module not in base:
                module.p = 0.0


def prepare_objective(
    objective: Objective, base: Base, adapter: Attached, rows: tuple[Rows, Rows], seed: int, max_length: int | None
) -> tuple[Objective, tuple[Rows, Rows], dict[str, Any] | None]:
    """The objective with what the rows decide; the rows with what it needs; and what its reference model is, as JSON data.

    Args:
        adapter: As it is when training starts.
        rows: To train on, and held out.
        max_length: The most tokens that a mismatched answer and its prompt may have.

    Raises:
        DataError: It can't be trained on these rows.
        RecipeError: There is no such reference, or the adapter has dropout.
        WrongReference: What training starts from is not the reference, where it should be.
    """
    objective = objective.resolve_auto(rows[0])
    if isinstance(objective, ReferenceObjective) and getattr(adapter.method, "dropout", False):
        raise RecipeError(
            f"method.dropout: {objective.name} compares with a reference model, and dropout would add noise to the difference. Set it to 0."
        )
    train, held_out = (with_mismatched(part, seed, max_length) if part and objective.estimates_kl else part for part in rows)
    if not isinstance(objective, ReferenceObjective):
        return objective, (train, held_out), None
    referred = add_reference_logprobs(base, adapter, objective.reference, [*train, *held_out], PACK_TOKENS)
    train, held_out = referred.rows[: len(train)], referred.rows[len(train) :]
    facts = referred.facts
    if facts["kind"] == "start" or (facts["kind"] == "base" and not adapter.trained and adapter.method.identity_at_init):
        first = [train[n] for unit in row_groups(train)[:4] for n in unit]
        facts["start_differs"] = check_start(base, first, PACK_TOKENS)
    return objective, (train, held_out), facts


def _device(device: torch.device) -> str:
    """With the name of the card, on which the last bits depend."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _shared_elsewhere(model: nn.Module) -> int:
    """The numbers of weights that are empty between passes, because processes share them."""
    return sum(math.prod(whole_shape(p)) for p in model.parameters() if not p.numel())


def _facts(
    recipe: Recipe, base: Base, adapter: Attached, data: LoadedData, steps: TrainingSteps | CorpusSteps
) -> dict[str, Any]:
    """What is known before the first step, as JSON data."""
    rate, formula = peak_learning_rate(recipe.train, base, recipe.method, recipe.objective, steps.rows_per_step)
    trained = sum(p.numel() for p in adapter.parameters().values())
    return {
        "base": {"source": base.source, "fingerprint": base.fingerprint},
        "moment": base.moment.isoformat(),
        "method": recipe.method.plain(),
        "objective": recipe.objective.plain(),
        "trainable_parameters": trained,
        "left_frozen": recipe.method.left_frozen(base.model),
        "positions": recipe.method.virtual_token_count,
        "base_parameters": base.model.num_parameters() + _shared_elsewhere(base.model) - trained,
        "steps": len(steps),
        "max_steps": recipe.train.max_steps,
        "epochs": steps.epochs,
        "rows_per_step": steps.rows_per_step,
        "memory": steps.memory.summary,
        "plan": steps.memory.plain(),
        "threads": threads(),
        "processes": processes.size,
        "device": _device(base.device),
        "dtype": base.config.dtype,
        "peak_lr": rate,
        "lr_formula": formula,
        "learned_tokens": data.target_tokens,
        "data_digest": data.digest,
        "sources": {name: share.plain() | {"words": str(share)} for name, share in data.shares.items()},
        "versions": versions(),
    }
