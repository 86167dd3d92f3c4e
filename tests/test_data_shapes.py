"""The shapes that rows come in: what each is read as, and what is said of one that can't be."""

import json
import re

import pytest

from trimtab.data import Conversation, SourceReport, Text
from trimtab.data.formats import read_examples
from trimtab.data.trained import trained_turns


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def read(row, columns=None, ignore=()):
    """The one example that a row is read as."""
    report = SourceReport(("data",))
    examples = list(read_examples([("data:1", row)], columns or {}, report, ignore=ignore))
    assert report.rejected == []
    (example,) = examples
    assert example.where == "data:1"
    return example


def refusal(row, columns=None):
    report = SourceReport(("data",))
    assert list(read_examples([("data:1", row)], columns or {}, report)) == []
    ((where, reason),) = report.rejected
    assert where == "data:1"
    return reason


def unread(row, columns=None):
    report = SourceReport(("data",))
    list(read_examples([("data:1", row)], columns or {}, report))
    return report.ignored_columns


# Alpaca and BELLE


def test_alpaca_is_a_question_and_an_answer():
    example = read({"instruction": "Add.", "input": "", "output": "4"})
    assert example == Conversation((user("Add."), assistant("4")), "data:1")


def test_alpaca_input_stands_below_the_instruction():
    expected = (user("Add.\n2 and 2"), assistant("4"))
    assert read({"instruction": "Add.", "input": "2 and 2", "output": "4"}).messages == expected
    for nothing in (None, "", " \n"):
        assert read({"instruction": "Add.", "input": nothing, "output": "4"}).messages == (user("Add."), assistant("4"))


def test_alpaca_history_and_system_come_first():
    row = {"instruction": "And 3?", "output": "9", "system": "Square.", "history": [["1?", "1"], ("2?", "4")]}
    assert read(row).messages == (
        system("Square."), user("1?"), assistant("1"), user("2?"), assistant("4"), user("And 3?"), assistant("9"),
    )  # fmt: skip
    for nothing in ({"history": []}, {"history": None}, {"system": None}, {"system": ""}, {"history": ""}):
        assert read({"instruction": "Add.", "output": "4", **nothing}).messages == (user("Add."), assistant("4"))


def test_white_space_of_a_text_is_kept():
    assert read({"instruction": " Add.\n", "output": "\n 4 \t"}).messages == (user(" Add.\n"), assistant("\n 4 \t"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"instruction": ""}, "instruction is empty"),
        ({"instruction": 5}, "instruction is a number, not a text"),
        ({"output": " \n\t"}, "output is empty"),
        ({"output": None}, "column 'output' is null beside instruction; the example has instruction, output"),
        ({"output": ["4"]}, "output is a list, not a text"),
        ({"output": {"a": 1}}, "output is an object, not a text"),
        ({"output": True}, "output is a true/false value, not a text"),
        ({"input": 2}, "input is a number, not a text"),
        ({"system": 2}, "system is a number, not a text"),
        ({"system": False}, "system is a true/false value, not a text"),
        ({"system": "  "}, "system is empty"),
        ({"history": ["a", "b"]}, "history[0] is not a pair of question and answer"),
        ({"history": [["a", "b"], ["c"]]}, "history[1] is not a pair of question and answer"),
        ({"history": "a"}, "history[0] is not a pair of question and answer"),
        ({"history": [["a", ""]]}, "history[0][1] is empty"),
        ({"history": [[None, "b"]]}, "history[0][0] is null, not a text"),
    ],
)
def test_an_alpaca_row_that_cannot_be_used_says_why(change, reason):
    assert refusal({"instruction": "Add.", "output": "4", **change}) == reason


# ShareGPT


def turn(who, value, **more):
    return {"from": who, "value": value, **more}


def test_sharegpt_is_a_conversation_by_any_of_its_names():
    for asks, answers in (("human", "gpt"), ("user", "assistant"), ("human", "chatgpt"), ("human", "bing"), ("user", "bard")):
        row = {"conversations": [turn(asks, "a"), turn(answers, "b"), turn(asks, "c"), turn(answers, "d")]}
        assert read(row) == Conversation((user("a"), assistant("b"), user("c"), assistant("d")), "data:1")


