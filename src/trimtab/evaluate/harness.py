"""lm-evaluation-harness (EleutherAI; Biderman et al. 2024, arXiv:2405.14782): its tasks, asked of a base model with its active adapters.

The harness makes the prompts and computes the metrics; log-probabilities and answers come from packs, in which a context that several
requests share, as the choices of a question do, is computed once.
"""

import contextlib
import difflib
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from trimtab.base import Base
from trimtab.core.errors import DataError, NonFinite, RecipeError, StorageError
from trimtab.core.transfer import read
from trimtab.data import pack_all
from trimtab.data.example import TokenRow
from trimtab.engine import Generation, ensure_exact, generate, pack_target_scores
from trimtab.evaluate.intervals import paired_difference
from trimtab.methods import max_row_length

PACK_TOKENS = 4096
"""Tokens per pack: no backward pass follows."""
PACKS = 16
"""Packs that are computed before their results are read."""
BATCH = 32
"""Prompts that are answered together."""
BOOTSTRAP = 1000
"""Draws of the harness's own bootstrap, by which it finds the errors of metrics that are no means."""
UNBOUNDED = 2**20
"""The context of a model that has no limit, for the harness, which needs a number."""


class PackedModel(TemplateLM):
    """A base model as the harness sees it."""

    def __init__(self, base: Base, on_done: Callable[[int], None] | None = None) -> None:
        """
        Args:
            on_done: Called with the number of requests that have been answered.
        """
        super().__init__()
        self.base, self.on_done = base, on_done
        self.truncated = 0
        """Requests that were cut on the left to fit into the context, as the harness asks."""
        self._device = base.device
        if base.end_of_text is None:
            raise RecipeError(f"{base.source}: the tokenizer has no end-of-text token, which the harness puts before texts.")

    @property
    def eot_token_id(self) -> int:
        assert self.base.end_of_text is not None
        return self.base.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        bos = self.base.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return max_row_length(self.base.model, self.base.context_length) or UNBOUNDED

    @property
    def tokenizer_name(self) -> str:
        return self.base.tokenizing_hash

    def chat_template(self, chat_template: bool | str = False) -> str:
        return str(self.base.tokenizer.chat_template or "")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, up to the next answer, or to the end of its last message, which the answer continues."""
        if not self.base.has_template:
            raise RecipeError(f"{self.base.source} has no chat template: leave out --chat.")
        if add_generation_prompt:
            return self.base.template.render(chat_history, prompt=True)
        return self.base.template.render(chat_history[:-1], prompt=True) + chat_history[-1]["content"]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """With a BOS before it, if the tokenizer puts one there and the text has none of its own."""
        return list(self.base.encode([string], special=add_special_tokens is not False)[0].ids)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Of each (context, continuation): Σ log p of the continuation, and whether greedy decoding would write it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        rows = [self._row(number, context, continuation) for number, (_, context, continuation) in enumerate(requests)]
        return self._scores(rows, report=True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Σ log p of each text, in windows of the context's length if it is longer."""
        rows, owner = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            for window in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1):
                rows.append(self._row(number, *make_disjoint_window(window)))
                owner.append(number)
        totals = np.zeros(len(requests))
        np.add.at(totals, owner, [logprob for logprob, _ in self._scores(rows)])
        self._report(len(requests))
        return totals.tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Of each (context, settings): the answer, up to a stop text."""
        answers: dict[int, str] = {}
        settings = [normalize_gen_kwargs(request.args[1]) for request in requests]
        for asked in {repr(asked): asked for asked in settings}.values():  # a task asks all its requests alike
            chosen = [number for number, other in enumerate(settings) if other == asked]
            given = self._answers([requests[number].args[0] for number in chosen], dict(asked))
            answers |= dict(zip(chosen, given, strict=True))
        return [answers[number] for number in range(len(requests))]

    def _answers(self, contexts: list[str], asked: dict[str, Any]) -> list[str]:
        most, end = asked.pop("max_gen_toks"), self.base.tokenizer.decode([self.eot_token_id])
        stops = handle_stop_sequences(asked.pop("until", None), eos=end)
        room = self.max_length - most
        if room < 1:
            raise DataError(f"--harness: a task asks for {most:,} new tokens, and the context has {self.max_length:,}.")
        settings = self._settings(asked, [stop for stop in stops if stop])
        prompts = [encoded.ids for encoded in self.base.encode(contexts, special=True)]
        self.truncated += sum(len(prompt) > room for prompt in prompts)
        texts = []
        for start in range(0, len(prompts), BATCH):
            batch = [prompt[-room:] for prompt in prompts[start : start + BATCH]]
            texts += generate(
                self.base.model, batch, self.base.stop_ids,
                max_new_tokens=most, settings=settings, text_of=self.base.raw_text, first=start,
            )  # fmt: skip
            self._report(len(batch))
        return [postprocess_generated_text(self.base.decode(text), stops, None) for text in texts]

    def _settings(self, asked: dict[str, Any], stops: list[str]) -> Generation:
        """What a task asks for, as we say it. Raises RecipeError for what we don't have: the score would be another's."""
        asked.pop("do_sample", None)  # the temperature says it
        if unknown := sorted(asked.keys() - Generation.model_fields.keys()):
            raise RecipeError(
                f"--harness: a task generates with {unknown[0]}={asked[unknown[0]]}, which Trimtab does not have."
            )
        if not asked.get("temperature"):
            asked = {key: value for key, value in asked.items() if key == "repetition_penalty"}
        return Generation(**{key: type(getattr(Generation(), key))(value) for key, value in asked.items()}, stop=tuple(stops))

    def _row(self, number: int, context: list[int], continuation: list[int]) -> TokenRow:
        where, most = f"request {number}", self.max_length
        if not 0 < len(continuation) <= most:
            raise DataError(f"{where}: its continuation has {len(continuation):,} tokens, and the context has {most:,}.")
        ids = [*context, *continuation][-(most + 1) :]  # the last token is predicted, and predicts nothing
        self.truncated += len(ids) < len(context) + len(continuation)
        if problem := self.base.embedding_problem(ids):
            raise DataError(f"{where}: {problem}.")
        return TokenRow(ids, list(range(len(ids) - len(continuation), len(ids))), where, len(ids))

    def _scores(self, rows: Sequence[TokenRow], report: bool = False) -> list[tuple[float, bool]]:
        """Of each row Σ log p of its targets, and whether all of them are the likeliest tokens."""
        ensure_exact(self.base.model, rows)
        scores: dict[int, tuple[float, bool]] = {}
        packs = pack_all(rows, PACK_TOKENS)
        for start in range(0, len(packs), PACKS):
            some = packs[start : start + PACKS]
            computed = read([pack_target_scores(self.base.model, pack.to(self.base.device)) for pack in some])
            for pack, (logprob, likeliest) in zip(some, computed, strict=True):
                row, count = pack.host.target_row.numpy(), len(pack.rows)
                sums = np.bincount(row, weights=logprob.double().numpy(), minlength=count)
                matches = np.bincount(row, weights=1 - likeliest.double().numpy(), minlength=count) == 0
                scores |= {id(r): (s, m) for r, s, m in zip(pack.rows, sums.tolist(), matches.tolist(), strict=True)}
            if report:
                self._report(sum(len(pack.rows) for pack in some))
        if broken := [row for row in rows if not np.isfinite(scores[id(row)][0])]:
            raise NonFinite(
                f"{broken[0].where}: its log-probability is NaN or Inf: the weights of the model or of an adapter are broken."
            )
        return [scores[id(row)] for row in rows]

    def _report(self, done: int) -> None:
        if self.on_done is not None:
            self.on_done(done)


def run_tasks(
    base: Base,
    models: Sequence[tuple[str, contextlib.AbstractContextManager[Any]]],
    names: Sequence[str],
    *,
    fewshot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    on_done: Callable[[str], Callable[[int], None]] | None = None,
) -> dict[str, Any]:
    """The harness's results, as JSON data.

    Args:
        models: Names of models, and the context in which the base is each of them.
        names: Tasks or groups that the harness has, or YAML files of tasks.
        fewshot: Examples in each prompt; as the task says unless given.
        limit: So many documents of each task alone.
        chat: Whether prompts are written with the chat template.
        on_done: Is called with a model's name, and gives what to call with the number of answered requests.

    Raises:
        RecipeError: There is no such task.
        StorageError: A task's data could not be loaded.
    """
    with quiet():
        tasks = load_tasks(names)
        scores, truncated = {}, {}
        for name, as_model in models:
            model = PackedModel(base, on_done(name) if on_done else None)
            with as_model:
                scores[name] = simple_evaluate(
                    model, **tasks, num_fewshot=fewshot, limit=limit, apply_chat_template=chat, bootstrap_iters=BOOTSTRAP
                )
            truncated[name] = model.truncated
    first = next(iter(scores.values()))
    return {
        "harness": first["lm_eval_version"],
        "tasks": [_task(name, scores) for name in first["results"]],
        "limit": limit,
        "chat_template": chat,
        "truncated": max(truncated.values()),
    }


@cache
def _manager(folders: tuple[str, ...]) -> TaskManager:
    """Knows the harness's tasks, and those of YAML files in these folders. It takes seconds: it reads thousands of files."""
    return TaskManager(include_path=list(folders) or None)


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """The tasks and groups of these names, and what knows them, as arguments of the harness's `simple_evaluate`.

    Raises:
        RecipeError: There is no such task, or it executes code that the model writes.
        StorageError: A task's data could not be loaded.
    """
    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    if missing := [file for file in files if not Path(file).is_file()]:
        raise RecipeError(f"--harness: {missing[0]}: no such file.")
    manager = _manager(tuple(sorted({str(Path(file).parent) for file in files})))
    known = set(manager.all_tasks)
    for name in names:
        if name not in known and name not in files:
            near = " or ".join(difflib.get_close_matches(name, known, n=3))
            meant = f"; did you mean {near}?" if near else "."
            raise RecipeError(f"--harness: the harness has no task or group {name!r}{meant} `lm_eval ls tasks` lists them all.")
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # whatever loads the data of one of hundreds of tasks
        raise StorageError(f"--harness {','.join(names)}: could not be loaded: {type(error).__name__}: {error}") from error
    groups = [group for name, group in loaded["groups"].items() if name in names]
    in_groups = {task.task_name for group in groups for task in group.get_all_tasks()}
    tasks = {name: task for name, task in loaded["tasks"].items() if name not in in_groups}
    if unsafe := [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]:
        raise RecipeError(f"--harness: {unsafe[0]} executes code that the model writes, which Trimtab does not do.")
    return {"tasks": [*groups, *tasks.values()], "task_manager": manager}


