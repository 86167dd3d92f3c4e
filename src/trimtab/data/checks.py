"""The data's proof, before anything is trained: what will be learned is what the rows say, and nothing makes that meaningless."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from trimtab.core.errors import DataError
from trimtab.data.example import Account, Conversation, Example, Judged, Preference, TokenRow
from trimtab.data.leakage import digest, leaks
from trimtab.data.load import Loaded
from trimtab.data.rendering import Tokenizing, read_so, trained_turns
from trimtab.data.template_output import forms, parted, plain, texts_of
from trimtab.data.token_rows import prompt_of

Status = Literal["good", "note", "problem"]
COMPARED = 500
"""Rows whose text is compared with what their tokens say; the first of a file."""
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Speaking(Tokenizing, Protocol):
    """What a base says of its special tokens. See `base.Base`."""

    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    @property
    def tokenizer(self) -> Any: ...


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    status: Status
    words: str
    """What was found; of a note or a problem, also what to do."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The same as JSON data."""

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def prove(data: Loaded, examples: Sequence[Example], base: Speaking) -> list[Finding]:
    """Look at everything that is to be learned, and at what is held out.

    Args:
        examples: Some of the rows as they were read, whose tokens are compared with what they say.
    """
    rows = [row for row in data.train if row.side != "mismatched"]
    return [
        *_accounts(data.accounts),
        _lengths(rows),
        _stops(rows, base),
        _texts(rows + data.eval, examples, base),
        _duplicates(rows),
        _leaks(rows, data.eval),
        _answers(rows),
        _specials(rows, base),
        *_sides(rows),
        *_reasoning(examples, base),
    ]


def refuse_problems(findings: Iterable[Finding]) -> None:
    """Raise DataError if training on this would be meaningless."""
    problems = [f"{one.name}: {one.words}" for one in findings if one.status == "problem"]
    if problems:
        raise DataError("data: " + "\n".join(problems))


def _accounts(accounts: Iterable[Account]) -> list[Finding]:
    found = []
    for account in accounts:
        reasons = Counter(reason for _, reason in account.refused)
        words = str(account) + "".join(f"; {count:,} because it {reason}" for reason, count in reasons.most_common(3))
        if account.unread:
            words += f"; columns that nothing reads: {', '.join(sorted(account.unread))}"
        found.append(Finding("rows", "note" if account.refused else "good", words, account.plain()))
    return found


