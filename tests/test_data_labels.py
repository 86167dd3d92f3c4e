"""What is learned is what the assistant says and the token that ends it, to the character, after the prompt's own tokens.

The expected texts are written by hand in templates.py; the tokens before an answer are those that the tokenizer itself
makes of the prompt alone.
"""

from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import CHATML, FAMILIES, QWEN3, base_of, bytes_tokenizer, pieces_tokenizer, plain, puts_around, without_end
from tokenizers import Regex, pre_tokenizers

from trimtab.data import (
    Conversation,
    Judged,
    LengthLimit,
    Preference,
    SourceReport,
    Text,
    tokenize_answers,
    tokenize_examples,
    tokenize_prompt,
)
from trimtab.data.example import TokenRow
from trimtab.data.rendering import template_messages


def conversation(*texts, system=None, context_only=(), **more):
    """Turn and turn about, the user first."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return Conversation(tuple(messages), "data:1", weights=dict.fromkeys(context_only, 0.0), **more)


def completion(prompt, answer):
    return conversation(prompt, answer, is_completion=True)


def sequences_of(example, base, **limits):
    report = SourceReport(("data",))
    made = tokenize_examples([example], base, report, LengthLimit(**limits))
    assert report.rejected == []
    assert report.used == 1
    assert {sequence.where for sequence in made} == {example.where}
    return made


def refusal(example, base, **limits):
    report = SourceReport(("data",))
    assert tokenize_examples([example], base, report, LengthLimit(**limits)) == []
    assert report.used == 0
    ((where, reason),) = report.rejected
    assert where == example.where
    return reason


def decoded(base, ids):
    return base.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


def encoded(base, text):
    return base.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def runs(sequence):
    """The learned tokens as (first, last) of each stretch without a gap."""
    found = []
    for t in sequence.target_indices:
        if found and found[-1][1] == t - 1:
            found[-1][1] = t
        else:
            found.append([t, t])
    return found


def said(base, sequence):
    """The text of each learned stretch, as it reads after what stands before it."""
    texts = []
    for first, last in runs(sequence):
        before = decoded(base, sequence.ids[:first])
        whole = decoded(base, sequence.ids[: last + 1])
        assert whole.startswith(before)
        texts.append(whole[len(before) :])
    return texts


def learns_exactly_the_answers(family, example, base=None):
    """Check everything that is promised of a conversation's labels; returns its sequences."""
    base = base or family.make()
    made = sequences_of(example, base)
    turns = [n for n, m in enumerate(example.messages) if m["role"] == "assistant" and example.weights.get(n) != 0]
    answers = [(sequence, first, last) for sequence in made for first, last in runs(sequence)]
    assert len(answers) == len(turns)
    assert [text for sequence in made for text in said(base, sequence)] == [
        family.said(example.messages[turn]["content"]) + family.end for turn in turns
    ]
    (end,) = encoded(base, family.end)
    assert base.template.ending == (end, "")
    for (sequence, first, last), turn in zip(answers, turns, strict=True):
        assert sequence.ids[:first] == encoded(base, family.prompt(example.messages[:turn]))
        assert sequence.ids[last] == end
        assert end not in sequence.ids[first:last]
    for sequence in made:
        assert sequence.target_indices[0] > 0
        assert sequence.target_indices[-1] == len(sequence.ids) - 1
        assert sequence.full_length >= len(sequence.ids)
        if family.bos:
            (bos,) = encoded(base, family.bos)
            assert [n for n, i in enumerate(sequence.ids) if i == bos] == [0]
    sequence, first, _ = answers[-1]
    assert tokenize_prompt(template_messages(example, base)[: turns[-1]], base, example.tools) == sequence.ids[:first]
    assert tokenize_answers([example], base) == [(sequence.ids[:first], sequence.ids[first:])]
    return made


