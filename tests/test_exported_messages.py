"""Conversations with tools as vendors' interfaces and LangChain export them: each is the chat format's, on every template."""

import json

import pytest
from chat_templates import NAMES, TOOLS, base, base_with
from test_chat_templates import runs

from trimtab.data import SourceReport, tokenize_examples
from trimtab.data.formats import read_examples

ARGUMENTS = [{"city": "Oslo", "days": 2}, {"city": "Rome", "days": 3}]
SCHEMA = TOOLS[0]["function"]["parameters"]
ABOUT = {"name": "weather", "description": "Says how it is."}
IDS, SAID = ["call_Ab3", "call_Ab4"], ["Cold.", "Warm."]


def chat(*, ids=IDS, text="", parallel=True, reasoning=None, as_text=True):
    """The conversation in the chat format, which all others are to become."""
    many = list(zip(ids, ARGUMENTS, SAID, strict=True))[: 2 if parallel else 1]
    calls = [
        {"id": id, "type": "function", "function": {"name": "weather", "arguments": json.dumps(a) if as_text else a}}
        for id, a, _ in many
    ]
    more = {"reasoning_content": reasoning} if reasoning else {}
    return {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "How is it?"},
            {"role": "assistant", "content": text, "tool_calls": calls, **more},
            *({"role": "tool", "tool_call_id": id, "name": "weather", "content": said} for id, _, said in many),
            {"role": "assistant", "content": "It depends."},
        ],
        "tools": TOOLS,
    }


def text(value):
    return {"type": "text", "text": value}


