"""Which messages of a conversation are trained on, and with what weight in the loss."""

from dataclasses import replace

from trimtab.data.example import Conversation, Example, InvalidExample, TrainOn


def message_weights(example: Conversation) -> list[float]:
    """The weight of each message: its own if it has one, and else 1 or 0 as `train_on` says."""
    chosen = _chosen(example)
    return [example.weights.get(n, float(n in chosen)) for n in range(len(example.messages))]


def _chosen(example: Conversation) -> set[int]:
    """Indices of the messages that `train_on` means."""
    roles, train_on = [message["role"] for message in example.messages], example.train_on
    if train_on == "everything":
        return set(range(len(roles)))
    if isinstance(train_on, tuple):
        return {n for n, role in enumerate(roles) if role in train_on}
    answers = [n for n, role in enumerate(roles) if role == "assistant" and n >= example.prompt]
    return set(answers[-1:] if train_on == "last" else answers)


def trained_turns(example: Conversation) -> list[int]:
    """Indices of the assistant messages that are trained on."""
    return [n for n, weight in enumerate(message_weights(example)) if weight and _is_assistants(example, n)]


def other_trained(example: Conversation) -> list[int]:
    """Indices of the messages of other roles that are trained on."""
    return [n for n, weight in enumerate(message_weights(example)) if weight and not _is_assistants(example, n)]


def _is_assistants(example: Conversation, number: int) -> bool:
    return bool(example.messages[number]["role"] == "assistant")


def with_train_on(example: Example, train_on: TrainOn) -> Example:
    """The example with what the recipe trains on; plain texts are trained on whole, and of compared answers only the answers.

    Raises:
        InvalidExample: It has nothing to train on.
    """
    if not isinstance(example, Conversation):
        return example
    example = replace(example, train_on=train_on)
    check_trained(example)
    return example


def check_trained(example: Conversation) -> None:
    """Raise InvalidExample for a conversation with nothing to train on."""
    if any(message_weights(example)):
        return
    if example.train_on not in ("assistant", "last"):
        why = f"no message is one of data.train_on ({_named(example.train_on)}) with a weight above 0"
    elif all(message["role"] != "assistant" for message in example.messages[example.prompt :]):
        why = f"no message{' of the completion' if example.prompt else ''} is the assistant's"
    elif example.train_on == "last":
        why = "the last assistant message has weight 0"
    else:
        why = "every assistant message has weight 0"
    raise InvalidExample(f"{why}, so there is nothing to train on")


def _named(train_on: TrainOn) -> str:
    return train_on if isinstance(train_on, str) else ", ".join(train_on)


def as_answered(example: Conversation) -> Conversation:
    """The conversation with its last assistant message alone trained on, of those that are trained on if any is: what is evaluated.

    Raises:
        InvalidExample: No message is the assistant's.
    """
    answers = [n for n in range(len(example.messages)) if _is_assistants(example, n)]
    if not answers:
        raise InvalidExample("no message is the assistant's, so there is no answer to evaluate")
    last = (trained_turns(example) or answers)[-1]
    return replace(example, weights={n: float(n == last) for n in range(len(example.messages))}, train_on="assistant")