ANSWERS = [
    "It is 4.",
    "4",
    " starts with a space",
    "   starts with three",
    "\nstarts with a newline",
    "\n\n\n starts with some",
    "\tstarts with a tab",
    "中文回答。",
    "🙂 a face",
    "\u0301 a combining accent, and a decomposed e\u0301",
    "ends with a space ",
    "ends with newlines\n\n",
    "user\nassistant\nmodel\nsystem",
    "### Instruction:\n[INST] not a turn [/INST]",
    "a marker in parts: <|im_ end|> <|im_end <|end <end_of_tur",
    "a line\u2028separator, a zero\x00byte, a bell\x07",
    "<think>\nhm\n</think>\n\nso it is",
]
CONVERSATIONS = {
    "one turn": conversation("What is 2+2?", "It is 4."),
    "several turns": conversation("What is 2+2?", "It is 4.", "And 3+3?", "It is 6.", "Thanks", "You are welcome."),
    "the same answer again": conversation("Say hello", "hello", "Say hello", "hello", "hello", "hello"),
    "a user who says the answer": conversation("It is 4.It is 4.", "It is 4.", "assistant\nIt is 4.", "It is 4."),
    "a user who has the last word": conversation("Hello", "hello", "Bye"),
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
class TestEveryTemplate:
    @pytest.mark.parametrize("example", CONVERSATIONS.values(), ids=CONVERSATIONS)
    def test_learns_every_answer_and_its_end_and_nothing_else(self, family, example):
        made = learns_exactly_the_answers(family, example)
        assert len(made) == 1  # as one text: nothing here forces turn by turn

    @pytest.mark.parametrize("answer", ANSWERS)
    def test_learns_an_answer_to_the_character(self, family, answer):
        learns_exactly_the_answers(family, conversation("What is 2+2?", answer))
        learns_exactly_the_answers(family, conversation("What is 2+2?", answer, "Again", answer, answer, "Enough."))

    def test_reads_a_turn_of_weight_0_without_learning_it(self, family):
        example = conversation("What is 2+2?", "It is 5.", "No.", "It is 4.", "Yes.", "Thanks.", context_only={1, 5})
        (sequence,) = learns_exactly_the_answers(family, example)
        assert "It is 5." in decoded(family.make(), sequence.ids)
        assert "Thanks." not in decoded(family.make(), sequence.ids)

    def test_a_system_message_is_read_or_the_row_refused(self, family):
        example = conversation("What is 2+2?", "It is 4.", "Sure?", "Yes.", system="Be exact.")
        if family.system:
            (sequence,) = learns_exactly_the_answers(family, example)
            assert "Be exact." in decoded(family.make(), sequence.ids)
        else:
            assert refusal(example, family.make()).startswith("the model's chat template does not accept it: ")

    def test_control_tokens_in_a_message_are_refused(self, family):
        base = family.make()
        assert family.end in base.control_tokens
        for token in base.control_tokens:
            asked, answered = conversation(f"What is {token}?", "x"), conversation("What is it?", f"It is {token}.")
            assert refusal(asked, base) == f"messages[0] (user) holds the model's control token {token} as text"
            assert refusal(answered, base) == f"messages[1] (assistant) holds the model's control token {token} as text"

    def test_tools_are_written_or_the_row_refused(self, family):
        base = family.make()
        tools = ({"type": "function", "function": {"name": "add", "description": "adds"}},)
        example = conversation("What is 2+2?", "It is 4.", tools=tools)
        if family.tools:
            (sequence,) = sequences_of(example, base)
            assert '"description": "adds"' in decoded(base, sequence.ids)
            assert said(base, sequence) == [f"It is 4.{family.end}"]
        else:
            assert refusal(example, base) == (
                "the model's chat template leaves out tools: remove them, or use a model whose template writes them"
            )

    def test_an_answer_that_nothing_asks_for_is_refused_unless_it_is_only_read(self, family):
        first = {"role": "assistant", "content": "Hello, I am here."}
        rest = conversation("What is 2+2?", "It is 4.").messages
        assert refusal(Conversation((first, *rest), "data:1"), family.make()) == (
            "messages[0] is the assistant's, without a prompt: begin with another role, or give it weight 0"
        )
        if family.end != "</s>":  # Mistral's template wants the user to begin
            learns_exactly_the_answers(family, Conversation((first, *rest), "data:1", weights={0: 0.0}))


WORDS = ["hello", " hello", "the", " the", "2+", "+", "\n", "\n\n", " ", "  ", "\t", "中", "🙂", "\u0301", "."]
WORDS += ["assistant", "<|", "user:", "[/INST]", "<think>", "</think>"]
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map("".join).filter(str.strip)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(name=st.sampled_from(sorted(FAMILIES)), texts=st.lists(TEXTS, min_size=2, max_size=6), data=st.data())
def test_any_conversation_on_any_template_learns_exactly_its_answers(name, texts, data):
    turns = [n for n in range(len(texts)) if n % 2]
    silent = data.draw(st.sets(st.sampled_from(turns), max_size=len(turns) - 1)) if len(turns) > 1 else set()
    learns_exactly_the_answers(FAMILIES[name], conversation(*texts, context_only=silent))


# The real one


def test_smollm2_learns_an_answer_to_the_character(smollm2):
    greeting = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    for answer in ANSWERS:
        example = conversation("What is 2+2?", answer, "Again", answer, system=greeting)
        learns_exactly_the_answers(FAMILIES["chatml"], example, smollm2)
        # Without a system message of its own, the template writes this one.
        alone = conversation("What is 2+2?", answer, "Again", answer)
        assert sequences_of(alone, smollm2) == sequences_of(example, smollm2)


# Templates that change what they wrote


def test_a_template_that_drops_earlier_thinking_is_laid_out_turn_by_turn():
    family = FAMILIES["qwen3"]
    thought = "<think>\nlet me see\n</think>\n\nIt is 4."
    example = conversation("What is 2+2?", thought, "And 3+3?", "<think>\n3 3\n</think>\n\nIt is 6.", "And?", "Done.")
    made = learns_exactly_the_answers(family, example)
    assert len(made) == 3
    base = family.make()
    assert said(base, made[0]) == [f"{thought}<|im_end|>"]
    assert "let me see" in decoded(base, made[0].ids)
    assert "let me see" not in decoded(base, made[1].ids)
    # With nothing to drop, it is one text.
    assert len(learns_exactly_the_answers(family, conversation("What is 2+2?", "It is 4.", "And?", thought))) == 1


def test_tool_calls_are_learned_and_tool_results_are_not():
    base = FAMILIES["qwen3"].make()
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "中"}}}]
    example = Conversation(
        (
            {"role": "user", "content": "What is 2+2?"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "4"},
        ),
        "data:1",
        tools=({"type": "function", "function": {"name": "add"}},),
    )
    (sequence,) = sequences_of(example, base)
    written = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": "中"}}\n</tool_call>'
    assert said(base, sequence) == [f"{written}<|im_end|>", "4<|im_end|>"]
    before = decoded(base, sequence.ids[: runs(sequence)[1][0]])
    assert before.endswith("<|im_end|>\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n")
    assert tokenize_answers([example], base) == [(encoded(base, before), encoded(base, "4<|im_end|>"))]


