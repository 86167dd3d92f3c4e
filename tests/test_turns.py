"""What a turn teaches where the template writes the prompt otherwise once the answer follows it.

The templates are trl's where it ships one that does so; the others are those of the families named, without what does not matter here.
"""

from functools import cache

import pytest
from chat_templates import CALLS, FOLDER, RESULT, TOOLS, base, base_with
from test_chat_templates import runs

from trimtab.data import SourceReport, tokenize_examples
from trimtab.data.formats import read_examples

IM_END = "<|im_end|>"


def user(content):
    return {"role": "user", "content": content}


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


def taught(on, *messages):
    """(The prompt, what is trained on), a pair a turn, or why the row is refused."""
    report = SourceReport(("rows",))
    row = {"messages": list(messages), **({"tools": TOOLS} if any("tool_calls" in m for m in messages) else {})}
    sequences = tokenize_examples(list(read_examples([("rows:1", row)], {}, report)), on, report)
    return report.rejected[0].reason if report.rejected else list(runs(on, sequences))


def answers(on, *messages):
    found = taught(on, *messages)
    return found if isinstance(found, str) else [answer for _, answer in found]


ONE, FIRST = user("One?"), said("First.")
HM = said("First.", reasoning_content="Hm.")

# trl's


def test_reasoning_that_later_turns_leave_out_is_trained_on_where_it_stands():
    """GPT-OSS drops the reasoning before a call once the answer follows: the prompt keeps it, as it does in generation."""
    call = said("", tool_calls=CALLS, reasoning_content="Hm.")
    (_, one), (before, other) = taught(base("gptoss"), ONE, call, RESULT, said("Second.", reasoning_content="Well."))
    assert one.startswith("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.weather")
    assert "<|channel|>analysis<|message|>Hm.<|end|>" in before
    assert before.endswith("<|start|>assistant")
    assert other == "<|channel|>analysis<|message|>Well.<|end|><|start|>assistant<|channel|>final<|message|>Second.<|return|>"


@pytest.mark.parametrize(
    ("name", "between"),
    [
        ("deepseek_r1_distill", "\n</think>\n\n"), ("deepseekv3", "\n</think>\n\n"), ("nemotron_3_nano", "\n</think>\n"),
        ("nemotron_3_ultra", "</think>"), ("qwen3_8", "\n</think>\n\n"),
    ],
)  # fmt: skip
def test_reasoning_that_the_prompt_has_begun_need_not_be_begun_in_the_content(name, between):
    ending = "<｜end▁of▁sentence｜>" if name.startswith("deepseek") else IM_END
    assert answers(base(name), ONE, said("Hm.\n</think>\n\nFirst.")) == [f"Hm.{between}First.{ending}"]
    assert answers(base(name), ONE, said("<think>\nHm.\n</think>\n\nFirst.")) == [f"Hm.{between}First.{ending}"]


def test_an_empty_reasoning_in_the_content_is_closed_once():
    (answer,) = answers(base("deepseek_r1_distill"), ONE, said("<think>\n\n</think>\n\nFirst."))
    assert answer == "\n</think>\n\nFirst.<｜end▁of▁sentence｜>"


@pytest.mark.parametrize("name", ["lfm2_2_5", "qwen2_5", "llama3", "gptoss"])
def test_where_no_prompt_begins_reasoning_the_end_of_one_is_text_like_any_other(name):
    (answer,) = answers(base(name), ONE, said("Write </think> at the end."))
    assert "Write </think> at the end." in answer


def test_an_argument_is_found_as_python_writes_it():
    arguments = '{"city": "Å \\"q\\"\\nx"}'
    calls = [{**CALLS[0], "function": {"name": "weather", "arguments": arguments}}]
    assert answers(base("lfm2_v2"), ONE, said("", tool_calls=calls)) == [
        "<|tool_call_start|>[weather(city='Å \"q\"\\nx')]<|tool_call_end|><|im_end|>"
    ]


def test_an_assistant_that_speaks_twice_is_heard_twice():
    first, second = taught(base("qwen3"), ONE, FIRST, said("More."))
    assert first[1] == "<think>\n\n</think>\n\nFirst.<|im_end|>"
    assert second[0].endswith("<think>\n\n</think>\n\nFirst.<|im_end|>\n<|im_start|>assistant\n")
    assert second[1] == "<think>\n\n</think>\n\nMore.<|im_end|>"


def test_a_turn_ends_with_the_first_token_that_ends_it():
    """Phi-3's template writes another behind the conversation, if the tokenizer's own is the one that ends a turn."""
    source = (FOLDER / "phi3.jinja").read_text(encoding="utf-8")
    assert base_with(source, "<|end|>").template.render([ONE, FIRST]).endswith("First.<|end|>\n<|end|>")
    assert answers(base_with(source, "<|end|>"), ONE, FIRST) == ["First.<|end|>"]


# Of families that trl does not ship