ANTHROPIC = {
    "system": [{**text("Be brief."), "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": "How is it?"},
        {
            "id": "msg_01", "type": "message", "role": "assistant", "model": "claude", "stop_reason": "tool_use", "stop_sequence": None,
            "usage": {"input_tokens": 9},
            "content": [
                {"type": "tool_use", "id": IDS[0], "name": "weather", "input": ARGUMENTS[0]},
                {"type": "tool_use", "id": IDS[1], "name": "weather", "input": ARGUMENTS[1], "caller": {"type": "direct"}},
            ],
        },
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": IDS[0], "content": "Cold."},
            {"type": "tool_result", "tool_use_id": IDS[1], "content": [text("Warm.")], "is_error": False},
        ]},
        {"role": "assistant", "content": [text("It depends.")]},
    ],
    "tools": [{**ABOUT, "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}}],
}  # fmt: skip
RESPONSES = {
    "messages": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "input_text", "text": "How is it?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"},
        *({"type": "function_call", "id": f"fc_{id}", "call_id": id, "name": "weather", "arguments": json.dumps(one), "status": "completed"}
          for id, one in zip(IDS, ARGUMENTS, strict=True)),
        {"type": "function_call_output", "call_id": IDS[0], "output": "Cold."},
        {"type": "function_call_output", "call_id": IDS[1], "output": [{"type": "input_text", "text": "Warm."}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "It depends.", "annotations": [], "logprobs": []}]},
    ],
    "tools": [{"type": "function", **ABOUT, "parameters": SCHEMA}],
}  # fmt: skip
GEMINI = {
    "systemInstruction": {"parts": [{"text": "Be brief."}]},
    "contents": [
        {"role": "user", "parts": [{"text": "How is it?"}]},
        {"role": "model", "parts": [{"functionCall": {"name": "weather", "args": one}, "thoughtSignature": "x"} for one in ARGUMENTS]},
        {"role": "user", "parts": [{"functionResponse": {"name": "weather", "response": {"output": said}}} for said in SAID]},
        {"role": "model", "parts": [{"text": "It "}, {"text": "depends."}]},
    ],
    "tools": [{"functionDeclarations": [{**ABOUT, "parameters": {
        "type": "OBJECT",
        "properties": {"city": {"type": "STRING", "description": "Where"}, "days": {"type": "INTEGER", "description": "How many"}},
        "required": ["city"],
    }}]}],
}  # fmt: skip
BEDROCK = {
    "system": [{"text": "Be brief."}],
    "messages": [
        {"role": "user", "content": [{"text": "How is it?"}]},
        {"role": "assistant", "content": [
            {"toolUse": {"toolUseId": id, "name": "weather", "input": one}} for id, one in zip(IDS, ARGUMENTS, strict=True)
        ]},
        {"role": "user", "content": [
            {"toolResult": {"toolUseId": id, "content": [{"text": said}], "status": "success"}} for id, said in zip(IDS, SAID, strict=True)
        ]},
        {"role": "assistant", "content": [{"text": "It depends."}]},
    ],
    "tools": [{"toolSpec": {**ABOUT, "inputSchema": {"json": SCHEMA}}}],
}  # fmt: skip
CALLS = [{"name": "weather", "args": one, "id": id, "type": "tool_call"} for id, one in zip(IDS, ARGUMENTS, strict=True)]
AI = {
    "additional_kwargs": {},
    "response_metadata": {"model": "m"},
    "invalid_tool_calls": [],
    "usage_metadata": None,
    "id": "run-1",
}
_LANGCHAIN = [
    ("system", {"content": "Be brief.", "additional_kwargs": {}}),
    ("human", {"content": "How is it?", "example": False, "name": None}),
    ("ai", {"content": "", "tool_calls": CALLS, **AI}),
    *(("tool", {"content": said, "tool_call_id": id, "status": "success", "artifact": None}) for id, said in zip(IDS, SAID, strict=True)),
    ("ai", {"content": "It depends.", "tool_calls": [], **AI}),
]  # fmt: skip
LANGCHAIN = {
    "model_dump": [{"type": kind, **data} for kind, data in _LANGCHAIN],
    "messages_to_dict": [{"type": kind, "data": {"type": kind, **data}} for kind, data in _LANGCHAIN],
    "dumpd": [
        {"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", f"{kind.upper() if kind == 'ai' else kind.title()}Message"],
         "kwargs": data} for kind, data in _LANGCHAIN
    ],
    "additional_kwargs": [
        {"type": kind, **data, **({"tool_calls": [], "additional_kwargs": {"tool_calls": chat()["messages"][2]["tool_calls"]}}
                                  if data.get("tool_calls") else {})} for kind, data in _LANGCHAIN
    ],
    "Anthropic's parts, too": [
        {"type": kind, **data, **({"content": ANTHROPIC["messages"][1]["content"]} if data.get("tool_calls") else {})}
        for kind, data in _LANGCHAIN
    ],
}  # fmt: skip
EXPORTS = {
    "arguments as objects": chat(as_text=False),
    "calls without function": {**chat(), "messages": [
        {**m, "tool_calls": [{"id": c["id"], **c["function"]} for c in m["tool_calls"]]} if "tool_calls" in m else m for m in chat()["messages"]
    ]},
    "results without names": {**chat(), "messages": [{k: v for k, v in m.items() if k != "name"} for m in chat()["messages"]]},
    "Anthropic": ANTHROPIC, "OpenAI Responses": RESPONSES, "Bedrock": BEDROCK,
    **{f"LangChain: {way}": {"messages": messages, "tools": TOOLS} for way, messages in LANGCHAIN.items()},
}  # fmt: skip


def read(row):
    """The example, or why it is refused."""
    report = SourceReport(("rows",))
    examples = list(read_examples([("rows:1", row)], {}, report))
    return examples[0] if examples else report.rejected[0].reason


def taught(on, row):
    """Each token and whether it is trained on, a list a sequence; or why the row is refused."""
    report = SourceReport(("rows",))
    rows = tokenize_examples(list(read_examples([("rows:1", row)], {}, report)), on, report)
    return [(one.ids, one.target_indices) for one in rows] or report.rejected[0].reason


@pytest.mark.parametrize("export", EXPORTS)
def test_it_is_the_same_conversation(export):
    assert read(EXPORTS[export]) == read(chat())


