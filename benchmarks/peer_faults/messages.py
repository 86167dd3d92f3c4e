"""B20-B23: the content of messages that reaches the tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from harness import Found, injected, trial
from tiny import MARKED, adapted, chat, llama, sft, tokenizer
from transformers.utils import chat_template_utils

CALLING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _calls(name: str, **arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}


def _marked(folder: Path, answer: dict[str, Any], template: str = MARKED) -> str:
    """What of a conversation is learned, where it is to be what the assistant says."""
    words, row = tokenizer(template), chat("say it", "4", "and 2", "42")
    row["messages"][1] |= answer
    with injected():
        trainer = sft(folder, adapted(llama()), [row], words, assistant_only_loss=True)
    return words.decode([token for token in trainer.train_dataset[0]["labels"] if token != -100])


@trial("B20", "TRL SFTTrainer, datasets", r"\bnull\b|\bNone\b|schema")
def nulls_of_a_schema_are_learned(folder: Path) -> Found:
    words = tokenizer(CALLING)
    with injected():
        rows = [_calls("weather", city="Oslo"), _calls("add", x=1, y=2)]
        trainer = sft(folder, adapted(llama()), rows, words)
    first = words.decode(trainer.train_dataset[0]["input_ids"])
    learned = first[first.index('{"') :].split("<|im_end|>")[0]
    return Found("null" in learned, f"beside a row that calls add, a call of weather is learned as {learned}")


@trial("B21", "TRL SFTTrainer", r"\btrain\b|reasoning_content|unknown|unused|ignored")
def keys_that_nothing_reads(folder: Path) -> Found:
    kept = _marked(folder, {"train": False}).startswith("4")
    lost = "because" not in _marked(folder, {"reasoning_content": "because"})
    said = [*['an answer of "train": false is learned'] * kept, *["what stands in reasoning_content is not"] * lost]
    return Found(kept or lost, ", and ".join(said) or "keys that nothing reads are not passed over")


@trial("B22", "TRL SFTTrainer", r"think|content|template")
def template_cuts_an_answer(folder: Path) -> Found:
    cuts = MARKED.replace(
        "m['content'] + '<|im_end|>' }}{% endgen", "m['content'].split('</think>')[-1] + '<|im_end|>' }}{% endgen"
    )
    assert cuts != MARKED
    learned = _marked(folder, {"content": "<think>because</think>4"}, cuts)  # as R1-distill's template does
    return Found(
        "because" not in learned, f'of an answer "<think>because</think>4", "{learned.split("<|im_end|>")[0]}" is learned'
    )


@contextmanager
def _tomorrow() -> Iterator[None]:
    """A day later, for templates."""

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(days=1)

    chat_template_utils.datetime = Later
    try:
        yield
    finally:
        chat_template_utils.datetime = datetime


@trial("B23", "TRL SFTTrainer", r"\bdate\b|strftime|\bday\b")
def template_writes_the_day(folder: Path) -> Found:
    words = tokenizer("{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + MARKED)  # as Llama 3.2's does
    row = chat("hello", "yes")
    with injected():
        learned = sft(folder, adapted(llama()), [row], words).train_dataset[0]["input_ids"]
        with _tomorrow():
            again = sft(folder, adapted(llama()), [row], words).train_dataset[0]["input_ids"]
    return Found(
        again != learned, "trained or asked a day later, the same row is other tokens; no day is kept with the adapter"
    )
