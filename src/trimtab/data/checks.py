"""Checks of the tokenized data before training: target tokens are what the examples say, and the evaluation will mean something."""

from collections import Counter
from collections.abc import Iterable, Sequence

from trimtab.core.errors import DataError
from trimtab.data.duplicates import by_example, digest, repeated
from trimtab.data.example import Conversation, Example, SourceReport, Text, TokenRow, parts_of
from trimtab.data.finding import Finding
from trimtab.data.leakage import find_leaks
from trimtab.data.load import LoadedData
from trimtab.data.loss_mask import describe_mask, is_ended, trains_on_prompts
from trimtab.data.rendering import Tokenizing, template_messages, template_of
from trimtab.data.template_output import message_texts, normalized, notations, split_reasoning
from trimtab.data.token_rows import tokenize_prompt
from trimtab.data.trained import trained_turns

EXAMPLES_CHECKED = 500
"""Examples of a file, its first ones, whose text is compared with what their tokens say."""
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def check_data(data: LoadedData, examples: Sequence[Example], base: Tokenizing) -> list[Finding]:
    """Check everything that is to be trained on, and the validation rows.

    Args:
        examples: Some of the examples as they were read, whose texts are compared with their tokens.
    """
    rows, prompts_too = data.train, any(map(trains_on_prompts, examples))
    return [
        *map(source_finding, data.reports),
        *mixture_finding(data),
        _lengths(rows),
        *describe_mask(rows, examples),
        _stops(rows, base, prompts_too),
        _rendering(rows + data.eval, examples, base),
        _duplicates(rows),
        _leaks(rows, data.eval, prompts_too),
        _answers(rows),
        special_tokens(rows, examples, base),
        *_sides(rows),
        *_reasoning(examples, base),
    ]


def refuse_problems(findings: Iterable[Finding]) -> None:
    """Raise DataError if training on this would be meaningless."""
    problems = [f"{finding.name}: {finding.message}" for finding in findings if finding.status == "problem"]
    if problems:
        raise DataError("data: " + "\n".join(problems))


def source_finding(report: SourceReport) -> Finding:
    reasons = Counter(reason for _, reason in report.rejected)
    message = str(report) + "".join(f"; {count:,}: {reason}" for reason, count in reasons.most_common(3))
    if report.ignored_columns:
        message += f"; ignored columns: {', '.join(sorted(report.ignored_columns))}"
    return Finding("rows", "note" if report.rejected or report.dropped else "good", message, report.plain())


OFTEN = 8
"""From so many passes an epoch over a source's examples on, a note says that they may be memorized."""


def mixture_finding(data: LoadedData) -> list[Finding]:
    """What each named source contributes to an epoch."""
    shares = data.shares
    if not shares:
        return []
    facts = {name: share.plain() for name, share in shares.items()}
    found = [Finding("mixture", "good", "; ".join(f"{name}: {share}" for name, share in shares.items()), facts)]
    if often := {name: share.times for name, share in shares.items() if share.times >= OFTEN}:
        words = ", ".join(f"{name} {times:.0f} times" for name, times in often.items())
        message = f"each epoch goes through {words}, so its examples may be memorized: give it less weight, or more examples"
        found.append(Finding("repetition", "note", message, dict(often)))
    return found


