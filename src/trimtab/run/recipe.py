"""The recipe: everything that decides a run's result, in one file that repeats it."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator
from pydantic_core import PydanticCustomError

from trimtab.base import ModelConfig
from trimtab.core import files, yaml12
from trimtab.core.config import Config, as_tuple
from trimtab.data import DataConfig
from trimtab.distributed import Engine
from trimtab.distributed.auto import Auto
from trimtab.evaluate import EvalConfig
from trimtab.methods import Method
from trimtab.methods.lora import LoRA
from trimtab.objectives import Objective, ReferenceObjective
from trimtab.objectives.sft import SFT
from trimtab.track import Tracker
from trimtab.train import TrainConfig, noise_problem


def _named(raw: Any) -> Any:
    return {"name": raw} if isinstance(raw, str) else raw


def _as_trackers(raw: Any) -> Any:
    return (raw,) if isinstance(raw, dict) else as_tuple(raw)


def _as_path(raw: Any) -> Any:
    if not isinstance(raw, str | Path) or not str(raw):
        raise PydanticCustomError("no_path", "a path")
    return files.expand_user(raw)


class Recipe(Config):
    """Everything that decides a run's result."""

    model: Annotated[ModelConfig, BeforeValidator(_named)] = ModelConfig(name="smollm2-135m-instruct")
    """The base model: a folder, a GGUF file, a hub name, or `smollm2-135m-instruct`."""
    data: DataConfig
    """What to train and evaluate on."""
    method: Annotated[SerializeAsAny[Method], BeforeValidator(Method.pick)] = Field(default_factory=LoRA)
    """Which adapter to train."""
    objective: Annotated[SerializeAsAny[Objective], BeforeValidator(Objective.pick)] = Field(default_factory=SFT)
    """The training objective: supervised fine-tuning, or a preference objective."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """How to train."""
    devices: Annotated[int, Field(ge=1)] = 1
    """How many processes train, each on a device of its own (on a CPU, on its share of the cores). With 1, as many as torchrun, accelerate or
    deepspeed have started; docs/scale.md has more."""
    distributed: Annotated[SerializeAsAny[Engine], BeforeValidator(Engine.pick)] = Field(default_factory=Auto)
    """How several processes hold the base model and train together; with one process, all are alike."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """How held-out examples are answered and measured."""
    track: Annotated[
        tuple[Annotated[SerializeAsAny[Tracker], BeforeValidator(Tracker.pick)], ...], BeforeValidator(_as_trackers)
    ] = ()
    """Experiment trackers that show the run's curves: a name, or a list of names or mappings with a name; docs/trackers.md has them."""
    start: str | None = None
    """An adapter or run folder whose adapter is trained further, instead of a new one; its method is used, and need not be given."""
    certify: bool = True
    """Whether a finished run's adapter is loaded in a new process and compared with the trained model and with the base model."""
    resume: Literal["auto", "never"] | Annotated[int, Field(ge=1)] = "auto"
    """Whether an unfinished run of this recipe in `output` is resumed from its newest checkpoint, or refused; or the step of another
    checkpoint to go back to, after which everything is removed and made again."""
    output: Annotated[Path, BeforeValidator(_as_path)] = Path("runs/run")
    """The run's folder."""

    @model_validator(mode="after")
    def _compared_answers_are_trained_on(self) -> Self:
        if self.objective.data_kind != "answers" and self.data.train_on != "assistant":
            raise ValueError(
                f"data.train_on: {self.objective.name} compares or judges answers, so it trains on the last message of each example alone. "
                "Leave it out."
            )
        return self

    @model_validator(mode="after")
    def _a_corpus_is_texts(self) -> Self:
        if self.data.corpus and self.objective.data_kind != "answers":
            raise ValueError(f"data.corpus: {self.objective.name} compares or judges answers, and a corpus is of plain texts.")
        if self.data.corpus and self.eval.samples:
            raise ValueError("eval.samples: the documents of a corpus (data.corpus) are plain texts, which ask for no answers.")
        return self

    @model_validator(mode="after")
    def _something_to_answer(self) -> Self:
        if self.eval.samples and self.objective.data_kind != "answers":
            raise ValueError(
                f"eval.samples: {self.objective.name} compares or judges answers; `trimtab eval RUN --show {self.eval.samples}` shows the "
                "model's beside them."
            )
        if self.eval.samples and self.data.eval == 0:
            raise ValueError("eval.samples: data.eval: 0 holds out no examples that could be answered.")
        return self

    @model_validator(mode="after")
    def _something_to_stop_by(self) -> Self:
        if self.train.patience is not None and self.data.eval == 0:
            raise ValueError(
                "train.patience: it waits for the validation loss to improve, and data.eval: 0 holds out no examples."
            )
        return self

    @field_validator("track")
    @classmethod
    def _each_tracker_once(cls, trackers: tuple[Tracker, ...]) -> tuple[Tracker, ...]:
        names = [tracker.name for tracker in trackers]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} is there twice, and a tracker shows a run once. Leave one out.")
        return trackers

    @property
    def data_seed(self) -> int:
        """The seed of the validation split and of the order of examples."""
        return self.train.seed if self.data.seed is None else self.data.seed

    @model_validator(mode="after")
    def _no_noise_in_comparisons(self) -> Self:
        if problem := noise_problem(self.train.neftune, self.objective):
            raise ValueError(problem)
        return self

    def to_yaml(self) -> str:
        """The recipe with every default written out and every local path absolute, so it repeats the run from anywhere."""
        repeated = self.absolute()
        if isinstance(self.resume, int):  # a step back that was asked for once
            repeated = repeated.model_copy(update={"resume": "auto"})
        return yaml12.dump(repeated.plain())

    def absolute(self) -> "Recipe":
        """The same recipe with every local path absolute."""
        model = self.model.model_copy(update={"name": _absolute(self.model.name)})
        if model.chat_template is not None:
            model = model.model_copy(update={"chat_template": _absolute(model.chat_template)})
        news: dict[str, Any] = {"model": model, "data": self.data.absolute(), "eval": self.eval.absolute()}
        news |= {"output": self.output.absolute(), "distributed": self.distributed.absolute()}
        if self.start is not None:
            news["start"] = _absolute(self.start)
        if isinstance(self.objective, ReferenceObjective) and self.objective.reference not in ("auto", "base", "start"):
            news["objective"] = self.objective.model_copy(update={"reference": _absolute(self.objective.reference)})
        return self.model_copy(update=news)


def _absolute(name: str) -> str:
    path = files.expand_user(name)
    return str(path.absolute()) if path.exists() else name