def test_a_sharegpt_system_message_is_a_column_or_a_turn():
    turns = [turn("human", "a"), turn("gpt", "b")]
    expected = (system("Be."), user("a"), assistant("b"))
    assert read({"conversations": turns, "system": "Be."}).messages == expected
    assert read({"conversations": [turn("system", "Be."), *turns]}).messages == expected


def test_sharegpt_tools_calls_and_observations():
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    row = {
        "conversations": [
            turn("human", "2 and 2?"),
            turn("function_call", json.dumps({"name": "add", "arguments": {"a": 2, "b": 2}})),
            turn("observation", "4"),
            turn("gpt", "It is 4."),
        ],
        "tools": json.dumps(tools),
    }
    calls = assistant("", tool_calls=[{**call("add", a=2, b=2), "id": "call00001"}])
    result = {"role": "tool", "content": "4", "tool_call_id": "call00001", "name": "add"}
    messages = (user("2 and 2?"), calls, result, assistant("It is 4."))
    assert read(row) == Conversation(messages, "data:1", tools=tuple(tools))
    row["tools"] = tools
    assert read(row).tools == tuple(tools)
    for nothing in (None, "", "  ", "[]", []):
        row["tools"] = nothing
        assert read(row).tools == ()


def test_several_sharegpt_calls_are_one_message():
    value = json.dumps([{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": "{}"}, {"name": "c"}])
    row = {"conversations": [turn("human", "Go."), turn("function_call", value)]}
    made = [{**one, "id": f"call0000{n}"} for n, one in enumerate([call("a", x=1), call("b"), call("c")], 1)]
    assert read(row).messages[1] == assistant("", tool_calls=made)


def test_a_sharegpt_turn_of_weight_0_is_not_learned():
    turns = [turn("human", "a"), turn("gpt", "b", weight=0), turn("human", "c"), turn("gpt", "d", weight=1)]
    assert read({"conversations": turns}).weights == {1: 0, 3: 1}
    assert read({"conversations": turns, "system": "s"}).weights == {2: 0, 4: 1}


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "conversations is an empty list, not a list of messages"),
        ("a", "conversations is a string, not a list of messages"),
        ([turn("human", "a"), {"value": "b"}], "conversations[1] is not a message with role and content, or from and value"),
        ([turn("human", "a"), "b"], "conversations[1] is not a message with role and content, or from and value"),
        (
            [turn("human", "a"), turn("robot", "b")],
            "conversations[1].from is 'robot', not system, user, assistant or tool, nor a known synonym of one of them",
        ),
        (
            [turn(["human"], "a")],
            "conversations[0].from is ['human'], not system, user, assistant or tool, nor a known synonym of one of them",
        ),
        ([turn("human", "a"), turn("gpt", "")], "conversations[1].value is empty"),
        ([turn("human", None), turn("gpt", "b")], "conversations[0].value is null, not a text"),
        ([turn("human", "a")], "no message is the assistant's, so there is nothing to train on"),
        (
            [turn("human", "a"), turn("gpt", "b", weight=0)],
            "every assistant message has weight 0, so there is nothing to train on",
        ),
        (
            [turn("human", "a"), turn("gpt", "b", weight=-0.5)],
            "conversations[1].weight is -0.5; it can be 0 (in the context, not trained on), 1, or another number from 0.000001 to 1,000,000",
        ),
        (
            [turn("human", "a"), turn("function_call", "add(2, 2)")],
            "conversations[1]: the function_call: not valid JSON: Expecting value at column 1",
        ),
        ([turn("human", "a"), turn("function_call", "{}")], "conversations[1].tool_calls holds a call without function.name"),
        ([turn("human", "a"), turn("function_call", "3")], "conversations[1].tool_calls holds a call without function.name"),
        (
            [turn("human", "a"), turn("function_call", '{"name": "f", "arguments": [1]}')],
            "conversations[1].tool_calls: the arguments of f are a list, not an object",
        ),
    ],
)
def test_a_sharegpt_row_that_cannot_be_used_says_why(turns, reason):
    assert refusal({"conversations": turns}) == reason


