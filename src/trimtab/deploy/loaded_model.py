"""A run folder, an adapter folder or a model, loaded by name as a base model with or without an adapter."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from trimtab.artifacts import is_adapter, is_run, read_adapter, read_record, refuse_uncertified, run_status
from trimtab.artifacts.adapter import MANIFEST, TEMPLATE, TEMPLATES
from trimtab.artifacts.run_folder import ADAPTER, CHECKPOINTS
from trimtab.base import Base, ModelConfig, fit_to_machine, locate_model
from trimtab.core import files
from trimtab.core.errors import ArtifactError, RecipeError
from trimtab.deploy.adapter import load_adapter
from trimtab.deploy.hub_adapter import adapter_on_hub, pinned_name
from trimtab.methods import Attached


@dataclass
class LoadedModel:
    """A base model, and the adapter on it if there is one."""

    base: Base
    adapter: Attached | None
    folder: Path | None
    """The adapter's folder."""
    notes: tuple[str, ...] = ()
    """Messages to show before it is used."""


def adapter_folder(name: str) -> Path | None:
    """The finished adapter of a run or adapter folder, or one on the hub; None if `name` is none of these.

    Raises:
        ArtifactError: The run has none.
    """
    path = files.expand_user(name)
    if not is_run(path):
        return path if is_adapter(path) else adapter_on_hub(name)
    if is_adapter(path / ADAPTER):
        return path / ADAPTER
    saved = _newest_checkpoint(path)
    alternative = f", or use its newest checkpoint: {saved}" if saved else ""
    if read_record(path).get("status") == "done":
        raise ArtifactError(
            f"{path} is a finished run, and its adapter is missing. Restore {path / ADAPTER} from a copy{alternative}."
        )
    raise ArtifactError(f"{path} is a run without a finished adapter. Finish it with the command that trains it{alternative}.")


def _newest_checkpoint(run: Path) -> Path | None:
    """The adapter that a run saved last during training."""
    return next((path for path in sorted(run.glob(f"{CHECKPOINTS}/step-*"), reverse=True) if is_adapter(path)), None)


def _find_adapter(name: str) -> tuple[Path | None, tuple[str, ...]]:
    """The adapter of a run or adapter folder, of an unfinished run its newest checkpoint, and messages about it."""
    path = files.expand_user(name)
    if is_run(path) and not is_adapter(path / ADAPTER):
        record, saved = read_record(path), _newest_checkpoint(path)
        if saved is not None and record.get("status") != "done":
            step = int(saved.name.removeprefix("step-"))
            return saved, (f"{path} is unfinished: this is its adapter after step {step} of {record.get('steps', '?')}.",)
    folder = adapter_folder(name)
    if folder is not None and (pinned := pinned_name(folder)) is not None:
        return folder, (f"the adapter {pinned} of the hub",)
    failures = run_status(path).failures if is_run(path) else []
    return folder, ((f"{path} is not certified. {'; '.join(failures)}.",) if failures else ())


def _refuse_missing_base(source: str, adapter: Path) -> None:
    """Raise RecipeError if the base model that an adapter names is not found."""
    try:
        locate_model(source)
    except RecipeError as error:
        raise RecipeError(
            f"{adapter} was trained on {source}, which is no longer there. Give its new folder: --model FOLDER."
        ) from error


def load_model(name: str, model: str | None = None, *, certified: bool = False, copies: int = 0) -> LoadedModel:
    """Load a model by name; an adapter on its base model in the dtype, quantization and device of its training, if available: what was
    trained on several devices, and has no room on one, is loaded on the CPU, and `notes` says so.

    Args:
        name: A run folder (of an unfinished run, its newest checkpoint is loaded), an adapter folder or one on the hub, or a model
            (see ModelConfig).
        model: The base model to load the adapter on, instead of the one that it names.
        certified: Raise NotCertified for an adapter of a run that is not certified.
        copies: How many copies of the base model in float32 will be made beside it.
    """
    folder, notes = _find_adapter(name)
    if folder is None:
        if model is not None:
            raise RecipeError(f"{name} is not a run or an adapter, so --model {model} does not apply.")
        base = Base.load(ModelConfig(name=name), moves=True, copies=copies)
        return LoadedModel(base, None, None, base.notes)
    if certified:
        refuse_uncertified(folder)
    stored = read_adapter(folder)
    source = model or stored.source
    if not source:
        raise RecipeError(f"{folder} does not name its base model: give it with --model.")
    try:
        config, note = fit_to_machine(ModelConfig.parse({**stored.base.get("model", {}), "name": source}))
    except RecipeError as error:
        raise ArtifactError(f"{folder / MANIFEST}: base.model: {error}") from None
    if model is None:
        _refuse_missing_base(source, folder)
    if stored.chat_template is not None:  # wherever the file of its training is now
        file = TEMPLATE if isinstance(stored.chat_template, str) else TEMPLATES
        config = config.model_copy(update={"chat_template": str(folder / file)})
    base = Base.load(config, moves=True, copies=copies)
    if "moment" in stored.base:  # a chat template that writes the date writes that of training
        base.moment = datetime.fromisoformat(stored.base["moment"])
    return LoadedModel(
        base, load_adapter(base, folder), folder, (*notes, *base.notes, *([f"{folder}: {note}"] if note else []))
    )