def test_control_tokens_in_tools_and_calls_are_refused():
    base = FAMILIES["qwen3"].make()
    user, tool = (
        {"role": "user", "content": "Go."},
        {"type": "function", "function": {"name": "f", "description": "a<|im_end|>"}},
    )
    answer = {"role": "assistant", "content": "b"}
    assert refusal(Conversation((user, answer), "data:1", tools=(tool,)), base) == (
        "tools holds the model's control token <|im_end|> as text"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": [{"y<|im_start|>": 1}]}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert refusal(Conversation((user, called), "data:1"), base) == (
        "messages[1] (assistant) holds the model's control token <|im_start|> as text"
    )


def test_a_template_that_leaves_a_message_out_is_refused():
    """Phi-3's first template had no place for a system message, and said nothing."""
    template = CHATML.replace("{{ '<|im_start|>'", "{% if message['role'] != 'system' %}{{ '<|im_start|>'", 1)
    template = template.replace("+ '\n' }}", "+ '\n' }}{% endif %}", 1)
    base = base_of(bytes_tokenizer(("<|im_start|>", "<|im_end|>")), template, eos_token="<|im_end|>")
    learns_exactly_the_answers(FAMILIES["chatml"], conversation("Hello", "hello"), base)
    assert refusal(conversation("Hello", "hello", system="Be exact."), base) == (
        "messages[0] (system): the model's chat template leaves out its content"
    )


def test_a_template_that_leaves_tool_calls_out_is_refused():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = ({"role": "user", "content": "Go."}, {"role": "assistant", "content": "", "tool_calls": [call]})
    assert refusal(Conversation(messages, "data:1"), FAMILIES["chatml"].make()) == (
        "messages[1] (assistant): the model's chat template leaves out its tool_calls"
    )


def keyed(number, key, value):
    messages = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Yes."}]
    messages[number][key] = value
    return Conversation(tuple(messages), "data:1")