# OpenAI


def test_openai_messages_are_read_as_they_are():
    messages = [system("s"), user("a", name="Ann"), assistant("b"), user("c"), assistant("d")]
    assert read({"messages": messages}) == Conversation(tuple(messages), "data:1")


def test_developer_is_another_word_for_system():
    messages = [{"role": "developer", "content": "s"}, user("a"), assistant("b")]
    assert read({"messages": messages}).messages[0] == system("s")


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": ""}, {"type": "text", "text": "two"}]
    assert read({"messages": [user(parts), assistant("b")]}).messages[0] == user("one two")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "thinking", "thinking": "Hm.", "signature": "x"},
        {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
        {"type": "reasoning", "reasoning": "Hm."},
        {"type": "reasoning", "text": "Hm."},
    ],
    ids=["anthropic", "mistral", "langchain", "text"],
)
def test_reasoning_as_a_part_is_the_answers_reasoning(part):
    text = {"type": "text", "text": "b"}
    expected = assistant("b", reasoning_content="Hm.")
    assert read({"messages": [user("a"), assistant([part, text])]}).messages == (user("a"), expected)
    assert "has its reasoning twice, in thinking" in refusal({"messages": [user("a"), assistant([part, text], thinking="Hm.")]})
    assert "content is empty" in refusal({"messages": [user("a"), assistant([part])]})
    assert "has a part of type" in refusal({"messages": [user([part, text]), assistant("b")]}), "which no user has"


@pytest.mark.parametrize("kind", ["image_url", "image", "input_image", "input_audio", "audio_url", "video", "file"])
def test_a_part_that_is_no_text_is_refused_with_the_reason(kind):
    """On either side, among texts too, and however full of nulls a table has made it."""
    part, text = {"type": kind, kind: "x", "text": None}, {"type": "input_text", "text": "a", kind: None}
    assert read({"messages": [user([text]), assistant([text])]}).messages == (user("a"), assistant("a"))
    for messages in ([user([text, part]), assistant("b")], [user("a"), assistant([part, text])]):
        for row in ({"messages": messages}, {"prompt": messages[:1], "completion": messages[1:]}):
            assert f"has a part of type {kind}, and Trimtab trains on texts alone: leave the example" in refusal(row)


@pytest.mark.parametrize("key", ["images", "image", "audios", "videos"])
def test_so_is_a_message_that_has_some_beside_its_text(key):
    assert read({"messages": [user("a", **{key: []}), assistant("b")]})
    said = refusal({"messages": [user("a", **{key: ["x.png"]}), assistant("b")]})
    assert said.startswith(f"messages[0] has {key}, and Trimtab trains on texts alone: ")
    assert f"data.ignore=[{key}]" in said


def test_arguments_of_tool_calls_become_objects():
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, "é"]}'}},
        {"id": "2", "function": {"name": "g", "arguments": {"y": None}}},
        {"function": {"name": "h", "arguments": ""}},
        {"function": {"name": "i", "arguments": None}},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    answer = {"role": "tool", "tool_call_id": "1", "content": "[]"}
    row = {"messages": [user("a"), {"role": "assistant", "tool_calls": calls}, answer, assistant("b")], "tools": tools}
    example = read(row)
    assert example.messages[1] == assistant(
        "",
        tool_calls=[
            {"id": id, **made}
            for id, made in (
                ("1", call("f", x=[1, "é"])),
                ("2", call("g", y=None)),
                ("call00003", call("h")),
                ("call00004", call("i")),
            )
        ],
    )
    assert example.messages[2] == {**answer, "name": "f"}
    assert example.tools == tuple(tools)


def test_what_a_table_fills_up_with_nulls_is_left_out():
    """Parquet and `datasets` give every message every key that one has."""
    messages = [
        {"role": "user", "content": "a", "tool_calls": None, "weight": None, "name": None},
        {"role": "assistant", "content": "b", "tool_calls": [], "weight": None, "name": None},
    ]
    assert read({"messages": messages, "tools": None, "text": None}) == Conversation((user("a"), assistant("b")), "data:1")


