"""What a command is given: a run folder, an adapter folder, or a model; turned into a base with or without an adapter."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from trimtab.artifacts import is_adapter, is_run, read_adapter, read_record, refuse_uncertified, standing
from trimtab.artifacts.adapter import MANIFEST
from trimtab.artifacts.run_folder import ADAPTER, CHECKPOINTS
from trimtab.base import Base, ModelConfig, fit_to_machine, locate_model
from trimtab.core import files
from trimtab.core.errors import ArtifactError, RecipeError
from trimtab.deploy.adapter import load_adapter
from trimtab.methods import Attached


@dataclass
class Target:
    """A base, and the adapter on it if there is one."""

    base: Base
    adapter: Attached | None
    folder: Path | None
    """The adapter's folder."""
    notes: tuple[str, ...] = ()
    """What to say of it before it is used."""


def adapter_folder(name: str) -> Path | None:
    """The finished adapter that a run or adapter folder stands for; None if `name` is neither. Raises ArtifactError."""
    path = files.expanded(name)
    if not is_run(path):
        return path if is_adapter(path) else None
    if is_adapter(path / ADAPTER):
        return path / ADAPTER
    saved = _newest(path)
    other = f", or name the adapter that it saved last: {saved}" if saved else ""
    if read_record(path).get("status") == "done":
        raise ArtifactError(
            f"{path} is a finished run, and its adapter is missing. Restore {path / ADAPTER} from a copy{other}."
        )
    raise ArtifactError(f"{path} is a run without a finished adapter. Finish it with the command that trains it{other}.")


def _adapter(name: str) -> tuple[Path | None, tuple[str, ...]]:
    """The adapter that a run or adapter folder stands for, finished or not, and what to say of it."""
    path = files.expanded(name)
    if not is_run(path) or is_adapter(path / ADAPTER):
        failed = standing(path).words_of("failed") if is_run(path) else []
        return adapter_folder(name), ((f"{path} is not certified. {'; '.join(failed)}.",) if failed else ())
    run, saved = read_record(path), _newest(path)
    if saved is None or run.get("status") == "done":
        return adapter_folder(name), ()
    step = int(saved.name.removeprefix("step-"))
    return saved, (f"{path} has not ended: this is its adapter after step {step} of {run.get('steps', '?')}.",)


def _newest(run: Path) -> Path | None:
    """The adapter that a run saved last on its way."""
    return next((path for path in sorted(run.glob(f"{CHECKPOINTS}/step-*"), reverse=True) if is_adapter(path)), None)


def _refuse_moved(source: str, adapter: Path) -> None:
    """Raise RecipeError if the base that an adapter names is not where it was."""
    try:
        locate_model(source)
    except RecipeError as error:
        raise RecipeError(
            f"{adapter} was trained on {source}, and there is none any more. Say where it is now: --model FOLDER."
        ) from error


def open_target(name: str, model: str | None = None, *, certified: bool = False) -> Target:
    """Load what `name` stands for; an adapter on its base as that was held when it was trained, if its device is here.

    Args:
        name: A run folder (of one that has not ended, the adapter that it saved last is taken), an adapter folder, or anything
            that is a model (see ModelConfig).
        model: The base to put the adapter on, instead of the one that it names.
        certified: Raise NotCertified for an adapter of a run that is not certified.
    """
    folder, notes = _adapter(name)
    if folder is None:
        if model is not None:
            raise RecipeError(f"{name} is not a run or an adapter folder, so --model {model} says nothing about it.")
        return Target(Base.load(ModelConfig(name=name)), None, None)
    if certified:
        refuse_uncertified(folder)
    stored = read_adapter(folder)
    source = model or stored.source
    if not source:
        raise RecipeError(f"{folder} does not say which base it was trained on: give it with --model.")
    try:
        config, other = fit_to_machine(ModelConfig.parse({**stored.base.get("model", {}), "name": source}))
    except RecipeError as error:
        raise ArtifactError(f"{folder / MANIFEST}: base.model: {error}") from None
    if model is None:
        _refuse_moved(source, folder)
    base = Base.load(config)
    if "moment" in stored.base:  # a template that writes the date writes that of the training
        base.moment = datetime.fromisoformat(stored.base["moment"])
    return Target(base, load_adapter(base, folder), folder, (*notes, *([f"{folder}: {other}"] if other else [])))