@pytest.mark.parametrize(("key", "value"), [("loss", False), ("train", False), ("reasoning_content", "Because.")])
@pytest.mark.parametrize("number", [0, 1])
def test_a_key_of_a_message_that_nothing_reads_is_refused(key, value, number):
    """What says `"loss": false` would be trained on all the same."""
    why = f"the key {key} is not used: a message with weight: 0 is not trained on; ignore the key"
    if key == "reasoning_content":
        why = f"the model's chat template does not write {key}: put it into the content, as <think>…</think>, or ignore it"
    role = ("user", "assistant")[number]
    assert refusal(keyed(number, key, value), FAMILIES["chatml"].make()) == (
        f"messages[{number}] ({role}): {why} with data.ignore=[{key}]"
    )


def test_a_key_of_a_message_that_the_template_writes_is_read():
    """The negative control."""
    reads = CHATML.replace("{{ '<|im_start|>'", "{{ message['note'] or '' }}{{ '<|im_start|>'", 1)
    base = base_of(bytes_tokenizer(("<|im_start|>", "<|im_end|>")), reads, eos_token="<|im_end|>")
    (sequence,) = sequences_of(keyed(0, "note", "Quickly."), base)
    assert decoded(base, sequence.ids).startswith("Quickly.")


def test_a_template_that_ends_no_turn_by_a_token_is_refused():
    assert without_end().template.ending is None
    assert refusal(conversation("Hello", "hello"), without_end()) == (
        "the model's chat template ends an assistant turn with no special token, so the model could not learn to stop; "
        "use a template that does, or prompt/completion examples with a base that has no template"
    )


def test_white_space_that_is_a_token_of_its_own_ends_no_turn():
    """Gemma has such tokens for runs of newlines."""
    tokenizer = bytes_tokenizer(("<|endoftext|>",))
    tokenizer.add_tokens(["\n\n"])
    base = base_of(tokenizer, without_end().tokenizer.chat_template, eos_token="<|endoftext|>")
    assert base.template.ending is None


def test_an_end_of_turn_that_is_not_marked_special_counts_as_one():
    tokenizer = bytes_tokenizer(("<|im_start|>",))
    tokenizer.add_tokens(["<|im_end|>"])
    base = base_of(tokenizer, CHATML)
    example = conversation("What is <b>?", "It is <|im_end|>.")
    assert base.control_tokens == ("<|im_end|>", "<|im_start|>")
    assert refusal(example, base) == "messages[1] (assistant) holds the model's control token <|im_end|> as text"
    learns_exactly_the_answers(FAMILIES["chatml"], CONVERSATIONS["several turns"], base)


def test_a_call_that_ends_in_another_token_is_learned_to_it():
    """Llama 3.1 ends a tool call with <|eom_id|>."""
    end = "{{ '<|im_end|>\n' }}{% endfor %}"
    template = QWEN3.replace(end, end.replace("'<|im_end|>\n'", "'<|eom|>' if message['tool_calls'] else '<|im_end|>\n'"))
    base = base_of(bytes_tokenizer(("<|im_start|>", "<|im_end|>", "<|eom|>")), template)
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    example = Conversation((*conversation("Hi", "hello", "Go.").messages, called), "data:1")
    (sequence,) = sequences_of(example, base)
    written = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert said(base, sequence) == ["hello<|im_end|>", f"{written}<|eom|>"]
    assert {base.tokenizer.convert_ids_to_tokens(i) for i in base.stop_ids} == {"<|im_end|>", "<|eom|>"}


def test_an_answer_that_ends_otherwise_than_others_is_refused_and_accounted_for():
    template = CHATML.replace("'<|im_end|>' +", "('<|eom|>' if 'two' in message['content'] else '<|im_end|>') +")
    base = base_of(bytes_tokenizer(("<|im_start|>", "<|im_end|>", "<|eom|>")), template)
    report = SourceReport(("data",))
    rows = [conversation("a", "b"), replace(conversation("c", "two"), where="data:2"), conversation("c", "d")]
    assert len(tokenize_examples(rows, base, report)) == 2
    reason = (
        "messages[1] (assistant): the model's chat template does not write its content unchanged: 'two' becomes 'two<|eom|>\\n'"
    )
    assert (report.used, report.rejected) == (2, [("data:2", reason)])


def test_a_template_whose_prompt_does_not_begin_its_answer_is_refused():
    template = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\nAnswer: ' }}")
    base = base_of(bytes_tokenizer(("<|im_start|>", "<|im_end|>")), template)
    assert refusal(conversation("Hi", "hello", "Hi", "hello"), base) == (
        "messages[1] (assistant): the chat template ends the prompt with 'Answer: ', and writes 'hello<|im_end|>\\n' there when the "
        "answer follows, so training would not see what generation sees"
    )