def test_gemini_has_no_ids_and_results_are_objects():
    expected = chat(ids=["call00001", "call00002"])
    for message in expected["messages"][3:5]:
        message["content"] = json.dumps({"output": message["content"]})
    assert read(GEMINI) == read(expected)
    results = [
        {"function_response": part["functionResponse"]} for part in GEMINI["contents"][2]["parts"]
    ]  # as Python's interface has it
    contents = [*GEMINI["contents"][:2], {"role": "function", "parts": results}, GEMINI["contents"][3]]
    assert read({"system_instruction": GEMINI["systemInstruction"], "contents": contents, "tools": GEMINI["tools"]}) == read(
        expected
    )


# On every template

NO_TOOLS = {
    "cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3", "idefics3", "lfm2", "llama3", "llava_next", "phi3", "phi3_5",
    "qwen2_5_vl", "smolvlm",
}  # fmt: skip
ONE_CALL = {
    "llama3_1": "single tool-calls at once",
    "llama3_2": "single tool-calls at once",
    "gptoss": "leaves out its argument city: 'Rome'",
}
"""Templates that write one call a turn, and how others are refused."""


@pytest.mark.parametrize("name", NAMES)
def test_every_template_writes_calls_and_results_in_their_order_or_says_why_not(name):
    on = base(name)
    parallel = taught(on, chat())
    assert taught(on, ANTHROPIC) == taught(on, RESPONSES) == parallel
    if name in NO_TOOLS:
        assert "leaves out tools" in parallel or "leaves out its tool_calls" in parallel or "System role not" in parallel
        return
    if name in ONE_CALL:
        assert ONE_CALL[name] in parallel
        parallel = taught(on, chat(parallel=False))
    sequences = [type("Row", (), {"ids": ids, "target_indices": targets}) for ids, targets in parallel]
    (_, calls), (before, answer) = runs(on, sequences)
    words = ["Oslo", "Rome"][: 1 if name in ONE_CALL else 2]
    assert [calls.index(word) for word in words] == sorted(calls.index(word) for word in words)
    results = before[before.rindex(words[-1]) :]
    said = ["Cold.", "Warm."][: len(words)]
    assert [results.count(word) for word in said] == [1] * len(said)
    assert [results.index(word) for word in said] == sorted(results.index(word) for word in said)
    assert "It depends." in answer
    assert not any(id in before for id in IDS), "ids are not written by any of them"


def printing_ids(check=""):
    """A template in Mistral's manner, which writes the ids of calls and of results."""
    return (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}" + check + "[TOOL_CALLS]{{ c.function.name }}[CALL_ID]{{ c.id }}[ARGS]"
        "{{ c.function.arguments | tojson }}{% endfor %}{% if m.role == 'tool' %}[TOOL_RESULTS]{{ m.tool_call_id }}[/ID]{{ m.content }}"
        "[/TOOL_RESULTS]{% elif m.role == 'assistant' %}{{ m.content }}</s>{% else %}{% if tools %}{{ tools | tojson }}{% endif %}"
        "[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"
    )  # fmt: skip


NINE = (
    "{% if c.id | length != 9 %}{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
)


@pytest.mark.parametrize("ids", [IDS, ["abcdefghi", "Abcdefgh1"], ["call00001", "call00002"]])
def test_ids_are_kept_where_the_template_writes_them(ids):
    """Only where it takes no others than nine letters and digits, others become such, each its own and always the same."""
    found = {}
    for check in ("", NINE):
        on = base_with(printing_ids(check), "</s>")
        ((_, calls), (before, _)) = runs(
            on, [type("Row", (), {"ids": i, "target_indices": t}) for i, t in taught(on, chat(ids=ids))]
        )
        written = [part.partition("[ARGS]")[0] for part in calls.split("[CALL_ID]")[1:]]
        assert [part.partition("[/ID]")[0] for part in before.split("[TOOL_RESULTS]")[1:]] == written
        found[check] = written
    assert found[""] == ids
    assert len(set(found[NINE])) == 2
    assert all(len(id) == 9 and id.isalnum() for id in found[NINE])
    assert (found[NINE] == ids) == all(len(id) == 9 for id in ids)
    nameless = chat(ids=["call00001", "call00002"])
    nameless["messages"] = [
        {
            key: [{k: v for k, v in call.items() if k != "id"} for call in value] if key == "tool_calls" else value
            for key, value in message.items()
            if key != "tool_call_id"
        }
        for message in nameless["messages"]
    ]
    assert read(nameless) == read(chat(ids=["call00001", "call00002"])), "ids that are missing are made"


