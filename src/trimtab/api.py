"""The Python door: the steps of a run as functions, for a model that you hold already or one loaded by name."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

from trimtab.base import Base, Message, ModelConfig
from trimtab.core.errors import DataError, RecipeError
from trimtab.data import DataConfig, Kind, load_data, prompt_of
from trimtab.data.example import TokenRow
from trimtab.engine import Ended, check_packing, stream_tokens
from trimtab.methods import Attached, Method, room
from trimtab.objectives import Objective
from trimtab.objectives.sft import SFT
from trimtab.run.start import prepare_objective
from trimtab.train import Step, TrainConfig, TrainingSteps, peak_learning_rate, plan_training_memory, train


def load(name: str, **settings: Any) -> Base:
    """Load a base by name: a folder, a GGUF file, a hub name, or `smollm2-135m-instruct`.

    Args:
        settings: `dtype` and `device`, as in a recipe's `model`.
    """
    return Base.load(ModelConfig(name=name, **settings))


def method(name: str, **hyperparameters: Any) -> Method:
    """A method by the name it has in a recipe, such as "prefix"; `trimtab methods` lists them. Raises RecipeError."""
    return Method.member(name)(**hyperparameters)


def rows(source: str, base: Base, kind: Kind = "answers", **settings: Any) -> list[TokenRow]:
    """Every row of a data source as tokens with labels.

    Args:
        kind: What the objective learns from: `answers`, `pairs` or `judged`.
        settings: `columns`, `max_length`, `overlong` and `bad_rows`, as in a recipe's `data`.

    Raises:
        DataError: It can't be read, or holds rows that can't be used.
    """
    config = DataConfig(train=(source,), eval=0.0, **settings)
    return load_data(config, base, base.context_length, seed=0, kind=kind).train


def fit(
    base: Base, adapter: Attached, rows: Sequence[TokenRow], objective: Objective | None = None, **settings: Any
) -> Iterator[Step]:
    """Train an attached adapter on rows; yields after each optimizer step.

    Args:
        settings: As in a recipe's `train`, such as `epochs`, `lr` and `rows_per_step`.
    """
    config = TrainConfig(**settings)
    _check_rows(base, rows)
    check_packing(base.model)
    most = room(base.model, base.context_length)
    objective, (rows, _), _ = prepare_objective(objective or SFT(), base, adapter, (list(rows), []), config.seed, most)
    memory = plan_training_memory(base, config, rows)
    steps = TrainingSteps(rows, config, memory)
    rate, _ = peak_learning_rate(config, base, adapter.method, objective, steps.rows_per_step)
    _ = base.fingerprint  # taken now, to be compared with afterwards
    yield from train(base, adapter, objective, steps, config, rate, memory)
    base.check_unchanged()


def _check_rows(base: Base, rows: Sequence[TokenRow]) -> None:
    strange = next((f"{row.where}: {words}." for row in rows if (words := base.unembedded(row.ids))), None)
    if strange is not None:
        raise DataError(strange)
    most = room(base.model, base.context_length)
    long = [row.where for row in rows if most is not None and len(row.ids) > most]
    if long:
        raise DataError(f"{long[0]}: has more than the {most:,} tokens that the adapter's virtual tokens leave of the context.")


def answer(
    base: Base, question: str | list[Message], *, max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0
) -> str:
    """What the model, with the adapter that is on it, answers to a question or a conversation; `stream` says how it ended."""
    return "".join(stream(base, question, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed))


def stream(
    base: Base, question: str | list[Message], *, max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0
) -> Generator[str, None, Ended]:
    """`answer` in pieces of text, each as soon as its characters are whole.

    Returns:
        How it ended: `stopped` by itself, or cut off at `max_new_tokens` (`length`) or where the model's `context` is full.

    Raises:
        RecipeError: This model can't be asked that.
    """
    prompt = _prompt(base, [{"role": "user", "content": question}] if isinstance(question, str) else question)
    ended: Ended = "length"

    def tokens() -> Iterator[int]:
        nonlocal ended
        ended = yield from stream_tokens(
            base.model, prompt, base.stop_ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )

    yield from _pieces(base, tokens())
    return ended


def _pieces(base: Base, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens, as they come. What a token adds depends on the one before it, but not on the whole answer."""
    ids: list[int] = []
    first, said = 0, 0  # tokens from which on the text is looked at, and those of them that have been said
    for token in tokens:
        ids.append(token)
        before, now = base.decode(ids[first:said]), base.decode(ids[first:])
        if len(now) > len(before) and not now.endswith("\ufffd"):  # half of a character of several tokens
            yield now[len(before) :]
            first, said = said, len(ids)
    yield base.decode(ids[first:])[len(base.decode(ids[first:said])) :]


def _prompt(base: Base, messages: list[Message]) -> list[int]:
    """The tokens that ask for the next message, as training has them."""
    if not base.has_template and len(messages) != 1:
        raise RecipeError(
            f"{base.source} has no chat template: it continues one text, and takes no system message and no earlier messages."
        )
    ids = prompt_of(messages, base)
    most = room(base.model, base.context_length)
    if not ids or (most is not None and len(ids) >= most):
        limit = f", and {base.source} was made for {most:,} with the answer" if ids else ""
        raise RecipeError(f"The prompt has {len(ids):,} tokens{limit}.")
    return ids