def test_what_the_template_says_against_a_conversation_is_the_reason():
    example = conversation("Hi", "hello", system="Be exact.")
    assert refusal(example, FAMILIES["gemma"].make()) == (
        "the model's chat template does not accept it: System role not supported"
    )


def test_a_control_token_that_swallows_the_answers_white_space_is_refused():
    """Phi-3's <|assistant|> takes the white space behind it, which the model then could not be told from."""
    from tokenizers import AddedToken

    tokenizer = bytes_tokenizer(("<|im_start|>", "<|im_end|>"))
    tokenizer.add_special_tokens([AddedToken("<|speak|>", normalized=False, special=True, rstrip=True)])
    base = base_of(tokenizer, CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|speak|>' }}").replace(
        "'<|im_start|>' + message['role'] + '\n'", "('<|speak|>' if message['role'] == 'assistant' else '<|im_start|>')"
    ))  # fmt: skip
    (sequence,) = sequences_of(conversation("Hi", "hello"), base)
    assert said(base, sequence) == ["hello<|im_end|>"]
    for answer in (" hello", " \x01hello"):  # what comes apart stands before and behind what it should be in an alphabet
        assert refusal(conversation("Hi", answer), base) == (
            "the tokenizer joins the end of the prompt with the start of the answer, and cannot write them separately"
        )


# Prompt and completion, and text, without a template


BASES = {
    "bare": lambda: plain(),
    "bos": lambda: plain(bos=True),
    "eos behind": lambda: plain(eos_behind=True),
    "both": lambda: plain(bos=True, eos_behind=True),
}
PAIRS = [
    ("hello", " world"),
    ("Question: what?\nAnswer:", " 4"),
    ("### Response:\n\n", "hello"),
    ("### Response:\n\n", "\n\nhello"),
    ("2+", "+ 2"),
    ("hel", "lo the"),
    ("中", "文🙂"),
    ("e", "\u0301"),
    ("x  ", "  y"),
]


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(("prompt", "answer"), PAIRS)
def test_a_completion_is_learned_to_the_character_after_the_prompts_own_tokens(name, prompt, answer):
    base = BASES[name]()
    (sequence,) = sequences_of(completion(prompt, answer), base)
    bos = [base.tokenizer.bos_token_id] if "bos" in name or name == "both" else []
    before = bos + encoded(base, prompt)
    assert sequence.ids[: len(before)] == before
    assert sequence.target_indices == list(range(len(before), len(sequence.ids)))
    assert said(base, sequence) == [f"{answer}</s>"]
    assert sequence.ids.count(base.end_of_text) == 1
    assert tokenize_prompt([{"role": "user", "content": prompt}], base) == before


def test_the_pairs_above_hold_tokens_that_join_and_prompts_that_divide_in_another_way():
    base = plain()

    def tokens(text):
        return base.tokenizer.convert_ids_to_tokens(encoded(base, text))

    assert tokens("2++ 2")[1] == "++"
    assert tokens("hello")[0] == "hello"
    # No token lies across the border here, and yet the prompt's tokens are others once the answer follows.
    assert tokens("Response:\n\n")[-1] == "ĊĊ"
    assert tokens("Response:\n\nhello")[-3:] == ["Ċ", "Ċ", "hello"]


@pytest.mark.parametrize(("look", "alone", "followed"), [
    (r"se(?=nX)|en|[^X]|X", ["s", "en"], ["se", "n"]), (r"en(?=X)|se(?=n$)|[^X]|X", ["se", "n"], ["s", "en"]),
])  # fmt: skip
def test_a_prompt_that_divides_in_another_way_keeps_its_own_tokens(look, alone, followed):
    """Whichever of the two comes first in the vocabulary, and no token lies across the border."""
    tokenizer = bytes_tokenizer(("</s>",))
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(look), "isolated"), letters])
    base = base_of(tokenizer, eos_token="</s>")

    def tokens(text):
        return base.tokenizer.convert_ids_to_tokens(encoded(base, text))

    assert tokens("sen") == alone
    assert tokens("senX")[:-1] == followed
    (sequence,) = sequences_of(completion("sen", "X"), base)
    assert base.tokenizer.convert_ids_to_tokens(sequence.ids) == [*alone, "X", "</s>"]
    assert sequence.target_indices == [2, 3]