# Reasoning, texts and weights


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def test_a_text_before_a_call_and_reasoning_are_kept():
    expected = read(
        {"messages": [user("How is it?"), chat(text="Let me see.", reasoning="Hm.", parallel=False)["messages"][2]]}
    )
    call, arguments = {"name": "weather", "id": IDS[0]}, ARGUMENTS[0]
    anthropic = [
        {"type": "thinking", "thinking": "Hm.", "signature": "x"},
        text("Let me see."),
        {"type": "tool_use", **call, "input": arguments},
    ]
    assert read({"messages": [user("How is it?"), assistant(anthropic)]}) == expected
    called = {"type": "function_call", "call_id": IDS[0], "name": "weather", "arguments": json.dumps(arguments)}
    for reasoning in (
        {"content": [{"type": "reasoning_text", "text": "Hm."}], "summary": [{"type": "summary_text", "text": "?"}]},
        {"summary": [{"type": "summary_text", "text": "Hm."}]},
    ):
        items = [
            {"type": "reasoning", **reasoning},
            assistant([{"type": "output_text", "text": "Let me see."}], type="message"),
            called,
        ]
        assert read({"messages": [user("How is it?"), *items]}) == expected
        assert read({"prompt": [user("How is it?")], "completion": items}).messages == expected.messages
    gemini = [{"text": "Hm.", "thought": True}, {"text": "Let me see."}, {"functionCall": {**call, "args": arguments}}]
    contents = [{"parts": [{"text": "How is it?"}]}, {"role": "model", "parts": gemini}]
    assert read({"contents": contents}) == expected
    blocks = [{"type": "reasoning", "reasoning": "Hm."}, text("Let me see."), {"type": "tool_call", **call, "args": arguments}]
    assert read({"messages": [{"type": "human", "content": "How is it?"}, {"type": "ai", "content": blocks}]}) == expected
    more = {"reasoning_content": "Hm.", "refusal": None}
    plain = {"type": "ai", "content": "Let me see.", "tool_calls": [{**call, "args": arguments}], "additional_kwargs": more}
    assert read({"messages": [user("How is it?"), plain]}) == expected


def test_a_turn_ends_where_a_response_does():
    """What comes after a call, and a second text, are turns of their own."""
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": ""}
    output = {"type": "function_call_output", "call_id": "1", "output": "2"}
    says = [{"type": "reasoning", "summary": [{"type": "summary_text", "text": one}]} for one in ("A", "B", "C")]
    items = [
        user("a"),
        says[0],
        says[1],
        call,
        says[2],
        call,
        output,
        assistant("b"),
        assistant("c"),
        user("d"),
        assistant("e"),
    ]
    messages = read({"messages": items}).messages
    assert [m["role"] for m in messages] == ["user", *["assistant"] * 2, "tool", *["assistant"] * 2, "user", "assistant"]
    assert [m.get("reasoning_content") for m in messages[1:3]] == ["A\n\nB", "C"]


def test_what_a_user_says_beside_results_is_a_message_behind_or_before_them():
    call = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "1"}
    row = {"messages": [user("a"), assistant([call]), user([result, text("And"), text(" now?")]), assistant("b")]}
    messages = read(row).messages
    assert [(m["role"], m["content"]) for m in messages[2:4]] == [("tool", ""), ("user", "And now?")]
    assert messages[2]["name"] == "f"


def test_weights_stay_with_what_they_were_given_to():
    call = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
    result = user([{"type": "tool_result", "tool_use_id": "1", "content": "2"}, text("And now?")])
    made = read({"messages": [user("a"), assistant([call], weight=0), {**result, "weight": 0.5}, assistant("b", weight=2)]})
    assert made.weights == {1: 0, 2: 0.5, 3: 0.5, 4: 2}
    items = [
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", "train": False},
        {"type": "function_call_output", "call_id": "1", "output": "2"},
    ]
    assert read({"messages": [user("a"), *items, assistant("b")]}).weights == {1: 0}