def test_weight_0_is_read_and_not_learned():
    messages = [user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1), user("e"), assistant("f")]
    example = read({"messages": messages})
    assert example.weights == {1: 0, 3: 1}
    assert trained_turns(example) == [3, 5]
    assert example.messages == (user("a"), assistant("b"), user("c"), assistant("d"), user("e"), assistant("f"))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages is an empty list, not a list of messages"),
        ("a", "messages is a string, not a list of messages"),
        ({"role": "user"}, "messages is an object, not a list of messages"),
        (["a"], "messages[0] is not a message with role and content, or from and value"),
        ([{"content": "a"}], "messages[0] is not a message with role and content, or from and value"),
        (
            [user("a"), {"role": "narrator", "content": "b"}],
            "messages[1].role is 'narrator', not system, user, assistant or tool, nor a known synonym of one of them",
        ),
        (
            [{"role": ["user"], "content": "b"}],
            "messages[0].role is ['user'], not system, user, assistant or tool, nor a known synonym of one of them",
        ),
        ([user("a"), {"role": "assistant"}], "messages[1].content is null, not a text"),
        ([user("a"), assistant("")], "messages[1].content is empty"),
        ([user("\n"), assistant("b")], "messages[0].content is empty"),
        ([user(7), assistant("b")], "messages[0].content is a number, not a text"),
        (
            [user([{"word": "no type"}]), assistant("b")],
            "messages[0].content has a part of type word, which is no text: leave the example out (data.bad_rows=skip), or remove the part",
        ),
        (
            [user([{"type": "tool_use", "input": {}}]), assistant("b")],
            "messages[0].content has a part of type tool_use, a call in a message that is not the assistant's: roles are exchanged, or the part "
            "is misplaced",
        ),
        ([user([{"type": "text"}]), assistant("b")], "messages[0].content is null, not a text"),
        ([user([{"type": "text", "text": " "}]), assistant("b")], "messages[0].content is empty"),
        ([user([]), assistant("b")], "messages[0].content is a list, not a text"),
        (
            [user("a"), assistant("b", weight=2e6)],
            "messages[1].weight is 2000000.0; it can be 0 (in the context, not trained on), 1, or another number from 0.000001 to 1,000,000",
        ),
        (
            [user("a"), assistant("b", weight="0")],
            "messages[1].weight is '0'; it can be 0 (in the context, not trained on), 1, or another number from 0.000001 to 1,000,000",
        ),
        ([user("a"), assistant("b", weight=0)], "every assistant message has weight 0, so there is nothing to train on"),
        ([system("s"), user("a")], "no message is the assistant's, so there is nothing to train on"),
        (
            [user("a"), assistant(None, tool_calls=[{"function": {"arguments": "{}"}}])],
            "messages[1].tool_calls holds a call without function.name",
        ),
        ([user("a"), assistant(None, tool_calls="f()")], "messages[1].tool_calls holds a call without function.name"),
        (
            [user("a"), assistant(None, tool_calls=[{"function": {"name": "f", "arguments": "{x}"}}])],
            "messages[1].tool_calls: the arguments of f: not valid JSON: "
            "Expecting property name enclosed in double quotes at column 2",
        ),
        (
            [user("a"), assistant(None, tool_calls=[{"function": {"name": "f", "arguments": '{"x": NaN}'}}])],
            "messages[1].tool_calls: the arguments of f: not valid JSON: NaN is not a JSON value",
        ),
        (
            [user("a"), assistant(None, tool_calls=[{"function": {"name": "f", "arguments": "[]"}}])],
            "messages[1].tool_calls: the arguments of f are a list, not an object",
        ),
        (
            [user("a"), assistant("b", function_call={"name": "f", "arguments": "[]"})],
            "messages[1].tool_calls: the arguments of f are a list, not an object",
        ),
    ],
)
def test_openai_messages_that_cannot_be_used_say_why(messages, reason):
    assert refusal({"messages": messages}) == reason


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("f, g", "tools: not valid JSON: Expecting value at column 1"),
        ('{"name": "f"}', "tools is an object, not a list of tool descriptions"),
        ({"name": "f"}, "tools is an object, not a list of tool descriptions"),
        (0, "tools is a number, not a list of tool descriptions"),
    ],
)
def test_tools_that_are_no_list_are_refused(tools, reason):
    assert refusal({"messages": [user("a"), assistant("b")], "tools": tools}) == reason


