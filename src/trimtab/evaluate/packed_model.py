"""A base model as lm-evaluation-harness sees it: requests become token rows, and these packs.

A context that several requests share, as the choices of a question do, is computed once. Several processes make the same packs, and each
computes some: the harness sees one model, whose results are whole in each of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from trimtab.base import Base
from trimtab.core.errors import DataError, NonFinite, RecipeError
from trimtab.core.processes import processes
from trimtab.data import Pack, pack_all
from trimtab.data.example import TokenRow
from trimtab.engine import Generation, PackCost, ensure_exact, pack_target_scores
from trimtab.evaluate.agreement import agree_on_questions
from trimtab.evaluate.answers import answer_prompts
from trimtab.methods import max_row_length

PACK_TOKENS = 4096
"""Tokens per pack: no backward pass follows."""
PACKS = 16
"""Packs that a process computes before their results are read."""
ASKED = "what --harness asks"
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
        prompts = [prompt[-room:] for prompt in prompts]
        agree_on_questions(self.base, ASKED, prompts)
        answers = answer_prompts(self.base, prompts, settings, most, self._report)
        return [postprocess_generated_text(self.base.decode(answer), stops, None) for answer in answers]

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
        agree_on_questions(self.base, ASKED, [[row.ids, row.target_indices] for row in rows])
        ensure_exact(self.base.model, rows)
        scores: dict[int, tuple[float, bool]] = {}
        packs, at_once = pack_all(rows, PACK_TOKENS), PACKS * processes.size
        for start in range(0, len(packs), at_once):
            some = packs[start : start + at_once]
            for pack, (logprob, likeliest) in zip(some, self._computed(some), strict=True):
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

    def _computed(self, packs: Sequence[Pack]) -> list[Tensor]:
        """Of each pack's targets log p and whether it is the likeliest token, on the host; processes divide the packs."""
        model, device = self.base.model, self.base.device
        return processes.each(
            list(map(PackCost(model), packs)), lambda number: pack_target_scores(model, packs[number].to(device))
        )

    def _report(self, done: int) -> None:
        if self.on_done is not None:
            self.on_done(done)