def test_old_functions_are_tools():
    function = {**ABOUT, "parameters": SCHEMA}
    call = {"name": "weather", "arguments": json.dumps(ARGUMENTS[0])}
    messages = [
        user("a"),
        assistant(None, function_call=call),
        {"role": "function", "name": "weather", "content": "2"},
        assistant("b"),
    ]
    made = read({"messages": messages, "functions": [function]})
    assert made.tools == ({"type": "function", "function": function},)
    assert made == read({"messages": messages, "tools": TOOLS})
    assert made.messages[2] == {"role": "tool", "name": "weather", "content": "2", "tool_call_id": "call00001"}


def test_other_tools_stay_as_they_are():
    tools = [
        {"type": "code_interpreter"},
        {"name": "f"},
        {"type": "web_search_20250305", "name": "web_search", "parameters": {}},
        "f",
    ]
    assert list(read({"messages": [user("a"), assistant("b")], "tools": tools}).tools) == tools


def test_a_column_contents_that_is_a_text_is_no_conversation():
    assert read({"text": "a", "contents": "b"}).text == "a"
    assert "matches no supported format" in read({"contents": "b"})


@pytest.mark.parametrize("passages", [["a", "b"], [{"title": "a", "text": "b"}], []])
def test_a_column_contents_that_lists_documents_is_no_conversation(passages):
    row = {"prompt": "How is it?", "completion": "Cold."}
    assert read({**row, "contents": passages}) == read(row)
    assert read({"text": "a", "contents": passages}).text == "a"
    both = read({"text": "a", "contents": [{"role": "user", "parts": [{"text": "b"}]}]})
    assert "could be read as contents and text" in both
    assert both.endswith("(data.columns.text=text)")  # which is a setting that there is


def test_nulls_that_a_table_adds_are_nothing():
    keys = ("text", "functionCall", "functionResponse", "thought")
    full = [{**m, "parts": [dict.fromkeys(keys) | part for part in m["parts"]]} for m in GEMINI["contents"]]
    assert read(GEMINI | {"contents": full}) == read(GEMINI)
    conversation = chat()["messages"]
    full = [{"tool_calls": None, "tool_call_id": None, "name": None, **message} for message in conversation]
    without = [{**m, "tool_call_id": None} if m["role"] == "tool" else m for m in full]
    for message in without:
        for call in message["tool_calls"] or []:
            call["id"] = None
    ids = [call["id"] for message in read({"messages": without}).messages for call in message.get("tool_calls", [])]
    assert ids == ["call00001", "call00002"]
    assert [m["tool_call_id"] for m in read({"messages": without}).messages if m["role"] == "tool"] == ids


def test_systems_of_two_names_are_refused_and_one_is_not_called_ignored():
    row = {"messages": [user("a"), assistant("b")], "systemInstruction": {"parts": [{"text": "S"}]}}
    assert "has a column system and systemInstruction: leave one out" in read({**row, "system": "other"})
    report = SourceReport(("rows",))
    (example,) = read_examples([("rows:1", row)], {}, report)
    assert example.messages[0] == {"role": "system", "content": "S"}
    assert not report.ignored_columns


