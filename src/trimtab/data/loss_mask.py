"""The loss mask of the examples in words: who is trained on, and with what weights."""

from collections import Counter
from collections.abc import Sequence

from trimtab.data.example import Conversation, Example, TokenRow
from trimtab.data.finding import Finding, Status
from trimtab.data.rendering import Tokenizing
from trimtab.data.trained import message_weights, other_trained, trained_turns


def trains_on_prompts(example: Example) -> bool:
    """Whether messages of others than the assistant are trained on."""
    return isinstance(example, Conversation) and bool(other_trained(example))


def describe_mask(rows: Sequence[TokenRow], examples: Sequence[Example]) -> list[Finding]:
    """What is trained on, unless it is what the assistant says, all with weight 1."""
    talks = [example for example in examples if isinstance(example, Conversation)]
    roles = Counter(talk.messages[n]["role"] for talk in talks for n, weight in enumerate(message_weights(talk)) if weight)
    weights = Counter(weight for row in rows for weight in row.weights or ())
    if not weights and roles.keys() <= {"assistant"}:
        return []
    message = (
        f"in {len(talks):,} examples, trained on are {', '.join(f'{count:,} {role}' for role, count in roles.items())} messages"
    )
    if weights:
        message += (
            f"; {sum(weights.values()):,} target tokens are in examples with weights, from {min(weights):g} to {max(weights):g}"
        )
    if any(talk.train_on == "everything" and len(trained_turns(talk)) > 1 for talk in talks):
        message += "; earlier answers are trained on as the chat template writes them before the last one"
    facts = {"roles": dict(roles), "weights": {f"{weight:g}": count for weight, count in sorted(weights.items())}}
    status: Status = "note" if roles.keys() - {"assistant"} else "good"
    return [Finding("loss mask", status, message, facts)]


def is_ended(row: TokenRow, base: Tokenizing, prompts_too: bool) -> bool:
    """Whether a row's last target token is one that ends a generation, or a turn of any role if `prompts_too` are trained on."""
    last = row.ids[row.target_indices[-1]]
    if last in base.stop_ids or not prompts_too:
        return last in base.stop_ids
    targets = row.ids[row.target_indices[0] : row.target_indices[-1] + 1]
    return base.tokenizer.decode(targets, clean_up_tokenization_spaces=False).rstrip().endswith(base.control_tokens)