def test_pieces_that_cannot_be_written_apart_are_refused():
    """A tokenizer that puts a space before every text puts one before an answer of its own, too."""
    base = base_of(pieces_tokenizer(("<s>", "</s>")), eos_token="</s>")
    (sequence,) = sequences_of(completion("hello", " world"), base)
    assert said(base, sequence) == [" world</s>"]
    assert refusal(completion("hello wor", "ld"), base) == (
        "the tokenizer joins the end of the prompt with the start of the answer, and cannot write them separately"
    )


@pytest.mark.parametrize("name", BASES)
def test_of_a_text_every_token_but_the_first_is_learned_and_its_end(name):
    base = BASES[name]()
    for text in ("hello world", "\n\n 中文🙂 ", "a"):
        (sequence,) = sequences_of(Text(text, "data:1"), base)
        bos = [base.tokenizer.bos_token_id] if name in ("bos", "both") else []
        assert sequence.ids == [*bos, *encoded(base, text), base.end_of_text]
        assert sequence.target_indices == list(range(1, len(sequence.ids)))


def test_the_end_of_a_text_is_put_behind_whatever_its_number():
    """In SmolLM2's vocabulary it comes before all letters."""
    first = pieces_tokenizer(())  # whose first token is <unk>
    base = base_of(first, eos_token="<unk>")
    assert base.end_of_text == 0
    (sequence,) = sequences_of(Text("hello world", "data:1"), base)
    assert sequence.ids == [*encoded(base, "hello world"), 0]


def test_a_bos_or_eos_that_a_text_brings_along_is_not_doubled():
    base = plain(bos=True, eos_behind=True)
    alone = sequences_of(Text("hello world", "data:1"), base)
    for text in ("<s>hello world", "hello world</s>", "<s>hello world</s>"):
        assert sequences_of(Text(text, "data:1"), base) == alone
    (pair,) = sequences_of(completion("<s>hello", " world</s>"), base)
    assert pair.ids == alone[0].ids
    assert tokenize_prompt(completion("<s>hello", " world</s>").messages, base) == encoded(base, "<s>hello")