# Prompt and completion, text


def test_prompt_and_completion_as_texts_continue_each_other():
    example = read({"prompt": "2+2=", "completion": "4"})
    assert example == Conversation((user("2+2="), assistant("4")), "data:1", prompt=1, is_completion=True)


def test_prompt_and_completion_as_messages_learn_the_completion_alone():
    prompt = [system("s"), user("a"), assistant("b"), user("c")]
    completion = [assistant("d"), user("e"), assistant("f", weight=0), user("g"), assistant("h")]
    example = read({"prompt": prompt, "completion": completion, "tools": "[]"})
    texts = [message["content"] for message in example.messages]
    assert texts == ["s", "a", "b", "c", "d", "e", "f", "g", "h"]
    learned = set(trained_turns(example))
    assert [texts[n] for n in sorted(learned)] == ["d", "h"]
    assert not example.is_completion


def test_a_text_is_a_text():
    assert read({"text": " once\n"}) == Text(" once\n", "data:1")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "", "completion": "b"}, "prompt is empty"),
        ({"prompt": "a", "completion": "\n"}, "completion is empty"),
        ({"prompt": 1, "completion": "b"}, "prompt is a number, not a text"),
        ({"prompt": "a", "completion": [assistant("b")]}, "prompt is a string, not a list of messages"),
        ({"prompt": [user("a")], "completion": "b"}, "completion is a string, not a list of messages"),
        ({"prompt": [], "completion": [assistant("b")]}, "prompt is an empty list, not a list of messages"),
        ({"prompt": [user("a")], "completion": [assistant("")]}, "completion[0].content is empty"),
        (
            {"prompt": [user("a"), assistant("b")], "completion": [user("c")]},
            "no message of the completion is the assistant's, so there is nothing to train on",
        ),
        ({"text": "  "}, "text is empty"),
        ({"text": 1.5}, "text is a number, not a text"),
        ({"text": None}, "column 'text' is null; the example has text"),
    ],
)
def test_a_prompt_completion_or_text_that_cannot_be_used_says_why(row, reason):
    assert refusal(row) == reason


# Which shape, and which columns


def test_columns_are_renamed_as_the_recipe_says():
    row = {"question": "a", "response": "b", "id": 7}
    columns = {"prompt": "question", "completion": "response"}
    assert read(row, columns).messages == (user("a"), assistant("b"))
    assert unread(row, columns) == {"id"}


def test_a_renamed_column_goes_before_one_of_that_name():
    row = {"question": "asked", "prompt": "not asked", "completion": "b"}
    for ordered in (row, dict(reversed(row.items()))):
        assert read(ordered, {"prompt": "question"}).messages[0] == user("asked")
        assert unread(ordered, {"prompt": "question"}) == {"prompt"}


def test_columns_can_be_exchanged_and_one_can_serve_twice():
    row = {"prompt": "answer", "completion": "question"}
    assert read(row, {"prompt": "completion", "completion": "prompt"}).messages == (user("question"), assistant("answer"))
    assert read({"echo": "a"}, {"prompt": "echo", "completion": "echo"}).messages == (user("a"), assistant("a"))


def test_a_column_that_the_recipe_names_and_the_row_lacks_is_refused():
    reason = refusal({"query": "a", "completion": "b"}, {"prompt": "question"})
    assert reason == "has no column 'question', which data.columns says is the prompt; it has query, completion"


def test_a_row_of_two_shapes_is_refused_until_the_recipe_names_one():
    row = {"instruction": "a", "output": "b", "text": "### a ### b"}
    assert refusal(row) == (
        "could be read as instruction/output and text: keep the columns of one, "
        "or say which (data.columns.instruction=instruction)"
    )
    assert read(row, {"instruction": "instruction"}).messages == (user("a"), assistant("b"))
    assert unread(row, {"instruction": "instruction"}) == {"text"}
    assert read(row, {"text": "text"}) == Text("### a ### b", "data:1")
    assert unread(row, {"text": "text"}) == {"instruction", "output"}