def _lengths(rows: Sequence[TokenRow]) -> Finding:
    targets, lengths = sorted(len(row.target_indices) for row in rows), sorted(len(row.ids) for row in rows)
    median, total = targets[len(targets) // 2], sum(lengths)
    histogram = {str(low): sum(low <= n < 2 * low for n in targets) for low in BUCKETS}
    histogram = {low: count for low, count in histogram.items() if count}
    message = (
        f"{sum(targets):,} of {total:,} tokens are targets ({sum(targets) / total:.0%}): {targets[0]:,} to {targets[-1]:,} an example, "
        f"median {median:,}; examples have {lengths[0]:,} to {lengths[-1]:,}"
    )
    return Finding("tokens", "good", message, {"learned": sum(targets), "tokens": total, "histogram": histogram})


def _stops(rows: Sequence[TokenRow], base: Tokenizing, prompts_too: bool) -> Finding:
    """Whether the last target token of each row is one that ends a generation (B01, B02).

    Args:
        prompts_too: Rows may end with a turn of another role, or with what the template writes behind a turn.
    """
    # A row that another one of its example follows, as the next block of a text, need not end.
    ends = [row for group in by_example(rows) for row in (group if group[0].side else group[-1:])]
    open_ended = [row.where for row in ends if not is_ended(row, base, prompts_too)]
    facts = {"share": 1 - len(open_ended) / len(ends), "open_ended": open_ended[:20]}
    if not open_ended:
        return Finding("stop tokens", "good", "every example's last target token is one that ends a generation", facts)
    message = (
        f"{len(open_ended):,} of {len(ends):,} examples do not end with a stop token (the first: {open_ended[0]}), "
        "because they were truncated"
    )
    if len(open_ended) == len(ends):
        message += ", and the model would never learn to stop. Raise data.max_length."
        return Finding("stop tokens", "problem", message, facts)
    return Finding("stop tokens", "note", f"{message}, and teach the model to stop later, or never", facts)


def _rendering(rows: Sequence[TokenRow], examples: Sequence[Example], base: Tokenizing) -> Finding:
    """Whether target tokens, decoded, say what the message says, after the prompt that generation uses (B03, B05)."""
    by_place: dict[tuple[str, str], list[TokenRow]] = {}
    for row in rows:
        by_place.setdefault((row.source, row.where), []).append(row)
    different, turn_by_turn, made, compared = list[str](), 0, 0, 0
    for example in examples:
        own = by_place.get((example.source, example.where), [])
        compared += bool(own)
        if isinstance(example, Conversation) and len(own) > 1:
            turn_by_turn, made = turn_by_turn + 1, made + len(own)
        conversations = [conversation for conversation in _conversations(example) if trained_turns(conversation)]
        of_each = [[row] for row in own] if len(own) == len(conversations) else [own]
        pairs = zip(conversations, of_each if own else [], strict=False)
        different += [example.where for talk, rows in pairs if not any(_says(row, talk, base) for row in rows)]
    facts = {"compared": compared, "different": different[:20], "turn_by_turn": turn_by_turn}
    if different:
        message = (
            f"the targets of {len(different):,} of {compared:,} examples differ from what generation writes "
            f"(the first: {different[0]}): the chat template or the tokenizer is at fault"
        )
        return Finding("rendering", "problem", message, facts)
    message = (
        f"in {compared:,} examples, the tokens before the last answer are those of generation, and its targets say what it says"
    )
    if turn_by_turn:
        message += (
            f"; {turn_by_turn:,} conversations are rendered turn by turn and become {made:,} token rows, because the template writes "
            "earlier turns differently later (what rows of one conversation begin with alike is computed once)"
        )
    return Finding("rendering", "good", message, facts)


def _says(row: TokenRow, conversation: Conversation, base: Tokenizing) -> bool:
    """Whether a row's tokens are the prompt of its last answer, and then all that the answer says."""
    turn = trained_turns(conversation)[-1]
    messages = template_messages(conversation, base) if base.has_template else list(conversation.messages)
    prompt = tokenize_prompt(messages[:turn], base, conversation.tools, conversation.switches)
    targets = [row.ids[t] for t in row.target_indices if t >= len(prompt)]
    text = normalized(base.tokenizer.decode(targets, clean_up_tokenization_spaces=False))
    if row.ids[: len(prompt)] != prompt:
        return False
    if not is_ended(row, base, trains_on_prompts(conversation)):  # truncated
        return True

    def has(leaf: str) -> bool:
        decoded = base.decode(base.encode([leaf])[0].ids)  # some tokenizers write other spaces or letters
        return any(normalized(form) in text for form in (*notations(leaf), decoded))

    return all(map(has, message_texts(messages[turn])))


def _reasoning(examples: Sequence[Example], base: Tokenizing) -> list[Finding]:
    """Whether the trained answers have reasoning, where the template's prompt opens it."""
    if not base.has_template:
        return []
    every = [conversation for example in examples for conversation in _conversations(example)]
    conversations = [conversation for conversation in every if template_of(conversation, base).opens_reasoning]
    if not conversations:
        return []
    turns = [template_messages(talk, base)[n] for talk in conversations for n in trained_turns(talk)]
    without = sum(not split_reasoning(turn, opened=True)[0] for turn in turns)
    message = f"the prompt opens the reasoning, and all of {len(turns):,} answers continue with some"
    if without:
        switch = template_of(conversations[0], base).switch_for(lambda template: not template.opens_reasoning)
        message = (
            f"the prompt opens the reasoning, and {without:,} of {len(turns):,} answers have none: the model learns to end it at once. "
            f"If it is to reason, give messages their reasoning_content{f'; if not, set {switch}' if switch else ''}"
        )
    return [Finding("reasoning", "note" if without else "good", message, {"turns": len(turns), "without": without})]


def _conversations(example: Example) -> list[Conversation]:
    return [part for part in parts_of(example) if isinstance(part, Conversation)]


def _duplicates(rows: Sequence[TokenRow]) -> Finding:
    twice, total = repeated(rows), sum(1 for _ in by_example(rows))
    facts = {"rows": len(twice), "first": twice[:20]}
    if not twice:
        return Finding("duplicates", "good", "no training example is there twice", facts)
    message = (
        f"{len(twice):,} of {total:,} training examples repeat an earlier one, and weigh as much again "
        f"({twice[0][0]} is {twice[0][1]}). data.duplicates=remove leaves them out"
    )
    return Finding("duplicates", "note", message, facts)


def _leaks(rows: Sequence[TokenRow], held_out: Sequence[TokenRow], prompts_too: bool) -> Finding:
    """Validation rows that are trained on as well: exactly, by their prompt unless prompts are trained on too, or nearly."""
    if not held_out:
        return Finding(
            "held out", "note", "there are no validation examples, so nothing measures the adapter: set data.eval", {}
        )
    leaks = find_leaks(rows, held_out, prompts=not prompts_too)
    facts = {
        "rows": len(held_out),
        "learned_too": leaks.exact[:20],
        "prompt_learned": leaks.prompts[:20],
        "nearly_learned": leaks.near[:20],
    }
    total = f"{len(held_out):,} validation examples"
    if len(leaks.exact) == len(held_out):
        message = (
            f"all {total} are trained on as well, so their loss would mean nothing: use others, or set data.duplicates=remove"
        )
        return Finding("held out", "problem", message, facts)
    counts = [
        (f"{len(leaks.exact):,} are trained on as well", leaks.exact[:1]),
        (f"{len(leaks.prompts):,} have a prompt that is", leaks.prompts[:1]),
        (f"{len(leaks.near):,} nearly repeat a training example", [" ≈ ".join(pair) for pair in leaks.near[:1]]),
    ]
    if leaked := [f"{count} (the first: {first[0]})" for count, first in counts if first]:
        message = f"of {total}, {' and '.join(leaked)}: their loss looks better than it is"
        if leaks.exact:
            message += ". data.duplicates=remove trains on none of the former"
        return Finding("held out", "note", message, facts)
    return Finding("held out", "good", f"none of {total} is trained on: exactly, nearly or by its prompt", facts)


def _answers(rows: Sequence[TokenRow]) -> Finding:
    """How often the most common answer is there: a model that always gives it is right as often."""
    answers = Counter(digest([row.ids[t] for t in row.target_indices]) for row in rows)
    (_, most), distinct = answers.most_common(1)[0], len(answers)
    facts = {"distinct": distinct, "most_common": most}
    if distinct == 1 and len(rows) > 1:
        message = f"all {len(rows):,} examples have the same answer: the model need not read the prompt"
        return Finding("answers", "note", message, facts)
    message = f"{distinct:,} different answers in {len(rows):,} examples; the most common one is in {most:,} of them"
    return Finding("answers", "good", message, facts)


def special_tokens(rows: Sequence[TokenRow], examples: Sequence[Example], base: Tokenizing) -> Finding:
    """Special tokens that make other tools fail (B01, B04)."""
    bos, unknown, pad, end = (getattr(base.tokenizer, f"{name}_token_id", None) for name in ("bos", "unk", "pad", "eos"))
    doubled = [row.where for row in rows if bos is not None and row.ids[:2] == [bos, bos]]
    strange = [row.where for row in rows if unknown is not None and unknown not in (pad, end, bos) and unknown in row.ids]
    facts = {"doubled_bos": doubled[:20], "unknown": strange[:20], "pad_is_eos": pad is not None and pad == end}
    if doubled:
        message = f"{len(doubled):,} examples begin with two beginning-of-text tokens (the first: {doubled[0]}): remove it from the data"
        return Finding("special tokens", "problem", message, facts)
    message = "no doubled beginning-of-text token"
    if facts["pad_is_eos"]:
        message += (
            "; padding is the end-of-text token here, which is harmless: nothing is padded, and targets are marked by position"
        )
    if strange:
        message = (
            f"{len(strange):,} examples have characters that the tokenizer does not know (the first: {strange[0]}); {message}"
        )
    mark = base.tokenizer.convert_ids_to_tokens(base.end_of_text) if base.end_of_text is not None else ""
    inside = [example.where for example in examples if isinstance(example, Text) and mark and mark in example.text]
    if inside:
        message += (
            f"; {len(inside):,} texts hold {mark} (the first: {inside[0]}), which the model reads as their end: documents of one file are "
            "separated by a line with <|endoftext|> alone"
        )
    return Finding("special tokens", "note" if strange or inside else "good", message, facts)


def _sides(rows: Sequence[TokenRow]) -> list[Finding]:
    """Whether length alone tells compared answers apart."""
    better, worse = ("chosen", "rejected") if any(row.side == "chosen" for row in rows) else ("good", "bad")
    lengths = {side: [len(row.target_indices) for row in rows if row.side == side] for side in (better, worse)}
    if not lengths[better] or not lengths[worse]:
        return []
    mean = {side: sum(counts) / len(counts) for side, counts in lengths.items()}
    message = f"{better} answers have {mean[better]:,.0f} tokens on average, {worse} ones {mean[worse]:,.0f}"
    ratio = max(mean.values()) / min(mean.values())
    if ratio > 1.5:
        longer = "longer" if mean[better] > mean[worse] else "shorter"
        message += f": that alone tells them apart, and the model will learn to answer {longer}"
    return [Finding("lengths", "note" if ratio > 1.5 else "good", message, mean)]