@pytest.mark.parametrize("role", ["tool", "function"])
def test_what_a_tool_says_beside_its_result_is_refused(role):
    result = {"type": "tool_result", "tool_use_id": "1", "content": "r"}
    before = [user("a"), {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]
    parts = [result, {"type": "text", "text": "more"}]
    assert "only a user's message has both" in read({"messages": [*before, {"role": role, "content": parts}, assistant("b")]})
    alone = read({"messages": [*before, {"role": role, "content": [result]}, assistant("b")]})
    assert (
        read({"messages": [*before, {"role": role, "content": [result, {"type": "text", "text": " "}]}, assistant("b")]})
        == alone
    )


def failed(export):
    """An export whose first result says that the call failed."""
    row = json.loads(json.dumps(EXPORTS[export]))
    marks = {"is_error": True} if "is_error" in json.dumps(row) else {"status": "error"}

    def mark(value):
        if isinstance(value, dict):
            if {"is_error", "status"} & value.keys() and {"tool_use_id", "toolUseId", "tool_call_id"} & value.keys():
                value |= marks
                return True
            return any(mark(one) for one in value.values())
        return isinstance(value, list) and any(mark(one) for one in value)

    assert mark(row)
    return row


@pytest.mark.parametrize(
    "export", [name for name in EXPORTS if "is_error" in json.dumps(EXPORTS[name]) or '"success"' in json.dumps(EXPORTS[name])]
)
def test_that_a_call_has_failed_is_not_lost(export):
    """It is a key of the message: a template that does not write it has the example refused, as with all that nothing reads."""
    results = [message for message in read(failed(export)).messages if message["role"] == "tool"]
    assert [message.get("is_error") for message in results].count(True) == 1
    assert "is_error" in taught(base("qwen3"), failed(export))
    assert isinstance(taught(base("qwen3"), EXPORTS[export]), list)


# What is refused

USE = {"type": "tool_use", "id": "1", "name": "f", "input": {}}


@pytest.mark.parametrize(("messages", "reason"), [
    ([user([USE]), assistant("b")], "messages[0].content has a part of type tool_use, a call in a message that is not the assistant's"),
    ([user("a"), assistant([{"type": "tool_result", "tool_use_id": "1"}])], "messages[1].content has a part of type tool_result, a result in"),
    ([user("a"), assistant([USE, text("b")])], "messages[1].content has a text behind a tool call, where chat templates have none: put the"),
    ([user("a"), assistant([{**USE, "input": "x"}])], "messages[1].tool_calls: the arguments of f: not valid JSON"),
    ([user("a"), assistant([{**USE, "input": [1]}])], "messages[1].tool_calls: the arguments of f are a list, not an object"),
    ([user("a"), assistant([{**USE, "name": None}])], "messages[1].tool_calls holds a call without function.name"),
    ([user("a"), assistant([USE, {"type": "image"}])], "messages[1].content has a part of type image, and Trimtab trains on texts alone"),
    ([user([{"inlineData": {"data": "x"}}]), assistant("b")], "messages[0].content has a part of type inlineData, which is no text"),
    (
        [user("a"), assistant([USE]), user([{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "image"}]}]), assistant("b")],
        "messages[2]: its tool_result.content has a part of type image, and Trimtab trains on texts alone",
    ),
    (
        [user("a"), {"type": "web_search_call", "id": "1"}, assistant("b")],
        "messages[1] is of type web_search_call, which chat templates have no place for: leave the example out (data.bad_rows=skip), or remove",
    ),
    ([user("a"), {"type": "function_call", "name": "f", "arguments": "{"}], "messages[1].tool_calls: the arguments of f: not valid JSON"),
    ([user("a"), {"type": "reasoning", "summary": ["x", {"text": 3}]}, assistant("b")], "messages[1]: its reasoning is not a list of parts"),
    (
        [user("a"), {"type": "reasoning", "summary": [{"text": "x"}], "weight": 0}, assistant("b")],
        "messages[2] is part of the assistant's turn before it, and they differ in weight: give it to all of them",
    ),
    (
        [user("a"), {"type": "ai", "content": "b", "invalid_tool_calls": [{"name": "f"}]}],
        "messages[1] has invalid_tool_calls, whose arguments are no JSON object: leave the example out (data.bad_rows=skip)",
    ),
    ([user("a"), assistant(None, tool_calls=[{"type": "custom", "custom": {"name": "f", "input": "x"}}])], "a call of a custom tool"),
    ([user("a"), assistant([USE, USE], tool_calls=[{"function": {"name": "f"}}])], "messages[1] has tool_calls, and others as parts"),
])  # fmt: skip
def test_what_is_no_conversation_says_where_and_what_to_do(messages, reason):
    found = read({"messages": messages})
    assert isinstance(found, str), found
    assert reason in found