def test_tokens_that_stand_before_a_text_are_never_learned():
    """GLM's tokenizer puts two."""
    from tokenizers import processors

    tokenizer = bytes_tokenizer(("[gMASK]", "<sop>", "</s>"))
    named = [(token, tokenizer.token_to_id(token)) for token in ("[gMASK]", "<sop>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=named)
    base = base_of(tokenizer, eos_token="</s>")
    (sequence,) = sequences_of(Text("hello world", "data:1"), base)
    assert said(base, sequence) == ["hello world</s>"]
    assert sequence.target_indices[0] == 2


def test_without_an_end_of_text_a_completion_is_refused_and_a_text_is_not():
    base = base_of(bytes_tokenizer(("<s>",)))
    assert refusal(completion("hello", " world"), base) == (
        "the tokenizer has no end-of-text token, so the model could not learn to stop: set its eos_token"
    )
    (sequence,) = sequences_of(Text("hello world", "data:1"), base)
    assert said(base, sequence) == [" world"]


def test_a_text_of_one_token_has_nothing_to_learn():
    assert refusal(Text("a", "data:1"), base_of(bytes_tokenizer(("<s>",)))) == "has no token to train on"


def test_a_conversation_needs_a_template():
    assert refusal(conversation("Hi", "hello", system="Be exact."), plain()) == (
        "is a conversation, and this model has no chat template to write it with. Either give it one (model.chat_template: a file with the "
        "template of a model that was trained like it), or give prompt/completion or text examples, which a base model reads as they are"
    )


def test_prompt_and_completion_are_a_conversation_where_there_is_a_template():
    base = FAMILIES["chatml"].make()
    assert sequences_of(completion("Hi", "hello"), base) == sequences_of(conversation("Hi", "hello"), base)


def test_a_text_is_plain_where_there_is_a_template():
    base = FAMILIES["llama3"].make()
    (sequence,) = sequences_of(Text("hello world", "data:1"), base)
    assert decoded(base, sequence.ids) == "<|begin_of_text|>hello world<|end_of_text|>"
    assert said(base, sequence) == ["hello world<|end_of_text|>"]


def test_offsets_without_white_space_change_nothing():
    """Some tokenizers count a token's leading space as before it; the labels must not lean on that."""
    trimmed = base_of(bytes_tokenizer(("<|im_start|>", "<|im_end|>"), trim_offsets=True), CHATML)
    full = base_of(bytes_tokenizer(("<|im_start|>", "<|im_end|>")), CHATML)
    for answer in ANSWERS:
        example = conversation("What is 2+2?", answer, "Again", answer)
        assert sequences_of(example, trimmed) == sequences_of(example, full)
        assert sequences_of(Text(answer * 2, "data:1"), trimmed) == sequences_of(Text(answer * 2, "data:1"), full)


def test_a_bos_that_the_template_does_not_write_is_not_there():
    tokenizer = puts_around(bytes_tokenizer(("<s>", "<|im_start|>", "<|im_end|>")), before="<s>", behind="<|im_end|>")
    base = base_of(tokenizer, CHATML, bos_token="<s>")
    for example in CONVERSATIONS.values():
        (sequence,) = learns_exactly_the_answers(FAMILIES["chatml"], example, base)
        assert base.tokenizer.bos_token_id not in sequence.ids


def test_pad_and_eos_may_be_one_token():
    base = FAMILIES["chatml"].make()
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == base.template.ending.token
    (sequence,) = sequences_of(conversation("Hi", "hello", "Hi", "hello"), base)
    assert [sequence.ids[last] for _, last in runs(sequence)] == [base.template.ending.token] * 2
    # The user's turns end with the same token, which is not learned there.
    assert sequence.ids.count(base.template.ending.token) == 4


def test_the_prompt_is_that_of_the_last_answer_to_learn():
    base = FAMILIES["chatml"].make()
    example = conversation("Hi", "hello", "Bye", "the end", context_only={3})
    assert tokenize_answers([example], base) == [
        (encoded(base, FAMILIES["chatml"].prompt(example.messages[:1])), encoded(base, "hello<|im_end|>"))
    ]


def test_puts_around_really_puts_tokens_around():
    base = plain(bos=True, eos_behind=True)
    assert base.tokenizer("hello")["input_ids"][0] == base.tokenizer.bos_token_id
    assert base.tokenizer("hello")["input_ids"][-1] == base.tokenizer.eos_token_id
    assert puts_around(bytes_tokenizer(("<s>",)), before="<s>").encode("a").tokens == ["<s>", "a"]


# Lengths


def long_conversation():
    return conversation("one", "hello " * 10, "two", "the " * 10, "three", "answer " * 10)


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "qwen3"])
def test_a_row_fits_up_to_the_end_of_its_last_answer(name):
    base = FAMILIES[name].make()
    (sequence,) = sequences_of(long_conversation(), base)
    length = len(sequence.ids)
    assert sequences_of(long_conversation(), base, tokens=length) == [sequence]
    reason = f"has {length} tokens up to the end of its last answer, more than max_length {length - 1}"
    assert refusal(long_conversation(), base, tokens=length - 1) == reason
    # What follows the last answer does not count.
    more = Conversation((*long_conversation().messages, {"role": "user", "content": "and so on " * 50}), "data:1")
    (longer,) = sequences_of(more, base, tokens=length)
    assert (longer.ids, longer.target_indices) == (sequence.ids, sequence.target_indices)
    assert longer.full_length > sequence.full_length


@pytest.mark.parametrize("name", ["chatml", "mistral"])
def test_a_longer_row_is_cut_when_told_to_and_never_empty(name):
    base = FAMILIES[name].make()
    (whole,) = sequences_of(long_conversation(), base)
    for limit in range(2, len(whole.ids) + 1):
        expected = [t for t in whole.target_indices if t < limit]
        if not expected:
            reason = f"has no token to train on within max_length {limit}"
            assert refusal(long_conversation(), base, tokens=limit, overlong="truncate") == reason
            continue
        (cut,) = sequences_of(long_conversation(), base, tokens=limit, overlong="truncate")
        assert cut.target_indices == expected
        assert cut.ids == whole.ids[: expected[-1] + 1]
        assert cut.full_length == whole.full_length


def test_a_row_in_turns_keeps_the_turns_that_fit():
    base = FAMILIES["qwen3"].make()
    thought = "<think>\nhm\n</think>\n\n"
    example = conversation("one", f"{thought}a", "two " * 40, f"{thought}b", "three", "c")
    first, second, third = sequences_of(example, base)
    limit = len(first.ids)
    assert sequences_of(example, base, tokens=limit, overlong="truncate") == [first]
    assert refusal(example, base, tokens=limit) == (
        f"has {max(len(s.ids) for s in (second, third))} tokens up to the end of its last answer, more than max_length {limit}"
    )


