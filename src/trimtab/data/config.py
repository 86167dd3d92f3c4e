"""The recipe's section `data`."""

from collections.abc import Mapping
from itertools import chain
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, model_validator

from trimtab.core.config import SHORT, Config, as_tuple
from trimtab.data.column_templates import ColumnTemplate, columns_of
from trimtab.data.example import Column, Overlong, Role, TrainOn
from trimtab.data.read import absolute_source
from trimtab.data.source import Objects, Source

OWN = ("columns", "prompt", "completion")
"""Keys of the section that a source may have of its own."""
READING = ("columns", "prompt", "completion", "system", "drop_system", "ignore", "train_on")
"""Keys of the section that decide how a row is read."""


FEWEST_TOKENS = 16
"""Of a block of a corpus."""
HELD_OUT = 0.001
"""The fraction of the documents of a corpus that is held out, unless data.eval is given."""


def _name(name: str) -> str:
    if name in Source.model_fields:
        raise ValueError(f"{name} is a key of a source, and sources have names here: write {{NAME: {{{name}: …}}}}.")
    if not name.replace("-", "_").isidentifier():
        raise ValueError(f"expected a name of letters, digits, - and _ that begins with a letter, got {name!r}.")
    return name


_NAMED: TypeAdapter[dict[str, Source]] = TypeAdapter(dict[Annotated[str, AfterValidator(_name)], Source])

_LISTED: TypeAdapter[tuple[str, ...]] = TypeAdapter(Annotated[tuple[str, ...], Field(min_length=1)])


def _sources(raw: Any) -> Any:
    """Paths as a tuple; or sources by their names, each of which may be a path alone."""
    if hasattr(raw, "__iter__") and not isinstance(raw, str | list | tuple | Mapping):
        raise ValueError(
            "a recipe names files, so that it repeats a run. Train on objects in memory by trimtab.rows and trimtab.fit, or save them "
            "(save_to_disk) and name the folder."
        )
    if not isinstance(raw, Mapping):
        return _LISTED.validate_python(as_tuple(raw), strict=True)
    if not raw:
        raise ValueError("an empty mapping names no source.")
    if SHORT in raw:
        raise ValueError(f"it is {raw[SHORT]!r} in the recipe, which has no name: give every source one.")
    named = _NAMED.validate_python({name: {"path": value} if isinstance(value, str) else value for name, value in raw.items()})
    weighted = [name for name, source in named.items() if source.weight is not None]
    if weighted and len(weighted) < len(named):
        other = next(name for name in named if name not in weighted)
        raise ValueError(f"{weighted[0]} has a weight, and {other} has none: give one to every source, or to none.")
    return named


def _train_on(raw: Any) -> Any:
    if isinstance(raw, str) and raw in ("assistant", "last", "everything"):
        return raw
    roles = as_tuple(raw)
    if not isinstance(roles, tuple) or not roles or any(role not in get_args(Role) for role in roles):
        known = ", ".join(get_args(Role))
        raise ValueError(f"expected assistant, last, everything, or a list of the roles {known}; got {raw!r}.")
    return roles


def _held_out(raw: Any) -> Any:
    if isinstance(raw, Mapping):
        named = _sources(raw)
        if any(source.weight is not None for source in named.values()):
            raise ValueError("weight: validation examples are all evaluated, once. Leave it out.")
        return named
    if isinstance(raw, float) and raw > 1 and raw % 1:
        raise ValueError(f"expected a fraction below 1 or a whole count, got {raw}.")
    return int(raw) if isinstance(raw, float) and raw >= 1 else raw


