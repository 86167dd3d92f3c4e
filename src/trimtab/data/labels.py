"""Examples as tokens, and which of them are learned. The only place where a loss mask is made.

What is learned is what the assistant says, and the token that ends its turn. It is found by rendering the conversation
with the model's own template up to where each answer starts, and once whole: the first must be the beginning of the
second, or the conversation is laid out turn by turn. Markers are never searched for. The text is then tokenized once,
whole, and a token belongs where its characters stand.
"""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from os.path import commonprefix
from typing import Any, NamedTuple, Protocol

from trimtab.data.example import Account, Conversation, Example, Refusal, Sequence, Text
from trimtab.errors import DataError


class Tokenizing(Protocol):
    """What a base offers to turn examples into tokens. See `base.Base`."""

    @property
    def has_template(self) -> bool: ...
    @property
    def end_of_turn(self) -> int | None: ...
    @property
    def end_of_text(self) -> int | None: ...
    @property
    def control_tokens(self) -> tuple[str, ...]: ...
    def render(self, messages: SequenceOf[dict[str, Any]], tools: SequenceOf[Any] | None = None, *, prompt: bool = False) -> str: ...
    def encode(self, texts: SequenceOf[str], *, special: bool = False) -> SequenceOf[Any]: ...
    def decode(self, ids: SequenceOf[int]) -> str: ...


class Refused(Exception):
    """Why this row can't be used; becomes a Refusal with the row's place."""


class NotAPrefix(Exception):
    """The template writes a turn differently once others follow it (Qwen3 drops earlier thinking, for one)."""


class Answer(NamedTuple):
    start: int
    """Where it starts in the text, in characters."""
    limit: int
    """Up to where the text is what the model itself would have had before it and said."""


class Draft(NamedTuple):
    """A text to be tokenized, and the answers in it."""

    text: str
    answers: list[Answer]
    in_turns: bool
    """Written by the chat template, so that an end-of-turn token ends an answer; else the text's end does."""


def make_sequences(
    examples: Iterable[Example], base: Tokenizing, account: Account, *, max_length: int | None = None, truncate: bool = False
) -> list[Sequence]:
    """Examples as sequences, in their order; what can't be used goes to the account, with its reason.

    Args:
        max_length: The most tokens a sequence may have.
        truncate: Cut longer ones instead of refusing them; one cut before its first learned token is still refused.
    """
    examples = list(examples)
    done: dict[int, list[Sequence]] = {}
    waiting = dict(enumerate(examples))
    for draft in (_whole, _turn_by_turn):
        drafts: dict[int, list[Draft]] = {}
        again: dict[int, Example] = {}
        for number, example in waiting.items():
            try:
                drafts[number] = draft(example, base)
            except NotAPrefix:
                again[number] = example
            except (Refused, DataError) as refused:
                account.refused.append(Refusal(example.where, str(refused)))
        encoded = _encode([d for several in drafts.values() for d in several], base)
        for number, several in drafts.items():
            example = examples[number]
            try:
                done[number] = [_sequence(d, next(encoded), base, example.where, max_length, truncate) for d in several]
                account.used += 1
            except NotAPrefix:
                again[number] = example
            except Refused as refused:
                account.refused.append(Refusal(example.where, str(refused)))
        waiting = again
    return [sequence for number in sorted(done) for sequence in done[number]]


def prompt_of(example: Conversation, base: Tokenizing) -> tuple[list[int], str]:
    """The tokens that ask for a conversation's last answer, and that answer's text; both as training has them."""
    last = max(n for n, m in enumerate(example.messages) if m["role"] == "assistant")
    if base.has_template:
        text, special = base.render(example.messages[:last], example.tools, prompt=True), False
    else:
        text, special = _joined(example)[0], True
    (encoded,) = base.encode([text], special=special)
    ids, _ = _without_end(encoded)
    return ids, example.messages[last]["content"]


# Examples to drafts


def _whole(example: Example, base: Tokenizing) -> list[Draft]:
    """The example as one text."""
    if isinstance(example, Text):
        return [Draft(example.text, [Answer(0, len(example.text))], in_turns=False)]
    if not base.has_template:
        prompt, completion = _joined(example)
        return [Draft(prompt + completion, [Answer(len(prompt), len(prompt) + len(completion))], in_turns=False)]
    _check_conversation(example, base)
    whole = base.render(example.messages, example.tools)
    return [Draft(whole, [_answer(example, turn, whole, base) for turn in _learned_turns(example)], in_turns=True)]


def _turn_by_turn(example: Example, base: Tokenizing) -> list[Draft]:
    """Each learned turn in a text of its own that ends with it, as the model has it when it speaks."""
    assert isinstance(example, Conversation)
    drafts = []
    for turn in _learned_turns(example):
        text = base.render(example.messages[: turn + 1], example.tools)
        try:
            drafts.append(Draft(text, [_answer(example, turn, text, base)], in_turns=True))
        except NotAPrefix:
            raise Refused(
                f"messages[{turn}]: the chat template does not write this conversation's prompt the way it begins the same "
                "conversation with its answer, so training would not see what generation sees"
            ) from None
    return drafts