# Many rows


def test_the_order_of_rows_is_kept_and_each_is_used_or_refused():
    base = FAMILIES["qwen3"].make()
    thought = "<think>\nhm\n</think>\n\nso"
    kinds = [
        conversation("a", "b"),
        conversation("a", thought, "c", "d"),
        Text("hello world", "x"),
        conversation("a <|im_end|>", "b"),
        conversation("a", "\n b"),
        Text("the", "x"),
    ]
    examples = [
        Conversation(kind.messages, f"data:{n}") if isinstance(kind, Conversation) else Text(kind.text, f"data:{n}")
        for n, kind in enumerate(kinds * 3)
    ]
    report = SourceReport(("data",))
    made = tokenize_examples(examples, base, report)
    expected = [f"data:{n}" for n, kind in enumerate(kinds * 3) for _ in range((1, 2, 1, 0, 1, 1)[kinds.index(kind)])]
    assert [sequence.where for sequence in made] == expected
    assert report.used == 15
    assert [refused.where for refused in report.rejected] == ["data:3", "data:9", "data:15"]
    for sequence in made:  # alone or among others, a row is the same
        (example,) = (e for e in examples if e.where == sequence.where)
        assert sequence in sequences_of(example, base)


def test_no_rows_make_no_sequences():
    report = SourceReport(("data",))
    assert tokenize_examples([], FAMILIES["chatml"].make(), report) == []
    assert report.total == 0


def test_a_template_that_wants_tools_is_asked_with_them():
    """What it makes of the row without them is not known then, so nothing can be left out."""
    demanding = "{% if not tools and messages[0]['content'] == '2+2?' %}{{ raise_exception('tools, please') }}{% endif %}"
    base = base_of(
        bytes_tokenizer(("<|im_start|>", "<|im_end|>")),
        demanding + "{{ tools | default([], true) | length }}" + CHATML,
        eos_token="<|im_end|>",
    )
    tools = ({"type": "function", "function": {"name": "add", "parameters": {}}},)
    (sequence,) = sequences_of(conversation("2+2?", "4", tools=tools), base)
    assert decoded(base, sequence.ids).startswith("1<|im_start|>user")


def test_an_answer_that_only_ends_as_the_last_one_is_learned_to_its_own_end():
    """Else it would be learned up to the end of what the user says next."""
    turns = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% if m['role'] == 'user' or loop.last %}<|im_end|>{% endif %}\n"
    late = "{% for m in messages %}" + turns + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    base = base_of(bytes_tokenizer(("<|im_start|>", "<|im_end|>")), late, eos_token="<|im_end|>")
    made = sequences_of(conversation("2+2?", "4", "And 3+3?", "6"), base)
    learned = [decoded(base, [sequence.ids[t] for t in sequence.target_indices]) for sequence in made]
    assert learned == ["4<|im_end|>", "6<|im_end|>"]
    (joining,) = sequences_of(conversation("2+2?", "\n\n4", "And 3+3?", "6", context_only={3}), base)
    assert decoded(base, [joining.ids[t] for t in joining.target_indices]) == "\n\n4<|im_end|>"
    assert "ĊĊ" in base.tokenizer.convert_ids_to_tokens(encoded(base, "assistant\n\n\n4")), "a token across the border"


@pytest.mark.parametrize("made", [
    Text("a", "row"), conversation("a", "b"), Preference(conversation("a", "b"), conversation("a", "c"), "row"),
    Judged(conversation("a", "b"), True, "row"), TokenRow([5, 6], [1], "row"),
])  # fmt: skip
def test_rows_stay_as_they_were_read(made):
    with pytest.raises(FrozenInstanceError):
        made.where = "another"
    assert not isinstance(made, TokenRow) or (made.full_length, made.reference, made.side) == (0, 0.0, None)


@pytest.mark.parametrize("prompts", [("2+2?", "3+3?"), ("3+3?", "2+2?")])
def test_answers_to_different_prompts_are_not_compared(prompts):
    """Rows that are read never come so far; pairs made in Python may."""
    chosen, rejected = (conversation(prompt, answer) for prompt, answer in zip(prompts, "45", strict=True))
    reason = refusal(Preference(chosen, rejected, "data:1"), FAMILIES["chatml"].make())
    assert reason == "chosen and rejected come after different tokens, so they can't be compared"