def _lengths(rows: Sequence[TokenRow]) -> Finding:
    learned, lengths = sorted(len(row.target_indices) for row in rows), sorted(len(row.ids) for row in rows)
    middle, whole = learned[len(learned) // 2], sum(lengths)
    histogram = {str(low): sum(low <= n < 2 * low for n in learned) for low in BUCKETS}
    histogram = {low: count for low, count in histogram.items() if count}
    words = (
        f"{sum(learned):,} of {whole:,} tokens are learned ({sum(learned) / whole:.0%}): {learned[0]:,} to {learned[-1]:,} a row, "
        f"{middle:,} in the median; rows have {lengths[0]:,} to {lengths[-1]:,}"
    )
    return Finding("tokens", "good", words, {"learned": sum(learned), "tokens": whole, "histogram": histogram})


def _stops(rows: Sequence[TokenRow], base: Speaking) -> Finding:
    """Whether the last token that is learned of each row is one that ends a generation (B01, B02)."""
    open_ended = [row.where for row in rows if row.ids[row.target_indices[-1]] not in base.stop_ids]
    share = 1 - len(open_ended) / len(rows)
    facts = {"share": share, "open_ended": open_ended[:20]}
    if not open_ended:
        return Finding("stop tokens", "good", "every row's last learned token is one that ends a generation", facts)
    words = (
        f"{len(open_ended):,} of {len(rows):,} rows do not end with a stop token ({open_ended[0]} is the first): they were cut"
    )
    if len(open_ended) == len(rows):
        return Finding(
            "stop tokens", "problem", f"{words}, and the model would never learn to stop. Raise data.max_length.", facts
        )
    return Finding("stop tokens", "note", f"{words}, and teach the model to stop later, or never", facts)


def _texts(rows: Sequence[TokenRow], examples: Sequence[Example], base: Speaking) -> Finding:
    """What is trained on, decoded, says what the message says; and before it stands what generation will see (B03, B05)."""
    by_row: dict[str, list[TokenRow]] = {}
    for row in rows:
        by_row.setdefault(row.where, []).append(row)
    wrong, turned, compared = list[str](), 0, 0
    for example in examples:
        made = by_row.get(example.where, [])
        compared += bool(made)
        turned += len(made) > 1 and all(row.side is None for row in made)
        conversations = _conversations(example)
        pairs = zip(conversations, made if len(made) == len(conversations) else made[-1:], strict=False)
        wrong += [example.where for conversation, row in pairs if not _says(row, conversation, base)]
    facts = {"compared": compared, "different": wrong[:20], "turn_by_turn": turned}
    if wrong:
        words = f"{len(wrong):,} of {compared:,} rows are learned as something else than generation writes ({wrong[0]} is the first)"
        return Finding("rendering", "problem", f"{words}: the chat template or the tokenizer is at fault", facts)
    words = f"of {compared:,} rows, the tokens before the last answer are those that generation sees, and the learned ones say what it says"
    if turned:
        words += (
            f"; {turned:,} conversations are laid out turn by turn, because the template writes earlier turns differently later"
        )
    return Finding("rendering", "good", words, facts)


def _says(row: TokenRow, conversation: Conversation, base: Speaking) -> bool:
    """Whether a row's tokens are the prompt of its last answer, and then all that the answer says."""
    turn = trained_turns(conversation)[-1]
    messages = read_so(conversation, base) if base.has_template else list(conversation.messages)
    before = prompt_of(messages[:turn], base, conversation.tools)
    text = base.tokenizer.decode(
        [row.ids[t] for t in row.target_indices if t >= len(before)], clean_up_tokenization_spaces=False
    )
    cut = row.ids[row.target_indices[-1]] not in base.stop_ids
    return row.ids[: len(before)] == before and (cut or all(_stands(one, text, base) for one in texts_of(messages[turn])))


def _reasoning(examples: Sequence[Example], base: Speaking) -> list[Finding]:
    """Of a template whose prompt begins the reasoning, whether the answers that are trained on have some."""
    if not (base.has_template and base.template.opens_reasoning):
        return []
    conversations = [one for example in examples for one in _conversations(example)]
    turns = [read_so(one, base)[n] for one in conversations for n in trained_turns(one)]
    without = sum(not parted(turn, opened=True)[0] for turn in turns)
    words = f"the prompt begins the reasoning, and all of {len(turns):,} answers go on with some"
    if without:
        switch = base.template.switch_for(lambda other: not other.opens_reasoning)
        words = (
            f"the prompt begins the reasoning, and {without:,} of {len(turns):,} answers have none: the model learns to end it at once. "
            f"If it is to reason, give messages their reasoning_content{f'; if not, set {switch}' if switch else ''}"
        )
    return [Finding("reasoning", "note" if without else "good", words, {"turns": len(turns), "without": without})]


def _stands(said: str, text: str, base: Speaking) -> bool:
    """Whether a text stands in another, as the tokenizer writes it: some write other spaces or letters."""
    return any(plain(form) in plain(text) for form in (*forms(said), base.decode(base.encode([said])[0].ids)))


def _conversations(example: Example) -> list[Conversation]:
    if isinstance(example, Preference):
        return [example.chosen, example.rejected]
    if isinstance(example, Judged):
        return [example.conversation]
    return [example] if isinstance(example, Conversation) else []


def _duplicates(rows: Sequence[TokenRow]) -> Finding:
    first: dict[bytes, str] = {}
    again = [(row.where, first[key]) for row in rows if first.setdefault(key := digest(row.ids), row.where) != row.where]
    facts = {"rows": len(again), "first": again[:20]}
    if not again:
        return Finding("duplicates", "good", "no row to learn stands there twice", facts)
    words = f"{len(again):,} of {len(rows):,} rows to learn stand there before, and are learned as often ({again[0][0]} is {again[0][1]})"
    return Finding("duplicates", "note", words, facts)


def _leaks(rows: Sequence[TokenRow], held_out: Sequence[TokenRow]) -> Finding:
    """Held-out rows that are learned as well: whole, by their prompt, or nearly."""
    if not held_out:
        return Finding("held out", "note", "no rows are held out, so nothing says how good the adapter is: give data.eval", {})
    found = leaks(rows, held_out)
    facts = {
        "rows": len(held_out),
        "learned_too": found.whole[:20],
        "prompt_learned": found.prompts[:20],
        "nearly_learned": found.nearly[:20],
    }
    if len(found.whole) == len(held_out):
        words = (
            f"all {len(held_out):,} held-out rows are learned as well, so their loss would say nothing: remove the duplicates"
        )
        return Finding("held out", "problem", words, facts)
    counts = [
        (f"{len(found.whole):,} are learned as well", found.whole[:1]),
        (f"{len(found.prompts):,} have a prompt that is", found.prompts[:1]),
        (f"{len(found.nearly):,} are nearly the same as a learned row", [" ≈ ".join(pair) for pair in found.nearly[:1]]),
    ]
    said = [f"{words} ({first[0]} is the first)" for words, first in counts if first]
    if said:
        words = f"of {len(held_out):,} held-out rows, {' and '.join(said)}: their loss looks better than it is"
        return Finding("held out", "note", words, facts)
    return Finding("held out", "good", f"no held-out row of {len(held_out):,} is learned: whole, nearly or its prompt", facts)


def _answers(rows: Sequence[TokenRow]) -> Finding:
    """What is learned most often: a model that always says it is right as often."""
    said = Counter(digest([row.ids[t] for t in row.target_indices]) for row in rows)
    (_, most), distinct = said.most_common(1)[0], len(said)
    facts = {"distinct": distinct, "most_common": most}
    words = f"{distinct:,} different answers in {len(rows):,} rows"
    if distinct == 1 and len(rows) > 1:
        words = f"every one of {len(rows):,} rows has the same answer: the model need not read what it is asked"
        return Finding("answers", "note", words, facts)
    return Finding("answers", "good", f"{words}; the most common one stands in {most:,} of them", facts)


def _specials(rows: Sequence[TokenRow], base: Speaking) -> Finding:
    """Tokens that other tools stumble over (B01, B04)."""
    tokenizer = base.tokenizer
    bos, unknown = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "unk_token_id", None)
    pad, end = getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)
    doubled = [row.where for row in rows if bos is not None and row.ids[:2] == [bos, bos]]
    strange = [row.where for row in rows if unknown is not None and unknown not in (pad, end, bos) and unknown in row.ids]
    facts = {"doubled_bos": doubled[:20], "unknown": strange[:20], "pad_is_eos": pad is not None and pad == end}
    if doubled:
        words = f"{len(doubled):,} rows begin with two beginning-of-text tokens ({doubled[0]} is the first): take it out of the data"
        return Finding("special tokens", "problem", words, facts)
    words = "no doubled beginning-of-text token"
    if facts["pad_is_eos"]:
        words += "; padding is the end-of-text token here, which is harmless: nothing is padded, and labels go by position"
    if strange:
        words = f"{len(strange):,} rows have characters that the tokenizer does not know ({strange[0]} is the first); {words}"
    return Finding("special tokens", "note" if strange else "good", words, facts)


def _sides(rows: Sequence[TokenRow]) -> list[Finding]:
    """Of compared answers: whether length alone tells them apart."""
    one, other = ("chosen", "rejected") if any(row.side == "chosen" for row in rows) else ("good", "bad")
    lengths = {side: [len(row.target_indices) for row in rows if row.side == side] for side in (one, other)}
    if not lengths[one] or not lengths[other]:
        return []
    mean = {side: sum(several) / len(several) for side, several in lengths.items()}
    words = f"{one} answers have {mean[one]:,.0f} tokens in the mean, {other} ones {mean[other]:,.0f}"
    ratio = max(mean.values()) / min(mean.values())
    if ratio > 1.5:
        words += f": that alone tells them apart, and the model will learn to answer {'longer' if mean[one] > mean[other] else 'shorter'}"
    return [Finding("lengths", "note" if ratio > 1.5 else "good", words, mean)]