def test_columns_of_two_shapes_cannot_be_named_together():
    reason = refusal({"a": "a", "b": "b"}, {"prompt": "a", "text": "b"})
    assert reason == "data.columns names prompt, text, which no format has together"


def test_a_column_of_nulls_does_not_make_a_row_ambiguous():
    assert read({"text": "a", "prompt": None, "completion": None, "messages": None}) == Text("a", "data:1")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": "a", "completions": "b"},
            "column 'completion' is missing beside prompt (is it 'completions'? Then set data.columns.completion=completions); "
            "the example has prompt, completions",
        ),
        (
            {"Instruction": "a", "instruction ": "b", "output": "c"},
            "column 'instruction' is missing beside output (is it 'Instruction'? "
            "Then set data.columns.instruction=Instruction); the example has Instruction, instruction , output",
        ),
        (
            {"instruction": "a", "input": "b"},
            "column 'output' is missing beside instruction; the example has instruction, input",
        ),
        (
            {"prompt": None, "completions": "b"},
            "column 'prompt' is null; the example has prompt, completions",
        ),
        (
            {"messages": None, "prompt": "a", "answer": "b"},
            "column 'completion' is missing beside prompt (is it 'answer'? Then set data.columns.completion=answer); "
            "the example has messages, prompt, answer",
        ),
        (
            {"": "0", "question": "a", "answer": "b"},
            "has a column without a name, question, answer, which matches no supported format (messages; conversations; "
            "contents; instruction, output; prompt, completion; text). Name them with data.columns, e.g. data.columns.prompt=question "
            "data.columns.completion=answer",
        ),
        (
            {},
            "has no columns, which matches no supported format (messages; conversations; contents; instruction, output; "
            "prompt, completion; text). Name them with data.columns, e.g. data.columns.prompt=question",
        ),
    ],
)  # fmt: skip
def test_a_row_of_no_shape_says_what_is_missing(row, reason):
    assert refusal(row) == reason


def test_columns_that_nothing_reads_are_remembered_once():
    report = SourceReport(("data",))
    rows = [(f"data:{n}", {"prompt": "a", "completion": "b", "id": n, "source": "x"}) for n in range(3)]
    list(read_examples([*rows, ("data:9", {"text": "a", "tools": []})], {}, report))
    assert report.ignored_columns == {"id", "source", "tools"}


def test_every_row_becomes_an_example_or_a_refusal():
    report = SourceReport(("data",))
    rows = [("data:1", {"text": "a"}), ("data:2", {}), ("data:3", {"text": ""}), ("data:4", {"prompt": "a", "completion": "b"})]
    examples = list(read_examples(rows, {}, report))
    assert [example.where for example in examples] == ["data:1", "data:4"]
    assert [refused.where for refused in report.rejected] == ["data:2", "data:3"]


# What people export