def chatml(answer, prompt):
    """A template that writes an answer so, and ends a prompt so."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}" + answer + "{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n" + prompt + "{% endif %}"
    )  # fmt: skip


def writes(opens, closes, answer="{{ m.content }}", otherwise=""):
    return f"{{% if m.reasoning_content %}}{opens}{{{{ m.reasoning_content }}}}{closes}{{% else %}}{otherwise}{{% endif %}}{answer}"


TEMPLATES = {
    "glm 4.7": chatml(writes("<think>", "</think>", otherwise="</think>"), "<think>"),
    "qwq": chatml("{{ m.content.split('</think>')[-1].lstrip('\n') }}", "<think>\n{% if not enable_thinking %}</think>{% endif %}"),
    "gemma 4": chatml(
        "{{ m.content }}", "{% if not enable_thinking %}<|channel>thought\n<channel|>{% endif %}"
    ).replace("{{ m.content }}{% else %}", "{% if m.tool_calls %}" + writes("<|channel>thought\n", "\n<channel|>", "") +
        "{% for c in m.tool_calls %}<|tool_call>{{ c.function | tojson }}<tool_call|>{% endfor %}{% endif %}{{ m.content }}{% else %}"),
    "cohere": chatml(writes("<|START_THINKING|>", "<|END_THINKING|>", "<|START_TEXT|>{{ m.content }}<|END_TEXT|>"),
        "<|START_THINKING|>{% if reasoning is defined and not reasoning %}<|END_THINKING|>{% endif %}"),
    "solar": chatml("{% if m.reasoning %}<|think|>{{ m.reasoning }}<|end|><|begin|>{% endif %}{{ m.content }}", ""),
    "pixtral": (
        "{% set told = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}{% if m.role == 'user' %}"
        "[INST]{% if loop.last and told %}{{ told }}\n\n{% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{{ m.content }}"
        "</s>{% endif %}{% endfor %}"
    ),
    "nemo": (
        "{% set asked = messages | selectattr('role', 'equalto', 'user') | list | last %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% if tools and m == asked %}[AVAILABLE_TOOLS]{{ tools | tojson }}"
        "[/AVAILABLE_TOOLS]{% endif %}[INST]{{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS]{% for c in m.tool_calls %}"
        "{% if c.id | length != 9 %}{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
        "{{ c.function | tojson }}{% endfor %}</s>{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"
    ),
    "hermes 2 pro": chatml(
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{{ m.content }}", ""
    ).replace("{% for m in", "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% for m in", 1),
    "nemotron 2": (
        "{% set last = messages[-1].content if messages[-1].role == 'assistant' else '' %}"
        "{% for m in messages[:-1] if last %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if not last %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% endif %}"
        "{% if add_generation_prompt or last %}<|im_start|>assistant\n<think>\n{{ last }}"
        "{% if last and not add_generation_prompt %}\n<|im_end|>\n{% endif %}{% endif %}"
    ),
}  # fmt: skip


@cache
def like(family, **switches):
    ending = "</s>" if family in ("pixtral", "nemo") else IM_END
    return base_with(TEMPLATES[family], ending, **switches)


@pytest.mark.parametrize("asked", ["One?", "t", "think", "<", "assistant"])
@pytest.mark.parametrize(
    ("family", "opens", "answer", "reasoned"),
    [
        ("glm 4.7", "<think>", "</think>First.", "Hm.</think>First."),
        ("cohere", "<|START_THINKING|>", "<|END_THINKING|><|START_TEXT|>First.<|END_TEXT|>",
         "Hm.<|END_THINKING|><|START_TEXT|>First.<|END_TEXT|>"),
        ("solar", "assistant\n", "First.", "<|think|>Hm.<|end|><|begin|>First."),
    ],
)  # fmt: skip
def test_reasoning_that_the_prompt_opens_is_closed_as_the_template_closes_it(family, opens, answer, reasoned, asked):
    """Whatever the question is: it may be a part of what follows it."""
    ((before, without),) = taught(like(family), user(asked), FIRST)
    assert before.endswith(opens)
    assert without == answer + IM_END
    assert answers(like(family), user(asked), HM) == [reasoned + IM_END]


@pytest.mark.parametrize(
    ("family", "opens"),
    [
        ("qwq", "<think>\n</think>"),
        ("gemma 4", "<|channel>thought\n<channel|>"),
        ("cohere", "<|START_THINKING|><|END_THINKING|>"),
    ],
)
def test_reasoning_that_the_prompt_has_closed_is_over(family, opens):
    on = like(family, reasoning=False) if family == "cohere" else like(family)
    whole = {"cohere": "<|START_TEXT|>{}<|END_TEXT|><|im_end|>"}.get(family, "{}<|im_end|>")
    found = taught(on, ONE, FIRST, user("Two?"), said("Second."))
    assert [answer for _, answer in found] == [whole.format("First."), whole.format("Second.")]
    assert all(before.endswith(f"assistant\n{opens}") for before, _ in found)


@pytest.mark.parametrize("family", ["qwq", "cohere"])
def test_reasoning_after_a_prompt_that_has_closed_it_is_refused_with_a_switch_that_works(family):
    switch = {"qwq": {"enable_thinking": True}, "cohere": {"reasoning": True}}[family]
    ((name, value),) = switch.items()
    on = like(family) if family == "qwq" else like(family, reasoning=False)
    hm = said("<think>\nHm.\n</think>\n\nFirst.") if family == "qwq" else HM
    why = {
        "qwq": "ends the reasoning in the prompt, and this turn has some",
        "cohere": "ends the prompt with '<|END_THINKING|>'",
    }
    assert f"the chat template {why[family]}" in answers(on, ONE, hm)
    assert f"it is valid if you set model.template.{name}={str(value).lower()}" in answers(on, ONE, hm)
    (answer,) = answers(like(family, **switch), ONE, hm)
    assert answer.startswith("Hm.")


def test_a_system_message_that_stands_before_the_last_question_is_read_there():
    told = {"role": "system", "content": "Be brief."}
    (one, _), (other, answer) = taught(like("pixtral"), told, ONE, FIRST, user("Two?"), said("Second."))
    assert one == "[INST]Be brief.\n\nOne?[/INST]"
    assert other == "[INST]One?[/INST]First.</s>[INST]Be brief.\n\nTwo?[/INST]"
    assert answer == "Second.</s>"


def test_tools_that_stand_before_the_last_question_are_read_there_and_calls_have_nine_letters():
    for id in ("abcdefghi", "1", None):  # others are replaced, and missing ones made
        ((before, answer),) = taught(like("nemo"), ONE, said("", tool_calls=[{**CALLS[0], "id": id}]))
        assert before.startswith("[AVAILABLE_TOOLS]")
        assert answer == '[TOOL_CALLS]{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}</s>'


def test_a_template_that_accepts_nothing_without_tools_has_calls_read():
    assert answers(like("hermes 2 pro"), ONE, said("", tool_calls=CALLS)) == [
        '<tool_call>{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}</tool_call><|im_end|>'
    ]
    assert "does not accept it: 'NoneType' object is not iterable" in answers(like("hermes 2 pro"), ONE, FIRST)


# Negative controls: what nobody can know is refused


def test_a_prompt_that_goes_on_with_the_last_answer_ends_a_turn_in_its_midst():
    reason = answers(like("nemotron 2"), ONE, said("b"), said("c"))
    assert "writes the turn's end token inside the turn" in reason


def test_what_is_written_twice_is_refused():
    source = chatml("{{ m.reasoning }}{{ m.reasoning_content }}{{ m.content }}", "")
    assert "writes its reasoning_content more than once: 'Hm.'" in answers(base_with(source, IM_END), ONE, HM)


@pytest.mark.parametrize(
    "alone", ["Answer: ", "<|think|>", "<plan>\n", "<plan><plan>", "</plan></plan>", "<plan></other>", "<|START_THINKING|>"]
)
def test_what_only_the_prompt_has_is_refused_unless_it_is_known_to_open_or_close_reasoning(alone):
    reason = answers(base_with(chatml("{{ m.content }}", alone), IM_END), ONE, FIRST)
    assert reason.startswith(
        f"messages[1] (assistant): the chat template ends the prompt with {alone!r}, and writes 'First.<|im_end|>"
    )


def test_a_prompt_that_depends_on_how_its_last_message_ends_is_refused():
    source = chatml("{{ m.content }}", "{% if messages[-1].content.endswith('?') %}<think>\n</think>\n\n{% endif %}")
    assert "differently than another in its place" in answers(base_with(source, IM_END), ONE, FIRST)
    assert answers(base_with(source, IM_END), user("One."), FIRST) == ["First.<|im_end|>"]


def test_an_answer_that_depends_on_how_the_message_before_it_ends_is_refused():
    """What is behind that message is taken from a rendering in which it ends otherwise."""
    source = chatml("{{ m.content }}{% if messages[0].content.endswith('?') %}!{% endif %}", "<think>\n</think>\n\n")
    assert "differently than another in its place" in answers(base_with(source, IM_END), ONE, FIRST)
    assert answers(base_with(source, IM_END), user("One."), FIRST) == ["First.<|im_end|>"]


@pytest.mark.parametrize(
    ("content", "way"), [("m.content", "put it into the content"), ("m.content.split('</think>')[-1]", "ignore it")]
)
def test_reasoning_is_to_go_into_the_content_only_if_the_template_leaves_it_there(content, way):
    reason = answers(base_with(chatml(f"{{{{ {content} }}}}", ""), IM_END), ONE, HM)
    assert reason.startswith(f"messages[1] (assistant): the model's chat template does not write reasoning_content: {way}")