class DataConfig(Config):
    """What to train on."""

    train: Annotated[tuple[str, ...] | dict[str, Source], BeforeValidator(_sources)]
    """Files (JSON, JSONL, CSV, TSV, Parquet; or plain text, TXT and MD, a document each), patterns such as data/*.jsonl, folders, or
    datasets on the hub (`org/name` or `org/name:split`); several are joined. Or sources by name, {NAME: source}, each a path or a
    mapping with the keys below: they may have weights and limits, and are reported by name."""
    eval: Annotated[
        str | Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0)] | dict[str, Source], BeforeValidator(_held_out)
    ] = 0.05
    """Validation examples: another file, a fraction of the training examples (below 1), a count of them, or 0 for none; of named
    sources, each gives its part. Or sources by name, as in `train`. The loss is also reported for each named source."""
    corpus: bool = False
    """Plain texts that need not fit into memory: they are tokenized once, into the cache, and trained on in blocks of `max_length` tokens that
    lie across documents; `overlong` does not apply. A step's examples are blocks, those held out are documents, one in a thousand unless
    `eval` is given. See docs/scale.md."""
    columns: dict[Column, str] = Field(default={})
    """Trimtab's name of a column: your file's name of it; for example {prompt: question, completion: answer}."""
    prompt: ColumnTemplate | None = None
    """A prompt that is written from columns: a text with their names in braces, such as "Translate: {source}". Numbers, lists and objects
    are written as JSON has them; {{ is a brace. Without `completion`, the completion (or chosen and rejected) is a column as usual."""
    completion: ColumnTemplate | None = None
    """The same for the completion, such as "{target}"."""
    system: Annotated[str, Field(min_length=1)] | None = None
    """The system message of examples that have none."""
    drop_system: bool = False
    """Whether the examples' own system messages are left out; with `system`, it stands in their place."""
    train_on: Annotated[TrainOn, BeforeValidator(_train_on)] = "assistant"
    """What is trained on of a conversation: every turn of the assistant's, the `last` one alone, `everything` that the chat template writes,
    or the turns of these roles, such as [user, assistant, tool]: what they say, and the token that ends them. A `prompt` (of prompt and
    completion) is context for `assistant` and `last`. A message's own `weight` (in the loss; 0: not trained on) overrides this; Axolotl's
    `train` and ms-swift's `loss` (true or false) are read as weights. Plain texts are trained on whole."""
    ignore: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """Columns, and keys of messages, to ignore; without this, those that would be lost are an error."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """The most tokens an example may have; the model's context length unless set."""
    overlong: Overlong = "refuse"
    """What happens to a longer example. A truncated one teaches the model to stop mid-sentence, or never; dropped ones are left out, and
    counted. `split` cuts a plain text into blocks of at most so many tokens, each token a target once; conversations can't be split."""
    duplicates: Literal["keep", "remove"] = "keep"
    """Whether examples that repeat an earlier one exactly, token by token, are trained on again or removed, and counted. A training
    example that is also a validation example is removed, too."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Of the validation split, of samples of sources, and of the order of examples; `train.seed` unless given."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """Whether examples that can't be used stop the run before it starts, or are left out and listed in the run's data.json."""

    @property
    def train_sources(self) -> dict[str, tuple[Source, ...]]:
        """The training sources by name; those of a list have none, and stand together under an empty one."""
        return _by_name(self.train)

    @property
    def eval_sources(self) -> dict[str, tuple[Source, ...]]:
        """The validation sources by name; none if validation examples are held out of the training sources."""
        return _by_name((self.eval,) if isinstance(self.eval, str) else self.eval if isinstance(self.eval, dict) else ())

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each training source; none where all examples are trained on once an epoch."""
        named = self.train if isinstance(self.train, dict) else {}
        return {name: source.weight for name, source in named.items() if source.weight is not None}

    @model_validator(mode="before")
    @classmethod
    def _less_of_a_corpus_is_held_out(cls, raw: Any) -> Any:
        return {"eval": HELD_OUT, **raw} if isinstance(raw, dict) and raw.get("corpus") is True else raw

    @model_validator(mode="after")
    def _a_corpus_is_texts(self) -> Self:
        if not self.corpus:
            return self
        if self.duplicates == "remove":
            raise ValueError(
                "duplicates: those of a corpus are not searched for, because all texts would have to be remembered."
            )
        if self.overlong in ("truncate", "drop"):
            raise ValueError(
                f"overlong: {self.overlong}: the texts of a corpus are cut into blocks where these are full. Leave it out."
            )
        if self.max_length is not None and self.max_length < FEWEST_TOKENS:
            raise ValueError(f"max_length: the blocks of a corpus have at least {FEWEST_TOKENS} tokens.")
        if templates := [*self.templates, *(key for s in chain(*self.train_sources.values()) for key in self.of(s).templates)]:
            raise ValueError(
                f"{templates[0]}: a corpus is of plain texts, which have no prompt. Name their column: columns.text."
            )
        return self

    @model_validator(mode="after")
    def _templates_are_alone(self) -> Self:
        for source in (*chain(*self.train_sources.values()), *chain(*self.eval_sources.values())):
            own = self.of(source)
            for name, template in own.templates.items():
                if name in own.columns:
                    raise ValueError(f"data.{name} and data.columns.{name} both say what the {name} is: keep one of them.")
                if ignored := sorted(columns_of(template) & set(self.ignore)):
                    raise ValueError(
                        f"data.ignore leaves out {ignored[0]}, which data.{name} reads: take it out of one of them."
                    )
        return self

    @property
    def templates(self) -> dict[str, str]:
        """Name of a column -> the template that writes it."""
        written = {"prompt": self.prompt, "completion": self.completion}
        return {name: template for name, template in written.items() if template is not None}

    def of(self, source: Source | Objects) -> "DataConfig":
        """These settings, with the source's own in their place."""
        own = {key: value for key in OWN if (value := getattr(source, key)) is not None}
        return self.model_copy(update=own)

    @property
    def reading(self) -> dict[str, Any]:
        """What decides how a row is read, as JSON data."""
        return {key: value for key, value in self.plain().items() if key in READING}

    def absolute(self) -> "DataConfig":
        """The same with every local path absolute."""
        return self.model_copy(update={"train": _absolute(self.train), "eval": _absolute(self.eval)})


def _by_name(sources: tuple[str, ...] | dict[str, Source]) -> dict[str, tuple[Source, ...]]:
    if isinstance(sources, dict):
        return {name: (source,) for name, source in sources.items()}
    return {"": tuple(Source(path=path) for path in sources)} if sources else {}


def _absolute(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: source.model_copy(update={"path": absolute_source(source.path)}) for name, source in value.items()}
    if isinstance(value, tuple):
        return tuple(map(absolute_source, value))
    return absolute_source(value) if isinstance(value, str) else value
