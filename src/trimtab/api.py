"""The Python API: the steps of a run as functions, for a model in memory or one loaded by name."""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.base import Base, Message, ModelConfig
from trimtab.core.determinism import deterministic
from trimtab.core.errors import DataError, RecipeError
from trimtab.data import DataConfig, Kind, Objects, Source, load_rows, tokenize_prompt
from trimtab.data.example import TokenRow
from trimtab.engine import Ended, Generation, GrowingText, before_stop, ensure_exact, generate, possible_stop, stream_tokens
from trimtab.methods import Attached, Method, max_row_length
from trimtab.objectives import Objective
from trimtab.objectives.sft import SFT
from trimtab.run.start import prepare_objective
from trimtab.train import Step, TrainConfig, TrainingSteps, noise_problem, peak_learning_rate, plan_training_memory, train


def load(name: str, **settings: Any) -> Base:
    """Load a base model by name: a folder, a GGUF file, a hub name, or `smollm2-135m-instruct`.

    Args:
        settings: `dtype` and `device`, as in a recipe's `model`.
    """
    return Base.load(ModelConfig(name=name, **settings))


def method(name: str, **hyperparameters: Any) -> Method:
    """A method by its name in a recipe, such as "prefix"; `trimtab methods` lists them. Raises RecipeError."""
    return Method.member(name)(**hyperparameters)


def rows(source: Any, base: Base, kind: Kind = "answers", *, seed: int = 0, **settings: Any) -> list[TokenRow]:
    """Every example of a data source as a token row with its target tokens.

    Args:
        source: A file, folder or dataset on the hub by its path or name; a list of dicts; or a `datasets.Dataset` or `IterableDataset`.
        kind: What the objective trains on: `answers`, `pairs` or `judged`.
        seed: Decides which examples a `limit` leaves.
        settings: As in a recipe's `data` (`columns`, `max_length`, `overlong`, `duplicates`, `bad_rows`, …); and as of a source there:
            `subset`, `split`, `revision` and `limit`, of which objects in memory have the last alone.

    Raises:
        DataError: It can't be read, or has examples that can't be used.
        RecipeError: It is nothing of that kind, or there is no such setting.
    """
    own: dict[str, Any] = {key: settings.pop(key) for key in ("subset", "split", "revision", "limit") if key in settings}
    config = DataConfig(train=("rows",), eval=0, **settings)
    given = Source(path=str(source), **own) if isinstance(source, str | Path) else _objects(source, own)
    return load_rows(given, config, base, base.context_length, seed, kind)


def _objects(source: Any, own: dict[str, Any]) -> Objects:
    """Rows in memory as a source. Raises RecipeError for what is none."""
    if isinstance(source, Mapping):  # a DatasetDict is one, too
        names = ", ".join(map(str, source))
        raise RecipeError(
            f"rows: {type(source).__name__} with {names} is a mapping: choose one of its values, for example the split ['train'], or give "
            "a list of dicts, one for each example."
        )
    if not isinstance(source, Iterable):
        raise RecipeError(f"rows: expected a path, a list of dicts or a dataset, got {type(source).__name__}.")
    if other := own.keys() - {"limit"}:
        raise RecipeError(f"rows: {', '.join(sorted(other))}: objects in memory have no such parts. Choose them beforehand.")
    limit = Source(path="rows", **own).limit  # which checks it
    return Objects(source, "rows" if isinstance(source, list | tuple) else "dataset", limit)


def fit(
    base: Base, adapter: Attached, rows: Sequence[TokenRow], objective: Objective | None = None, **settings: Any
) -> Iterator[Step]:
    """Train an attached adapter on rows; yields after each optimizer step.

    Args:
        settings: As in a recipe's `train`, such as `epochs`, `lr` and `rows_per_step`.
    """
    config, objective = TrainConfig(**settings), objective or SFT()
    if problem := noise_problem(config.neftune, objective):
        raise RecipeError(problem)
    ensure_exact(base.model, rows)
    _check_rows(base, rows)
    most = max_row_length(base.model, base.context_length)
    with deterministic(config.deterministic):
        objective, (rows, _), _ = prepare_objective(objective, base, adapter, (list(rows), []), config.seed, most)
    memory = plan_training_memory(base, config, rows)
    steps = TrainingSteps(rows, config, memory)
    rate, _ = peak_learning_rate(config, base, adapter.method, objective, steps.rows_per_step)
    _ = base.fingerprint  # computed now, for the comparison at the end
    yield from train(base, adapter, objective, steps, config, rate, memory)
    base.check_unchanged()