@pytest.mark.parametrize(
    ("word", "role"),
    [
        ("human", "user"), ("User", "user"), ("gpt", "assistant"), ("bot", "assistant"), ("model", "assistant"), ("ASSISTANT", "assistant"),
        ("developer", "system"), ("function_response", "tool"), ("observation", "tool"), ("ipython", "tool"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("who", "says"), [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_other_words_for_who_speaks_are_read_in_either_form(word, role, who, says, column):
    turns = [{who: word, says: "x"}, {who: "gpt", says: "y"}, {who: "human", says: "z"}, {who: "gpt", says: "end"}]
    found = read({column: turns}).messages
    assert [(m["role"], m["content"]) for m in found] == [(role, "x"), ("assistant", "y"), ("user", "z"), ("assistant", "end")]


def test_the_old_form_of_a_call_is_a_call():
    call = {"name": "f", "arguments": '{"x": 1}'}
    found = read(
        {"messages": [user("a"), assistant(None, function_call=call), {"role": "function", "name": "f", "content": "2"}]}
    )
    function = {"name": "f", "arguments": {"x": 1}}
    assert found.messages[1]["tool_calls"] == [{"type": "function", "id": "call00001", "function": function}]
    assert found.messages[2] == {"role": "tool", "content": "2", "name": "f", "tool_call_id": "call00001"}
    swift = [user("a"), {"role": "tool_call", "content": json.dumps(call)}, {"role": "tool_response", "content": "2"}]
    assert read({"messages": swift}).messages[1] == found.messages[1]


def test_a_column_in_another_case_is_that_column():
    assert read({"Prompt": "a", "COMPLETION ": "b"}) == read({"prompt": "a", "completion": "b"})
    report = SourceReport(("data",))
    (found,) = read_examples([("data:1", {"Instruction": "a", "Output": "b", "Id": 3})], {}, report)
    assert found == read({"instruction": "a", "output": "b"})
    assert report.ignored_columns == {"Id"}
    assert "column 'completion' is missing" in refusal({"prompt": "a", "Completion": "b", "COMPLETION": "c"})


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"question": "a", "answer": "b"}, {"prompt": "question", "completion": "answer"}),
        ({"Query": "a", "Response": "b", "id": "3"}, {"prompt": "Query", "completion": "Response"}),
        ({"input": "a", "output": "b"}, {"prompt": "input", "completion": "output"}),
        ({"instruction": "a", "response": "b"}, {"output": "response"}),
        ({"prompt": "a", "response": "b"}, {"completion": "response"}),
    ],
)
def test_the_advice_works_as_it_is_printed(row, columns):
    advised = dict(re.findall(r"data\.columns\.(\w+)=(\w+)", refusal(row)))
    assert advised == columns
    assert [m["content"] for m in read(row, advised).messages] == ["a", "b"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b"},
        {"messages": [user("a"), assistant("b")]},
        {"conversations": [turn("human", "a"), turn("gpt", "b")]},
        {"instruction": "a", "output": "b"},
        {"prompt": [user("a")], "completion": [assistant("b")]},
    ],
)
def test_a_system_column_and_tools_are_read_beside_every_conversation(row):
    tools = [{"type": "function", "function": {"name": "f"}}]
    found = read({**row, "system": "Be kind.", "tools": tools})
    assert [m["content"] for m in found.messages] == ["Be kind.", "a", "b"]
    assert found.tools == tuple(tools)


def test_two_system_messages_are_refused():
    for row in (
        {"messages": [system("x"), user("a"), assistant("b")]},
        {"prompt": [system("x"), user("a")], "completion": [assistant("b")]},
    ):
        assert "a column system and a system message" in refusal({**row, "system": "y"})
        assert [m["content"] for m in read({**row, "system": "y"}, ignore=["system"]).messages] == ["x", "a", "b"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"images": ["x.png"]},
            "has images, and Trimtab trains on texts alone: ignore the column with data.ignore=[images], or leave the example out",
        ),
        (
            {"history": [["x", "y"]]},
            "has history, which examples with prompt/completion don't use: ignore the column with ",
        ),
        (
            {"input": "x"},
            "has input, which examples with prompt/completion don't use: ignore the column with data.ignore=[input]",
        ),
        (
            {"label": False},
            "has label, which kto trains on, and this objective does not: ignore the column with data.ignore=[label]",
        ),
    ],
)
def test_a_column_that_another_format_reads_is_never_dropped(more, said):
    row = {"prompt": "a", "completion": "b"}
    assert refusal({**row, **more}).startswith(said)
    assert read({**row, **more}, ignore=[*more]) == read(row)
    assert read({**row, **dict.fromkeys(more)}) == read({**row, **{key: [] for key in more}}) == read(row)


def test_a_column_that_says_what_the_conversation_says_is_no_loss():
    """As ultrachat has it."""
    row = {"messages": [user("a"), assistant("b")]}
    assert read({**row, "prompt": " a"}) == read(row)
    assert refusal({**row, "prompt": "c"}).startswith("has prompt, ")


def test_keys_of_messages_are_left_out_on_purpose_alone():
    row = {"messages": [user("a", time=3), assistant("b", time=4)], "time": 5}
    assert read(row).messages[0]["time"] == 3
    assert read(row, ignore=["time"]).messages == ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
