"""Answers to all prompts of a file, written as they come: an interrupted file goes on where it stopped, to the same answers."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from trimtab.artifacts import is_run, sha256_tensor
from trimtab.artifacts.run_folder import RECIPE
from trimtab.core import files
from trimtab.core.errors import DataError, RecipeError, listing
from trimtab.core.locks import file_lock
from trimtab.data import DataConfig
from trimtab.data.example import InvalidExample, RejectedExample
from trimtab.deploy import LoadedModel
from trimtab.engine import Generation, before_stop, generate
from trimtab.evaluate.answers import BATCH
from trimtab.evaluate.prompts import Prompt, prompt_source, prompts_of, tokenize_question
from trimtab.methods import max_row_length
from trimtab.run.evaluation import READING, answering_of, split_words
from trimtab.run.recipe import Recipe

MOST_NEW_TOKENS = 512
"""Of an answer, unless eval.max_new_tokens says otherwise."""
GENERATING = tuple(f"eval.{key}" for key in (*Generation.model_fields, "max_new_tokens"))
UNFINISHED, SETTINGS, LOCK = ".unfinished", ".settings.json", ".lock"
"""What is added to the output's name while it is made."""
BAD_ROWS = "data.bad_rows"


@dataclass
class Answering:
    """What is asked, and how it is answered."""

    data: DataConfig
    settings: Generation
    max_new_tokens: int
    base: bool = False
    """The base model without the adapter answers, too."""


def answering_from(target: Path, source: str, words: Sequence[str], *, base: bool = False) -> Answering:
    """As a run's recipe says, unless words (key=value) say otherwise. Raises RecipeError."""
    reading, answering = split_words(words, (*READING, BAD_ROWS), GENERATING, "answer")
    config = answering_of(target, answering, lambda _: None)
    most = MOST_NEW_TOKENS if config.max_new_tokens == "auto" else config.max_new_tokens
    if is_run(target):
        data = Recipe.read(target / RECIPE, [*reading, *([] if f"{BAD_ROWS}=skip" in reading else [f"{BAD_ROWS}=stop"])]).data
    else:
        data = DataConfig.parse({"train": source}, [word.removeprefix("data.") for word in reading], "data:")
    settings = Generation(**{key: getattr(config, key) for key in Generation.model_fields})
    return Answering(prompt_source(source, data), settings, most, base)


@dataclass
class Counts:
    """What became of the prompts of a file."""

    prompts: int = 0
    unusable: int = 0
    kept: int = 0
    """Answers that an interrupted command had written before."""
    cut_off: int = 0
    """Of those that were written now."""


def check_prompts(target: LoadedModel, answering: Answering) -> tuple[Counts, str]:
    """How many prompts there are, and a digest of them: all are read and tokenized before the first one is answered.

    Raises:
        DataError: Some can't be used, unless data.bad_rows is skip; or none can.
    """
    counts, digest, problems = Counts(), hashlib.sha256(), list[str]()
    for row in _tokenized(target, answering):
        counts.prompts += 1
        if isinstance(row, RejectedExample):
            counts.unusable += 1
            problems += [f"{row.where}: {row.reason}"] if len(problems) < 6 else []
            digest.update(repr(row).encode())
        else:
            digest.update(repr((row[0].where, row[0].expected, row[1])).encode())
    if counts.unusable == counts.prompts or (counts.unusable and answering.data.bad_rows == "stop"):
        rest = f"\n  … {counts.unusable} in all" if counts.unusable > len(problems) else ""
        raise DataError(
            f"data: prompts that can't be answered:\n{listing(problems, 6)}{rest}\n"
            "With data.bad_rows=skip, the others are answered, and the output says what is wrong with these."
        )
    return counts, digest.hexdigest()


def _tokenized(target: LoadedModel, answering: Answering) -> Iterator[tuple[Prompt, list[int]] | RejectedExample]:
    base = target.base
    most = max_row_length(base.model, base.context_length)
    for prompt in prompts_of(answering.data):
        if isinstance(prompt, RejectedExample):
            yield prompt
            continue
        try:
            yield prompt, tokenize_question(prompt, base, most)
        except InvalidExample as invalid:
            yield RejectedExample(prompt.where, str(invalid))