def _task(name: str, scores: dict[str, Any]) -> dict[str, Any]:
    """A task's or a group's metrics: of each model the value and its standard error; of two, their difference on the same documents."""
    first = next(iter(scores.values()))
    metrics = []
    for key in first["results"][name]:
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        values = {model: score["results"][name][key] for model, score in scores.items()}
        errors = {model: score["results"][name].get(f"{metric}_stderr,{filtered}") for model, score in scores.items()}
        entry = {
            "metric": metric,
            "filter": filtered,
            "higher_is_better": first["higher_is_better"].get(name, {}).get(metric),
            "values": values,
            "errors": {model: error if isinstance(error, float) else None for model, error in errors.items()},
        }
        if len(scores) > 1 and (difference := _difference(name, metric, filtered, scores)) is not None:
            entry |= {"difference": difference[0], "interval": list(difference[1])}
        metrics.append(entry)
    return {
        "task": name,
        "documents": first["n-samples"].get(name, {}).get("effective"),
        "fewshot": first["n-shot"].get(name),
        "version": first["versions"].get(name),
        "metrics": metrics,
    }


def _difference(name: str, metric: str, filtered: str, scores: dict[str, Any]) -> tuple[float, tuple[float, float]] | None:
    """How much more the last model has than the first on average over the same documents; None for what is no mean over these."""
    lists = []
    for score in scores.values():
        samples = {s["doc_id"]: s.get(metric) for s in score["samples"].get(name, ()) if s["filter"] == filtered}
        lists.append([samples[number] for number in sorted(samples)])
        numbers = lists[-1] and all(isinstance(value, int | float) for value in lists[-1])
        if not numbers or abs(np.mean(lists[-1]) - score["results"][name][f"{metric},{filtered}"]) > 1e-9:
            return None
    return paired_difference(lists[-1], lists[0], [1] * len(lists[0]))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the harness's messages and bars, and those of the git that it starts: what matters of them is in the results."""
    level, stderr, nowhere = logging.root.manager.disable, os.dup(2), os.open(os.devnull, os.O_WRONLY)
    logging.disable(logging.WARNING)
    os.dup2(nowhere, 2)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
        logging.disable(level)