def _answer(example: Conversation, turn: int, text: str, base: Tokenizing) -> Answer:
    prompt = base.render(example.messages[:turn], example.tools, prompt=True)
    if not text.startswith(prompt):
        raise NotAPrefix
    if turn == len(example.messages) - 1:
        return Answer(len(prompt), len(text))
    until = base.render(example.messages[: turn + 1], example.tools)
    return Answer(len(prompt), len(commonprefix([text, until])))


def _learned_turns(example: Conversation) -> list[int]:
    return [n for n, m in enumerate(example.messages) if m["role"] == "assistant" and n not in example.silent]


def _check_conversation(example: Conversation, base: Tokenizing) -> None:
    if base.end_of_turn is None:
        raise Refused(
            "the model's chat template ends an assistant turn with no special token, so the model could not learn to stop; "
            "give it a template that does, or use prompt/completion rows with a base that has no template"
        )
    for number, message in enumerate(example.messages):
        for token in base.control_tokens:
            if token in message["content"]:
                raise Refused(f"messages[{number}] ({message['role']}) holds the model's control token {token} as text")


def _joined(example: Conversation) -> tuple[str, str]:
    if not example.continues:
        raise Refused("is a conversation, and this model has no chat template to write it with: use prompt/completion or text rows")
    return example.messages[0]["content"], example.messages[1]["content"]


# Drafts to sequences


def _encode(drafts: list[Draft], base: Tokenizing) -> Any:
    """An iterator over the drafts' tokens: (ids, offsets). Tokenized in batches, by whether special tokens go around the text."""
    done: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}
    for in_turns in (True, False):
        chosen = [n for n, draft in enumerate(drafts) if draft.in_turns == in_turns]
        encoded = base.encode([drafts[n].text for n in chosen], special=not in_turns)
        done |= {n: _without_end(e) for n, e in zip(chosen, encoded, strict=True)}
    return (done[n] for n in range(len(drafts)))


def _without_end(encoded: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Without what the tokenizer puts behind a text: a token there stands for no characters."""
    ids, offsets = list(encoded.ids), list(encoded.offsets)
    while len(ids) > 1 and offsets[-1][0] == offsets[-1][1]:
        ids.pop()
        offsets.pop()
    return ids, offsets


def _sequence(
    draft: Draft, encoded: tuple[list[int], list[tuple[int, int]]], base: Tokenizing, where: str, max_length: int | None, truncate: bool
) -> Sequence:
    ids, offsets = _split_at_answers(draft, encoded, base)
    learned: list[int] = []
    for answer in draft.answers:
        first = next((t for t, (start, end) in enumerate(offsets) if start >= answer.start and end > start), len(ids))
        if draft.in_turns:
            last = next((t for t in range(first, len(ids)) if ids[t] == base.end_of_turn and offsets[t][1] <= answer.limit), None)
            if last is None:
                raise NotAPrefix
        else:
            last = len(ids) if base.end_of_text is not None else len(ids) - 1
        learned += range(first, last + 1)
    if not draft.in_turns and base.end_of_text is not None:
        ids = [*ids, base.end_of_text]
    shown = len(ids)
    learned = [t for t in learned if t > 0]  # nothing comes before the first token, so nothing can predict it
    if max_length is not None and learned and learned[-1] >= max_length:
        if not truncate:
            raise Refused(f"has {learned[-1] + 1:,} tokens up to the end of its last answer, more than max_length {max_length:,}")
        learned = [t for t in learned if t < max_length]
    if not learned:
        raise Refused("has no token to learn" + (f" within max_length {max_length:,}" if max_length is not None else ""))
    return Sequence(ids[: learned[-1] + 1], learned, where, shown)


def _split_at_answers(
    draft: Draft, encoded: tuple[list[int], list[tuple[int, int]]], base: Tokenizing
) -> tuple[list[int], list[tuple[int, int]]]:
    """The tokens, cut where an answer starts: a model that generates has the prompt's tokens alone before it.

    A tokenizer may join the prompt's last characters with the answer's first ("2+" and "+" as "++").
    """
    ids, offsets = encoded
    cuts = [a.start for a in draft.answers if any(start < a.start < end for start, end in offsets)]
    if not cuts:
        return ids, offsets
    edges = [0, *cuts, len(draft.text)]
    pieces = [draft.text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    firsts = base.encode(pieces[:1], special=not draft.in_turns)
    parts = [_without_end(e) for e in [*firsts, *base.encode(pieces[1:])]]
    cut_ids = [i for part, _ in parts for i in part]
    cut_offsets = [(a + edge, b + edge) for (_, part), edge in zip(parts, edges, strict=False) for a, b in part]
    if base.decode(cut_ids) != base.decode(ids):
        raise Refused("the tokenizer joins the end of the prompt with the start of the answer, and cannot write them apart")
    return cut_ids, cut_offsets
