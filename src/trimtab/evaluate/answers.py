"""The model's answers to held-out questions, beside the expected ones."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from trimtab.base import Base
from trimtab.core.processes import processes
from trimtab.data import Conversation, Judged, Preference, tokenize_answers
from trimtab.engine import Answer, Generation, before_stop, generate
from trimtab.evaluate.config import EvalConfig
from trimtab.evaluate.metrics import ScoredAnswer

BATCH = 32
"""Questions that are answered together: their keys and values are held in memory."""


class Question(NamedTuple):
    """A question whose answer is known."""

    prompt: list[int]
    perfect: ScoredAnswer
    """The expected answer, as if the model had given it."""


def questions(base: Base, examples: Sequence[Conversation]) -> list[Question]:
    """The last turn of each conversation as a question. Raises DataError for one that can't be used."""
    return [
        Question(prompt, _scored(base, example, base.raw_text(expected), Answer(expected)))
        for example, (prompt, expected) in zip(examples, tokenize_answers(examples, base), strict=True)
    ]


def answer_questions(
    base: Base,
    asked: Sequence[Question],
    config: EvalConfig | None = None,
    on_done: Callable[[int], None] | None = None,
    texts: Sequence[str] = (),
) -> list[ScoredAnswer]:
    """The model's answers.

    Args:
        on_done: Called with the number of answers in each finished batch.
        texts: Other answers than the expected ones that `max_new_tokens: auto` leaves room for.
    """
    config = config or EvalConfig()
    most = config.max_new_tokens
    if most == "auto":
        lengths = [*(one.perfect.tokens for one in asked), *(len(encoding.ids) for encoding in base.encode(texts))]
        most = max(lengths, default=0) * 5 // 4 + 8  # an answer that is longer is wrong by now
    answers = answer_prompts(base, [one.prompt for one in asked], config, most, on_done)
    return [
        _scored(base, one.perfect.example, one.perfect.expected_raw, answer, config.stop)
        for one, answer in zip(asked, answers, strict=True)
    ]


def answer_prompts(
    base: Base, prompts: Sequence[list[int]], settings: Generation, most: int, on_done: Callable[[int], None] | None = None
) -> list[Answer]:
    """The new tokens of each prompt, in batches that processes divide among them.

    Args:
        most: New tokens of an answer.
        on_done: Called with the number of answers in each finished batch of this process's.
    """
    # Where shards are gathered in every pass, all processes answer all of them.
    divided = processes.size > 1 and not processes.equal_passes
    size = max(1, min(BATCH, -(-len(prompts) // processes.size))) if divided else BATCH
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    shares = processes.share([sum(map(len, batch)) for batch in batches])
    found: dict[int, list[Answer]] = {}
    for number in shares[processes.rank] if divided else range(len(batches)):
        found[number] = generate(
            base.model, batches[number], base.stop_ids, max_new_tokens=most, settings=settings, text_of=base.raw_text,
            first=number * size,
        )  # fmt: skip
        if on_done:
            on_done(len(batches[number]))
    if divided:
        own = [[number, [[answer, answer.ended] for answer in of_batch]] for number, of_batch in found.items()]
        said = [one for of_process in processes.tell(own) for one in of_process]
        found = {number: [Answer.of(ids, ended) for ids, ended in of_batch] for number, of_batch in said}
    return [answer for number in range(len(batches)) for answer in found[number]]


def _scored(base: Base, example: Conversation, expected: str, answer: Answer, stops: Sequence[str] = ()) -> ScoredAnswer:
    raw = before_stop(base.raw_text(answer), stops)
    question = next((m["content"] for m in reversed(example.messages[:-1]) if m["role"] == "user"), "")
    return ScoredAnswer(
        question, base.answer_text(expected), base.answer_text(raw), len(answer), answer.ended, example, raw, expected
    )


def score_answers(
    base: Base,
    examples: Sequence[Conversation],
    config: EvalConfig | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[ScoredAnswer]:
    """The model's answers to the last turn of each conversation."""
    return answer_questions(base, questions(base, examples), config, on_done)


def answer_preferences(
    base: Base,
    examples: Sequence[Preference | Judged],
    config: EvalConfig | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """The model's answer to each prompt, the example's answers, and their numbers of tokens, as JSON data."""
    sides: list[dict[str, Conversation]] = [
        {"chosen": e.chosen, "rejected": e.rejected}
        if isinstance(e, Preference)
        else {"good" if e.good else "bad": e.conversation}
        for e in examples
    ]
    texts = [{side: conversation.messages[-1]["content"] for side, conversation in example.items()} for example in sides]
    all_texts = [text for example in texts for text in example.values()]
    asked = questions(base, [next(iter(example.values())) for example in sides])
    answers = answer_questions(base, asked, config, on_done, all_texts)
    lengths = iter([len(encoding.ids) for encoding in base.encode(all_texts)])
    return [
        {
            "question": answer.question,
            **{side: {"text": text, "tokens": next(lengths)} for side, text in example.items()},
            "answer": {"text": answer.answer, "tokens": answer.tokens, "ended": answer.ended},
        }
        for answer, example in zip(answers, texts, strict=True)
    ]