def _check_rows(base: Base, rows: Sequence[TokenRow]) -> None:
    """Raise DataError for a row with tokens that the model does not have, or longer than its context."""
    most = max_row_length(base.model, base.context_length)
    for row in rows:
        if problem := base.embedding_problem(row.ids):
            raise DataError(f"{row.where}: {problem}.")
        if most is not None and len(row.ids) > most:
            raise DataError(
                f"{row.where}: has more than the {most:,} tokens that the adapter's virtual tokens leave of the context."
            )


def answer(base: Base, question: str | list[Message], *, max_new_tokens: int = 256, **settings: Any) -> str:
    """The model's answer, with its active adapters, to a question or a conversation; `stream` also returns how it ended.

    Args:
        settings: As in a recipe's `eval`: `temperature`, `top_p`, `top_k`, `repetition_penalty`, `stop`, `seed`.
    """
    return "".join(stream(base, question, max_new_tokens=max_new_tokens, **settings))


def answers(base: Base, questions: Sequence[str | list[Message]], *, max_new_tokens: int = 256, **settings: Any) -> list[str]:
    """`answer` to many questions, which are computed together, several times as fast as one by one.

    Raises:
        RecipeError: The model can't take one of them as a prompt, or there are no such settings.
    """
    generation = Generation(**settings)
    prompts = [_prompt(base, [{"role": "user", "content": one}] if isinstance(one, str) else one) for one in questions]
    found = generate(
        base.model, prompts, base.stop_ids, max_new_tokens=max_new_tokens, settings=generation, text_of=base.raw_text
    )
    return [before_stop(base.decode(ids), generation.stop) for ids in found]


def stream(
    base: Base, question: str | list[Message], *, max_new_tokens: int = 256, **settings: Any
) -> Generator[str, None, Ended]:
    """`answer` in pieces of text, each as soon as its characters are complete and can't begin a stop string.

    Returns:
        How it ended: `stopped` at a stop token or string, or cut off at `max_new_tokens` (`length`) or because the model's
        `context` was full.

    Raises:
        RecipeError: The model can't take the conversation as a prompt, or there are no such settings.
    """
    generation = Generation(**settings)
    prompt = _prompt(base, [{"role": "user", "content": question}] if isinstance(question, str) else question)
    tokens = stream_tokens(
        base.model, prompt, base.stop_ids, max_new_tokens=max_new_tokens, settings=generation, text_of=base.raw_text
    )
    text, held = GrowingText(base.decode), ""  # held back: what may be the beginning of a stop string
    while True:
        try:
            held += text.add(next(tokens))
        except StopIteration as end:
            if rest := before_stop(held + text.rest(), generation.stop):
                yield rest
            return end.value
        ready = len(held) - possible_stop(held, generation.stop)
        if ready and before_stop(held, generation.stop) == held:
            yield held[:ready]
            held = held[ready:]


def _prompt(base: Base, messages: list[Message]) -> list[int]:
    """The tokens of the prompt for the next message, as in training."""
    if not base.has_template and len(messages) != 1:
        raise RecipeError(
            f"{base.source} has no chat template: it continues a single text, without a system message or earlier messages."
        )
    ids = tokenize_prompt(messages, base)
    most = max_row_length(base.model, base.context_length)
    if not ids or (most is not None and len(ids) >= most):
        limit = f", and the context of {base.source} has {most:,} for prompt and answer" if ids else ""
        raise RecipeError(f"The prompt has {len(ids):,} tokens{limit}.")
    return ids