def answer_file(
    target: LoadedModel, answering: Answering, output: Path, digest: str, on_done: Callable[[int], None] = lambda _: None
) -> Counts:
    """Write an answer to every prompt into a new file of JSON lines, in their order, or go on with one that is not finished.

    Args:
        digest: Of the prompts, from `check_prompts`.
        on_done: Is called with the number of prompts in each finished batch.

    Raises:
        StorageError: The file exists, or can't be written.
        RecipeError: An unfinished one is there that was made otherwise.
        KeyboardInterrupt: With a message; what is answered stays, and the same call goes on.
    """
    files.refuse_existing(output)
    unfinished, settings, lock = (output.with_name(output.name + added) for added in (UNFINISHED, SETTINGS, LOCK))
    with file_lock(lock, "writing answers"):
        files.refuse_existing(output)  # another process may have finished it meanwhile
        counts = Counts(kept=_resume(unfinished, settings, _identity(target, answering, digest)))
        on_done(counts.kept)
        try:
            _answer_rest(target, answering, unfinished, counts, on_done)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{counts.kept + counts.prompts:,} answers are in {unfinished}; the same command goes on from there"
            ) from None
        files.finish_file(unfinished, output)
        files.remove_file(settings)
    files.remove_file(lock)
    return counts


def _identity(target: LoadedModel, answering: Answering, digest: str) -> dict[str, Any]:
    """All that decides the answers."""
    adapter = target.adapter.state() if target.adapter is not None else {}
    return {
        "model": target.base.fingerprint,
        "adapter": files.json_digest({name: sha256_tensor(tensor) for name, tensor in adapter.items()}),
        "prompts": digest,
        "eval": answering.settings.plain() | {"max_new_tokens": answering.max_new_tokens},
        "base": answering.base,
    }


def _resume(unfinished: Path, settings: Path, identity: dict[str, Any]) -> int:
    """The number of lines that an interrupted command has written. Raises RecipeError if it would have written others."""
    if not (settings.exists() and unfinished.exists()):
        files.write_text(unfinished, "")
        files.write_json(settings, identity)  # the last, so that where it is, the other is
        return 0
    before = files.read_json(settings)
    if different := [key for key in identity if before.get(key) != files.to_json(identity[key])]:
        raise RecipeError(
            f"{unfinished} was begun with another {', '.join(different)}: give the same command to go on with it, remove it and {settings}, or "
            "give another --output."
        )
    return files.drop_incomplete_line(unfinished)


def _answer_rest(
    target: LoadedModel, answering: Answering, unfinished: Path, counts: Counts, on_done: Callable[[int], None]
) -> None:
    """Answer batch by batch, of the same prompts in every attempt: what a prompt stands beside may move its last bits."""
    start = counts.kept // BATCH * BATCH
    rows = islice(_tokenized(target, answering), start, None)
    for first in count(start, BATCH):
        if not (batch := list(islice(rows, BATCH))):
            return
        lines = _answered(target, answering, batch, first)[max(counts.kept - first, 0) :]
        files.append_line(unfinished, "\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
        counts.prompts += len(lines)
        counts.unusable += sum("error" in line for line in lines)
        counts.cut_off += sum(line.get("ended", "stopped") != "stopped" for line in lines)
        on_done(len(lines))


def _answered(
    target: LoadedModel, answering: Answering, batch: Sequence[tuple[Prompt, list[int]] | RejectedExample], first: int
) -> list[dict[str, Any]]:
    """The lines of a batch."""
    asked = [row[1] for row in batch if not isinstance(row, RejectedExample)]
    ours = iter(_generate(target, answering, asked, first))
    theirs: Iterator[dict[str, str]] = iter(())
    if answering.base and target.adapter is not None:
        with target.adapter.disabled():
            theirs = iter(_generate(target, answering, asked, first))
    lines: list[dict[str, Any]] = []
    for row in batch:
        if isinstance(row, RejectedExample):
            lines.append({"where": row.where, "error": row.reason})
            continue
        prompt, _ = row
        expected = {"expected": prompt.expected} if prompt.expected is not None else {}
        base = {"base": next(theirs)} if answering.base else {}
        lines.append({"where": prompt.where, **_question(prompt), **expected, **next(ours), **base})
    return lines


def _generate(target: LoadedModel, answering: Answering, prompts: list[list[int]], first: int) -> list[dict[str, str]]:
    base = target.base
    answers = generate(
        base.model, prompts, base.stop_ids, max_new_tokens=answering.max_new_tokens, settings=answering.settings,
        text_of=base.raw_text, first=first,
    )  # fmt: skip
    return [{"answer": before_stop(base.decode(ids), answering.settings.stop), "ended": ids.ended} for ids in answers]


def _question(prompt: Prompt) -> dict[str, Any]:
    """A single question as a text, a conversation as its messages."""
    messages = prompt.example.messages
    plain = len(messages) == 1 and messages[0].keys() == {"role", "content"} and messages[0]["role"] == "user"
    return {"prompt": messages[0]["content"]} if plain else {"messages": list(messages)}
