"""What is trained on, against TRL's own masks: on every template that it ships with marks around what the assistant says.

Where its marks differ from ours, the difference is written here, with its reason, and is compared to the character.
"""

import json

import pytest
from chat_templates import FOLDER, NAMES, SCENARIOS, base, row
from test_train_on import rows_of

SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.jinja")}
MARKED = {name: f"{name}_training" if f"{name}_training" in SOURCES else name for name in NAMES}
MARKED = {name: of for name, of in MARKED.items() if "endgeneration" in SOURCES[of]}

LINE = "\n"
"""The end of the line behind the token that ends a turn: generation has stopped there, and ours is no target."""
THINK, OPENED = "<think>\n", "<think>"
"""What the prompt of generation ends with, so the model does not generate it: a target of TRL's."""
START, DEEPSEEK = "<|start|>assistant", "<｜Assistant｜>"

BEFORE = {
    "deepseek_r1_distill": DEEPSEEK, "deepseekv3": DEEPSEEK, "gptoss": START, "muse_glimmer": START,
    "nemotron_3_5_lightning": OPENED, "nemotron_3_nano": OPENED, "nemotron_3_super": OPENED, "nemotron_3_ultra": OPENED,
    "qwen2_5": LINE, "qwen3_5_nothink": "<think>\n\n</think>\n\n", "qwen3_5_think": THINK, "qwen3_6": THINK, "qwen3_8": THINK,
}  # fmt: skip
"""What TRL marks before what generation begins with: a part of the prompt."""
BEHIND = {
    **dict.fromkeys(("diffusion_gemma", "gemma", "gemma3", "idefics3", "smolvlm", "phi3", "phi3_5"), LINE),
    **{name: LINE for name in MARKED if name.startswith(("lfm2", "nemotron", "qwen"))},
}
"""What it marks behind the token that ends a turn."""
NO_LINE = {name for name in MARKED if name.startswith("nemotron")}
"""Whose templates write `<think></think>`, while their prompts end with `<think>` and a line's end."""
FORGETS = {"qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"}
"""Whose templates leave the reasoning out of earlier answers, and TRL's do not."""
CLOSED = "\n</think>\n\n"
"""The end of reasoning that DeepSeek's prompt opens; TRL's template writes neither, so an answer without reasoning is trained as none."""
CALL = '<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:2}<tool_call|>'
FINAL = "<|start|>assistant<|channel|>final<|message|>"
NOT_THINKING = "<think>\nHm.\n</think>\n\nFirst.", "<think>\nWell.\n</think>\n\nSecond."

OTHERWISE = {
    # DeepSeek: TRL's prompt opens no reasoning, and its template for V3 drops what there is of it.
    **{
        (name, scenario): [f"{DEEPSEEK}{answer}<｜end▁of▁sentence｜>" for answer in answers]
        for name in ("deepseek_r1_distill", "deepseekv3")
        for scenario, answers in {
            "single": ["First."], "system": ["First."], "several turns": ["First.", "Second."], "reasoning_content": ["First."],
            "thinking in content": ["\n\nFirst.", "\n\nSecond."] if name == "deepseekv3" else NOT_THINKING,
        }.items()
    },
    # Gemma: the token by which a call ends its generation is the one that begins the result; after a result the prompt opens no turn.
    ("diffusion_gemma", "call last"): [CALL],
    ("diffusion_gemma", "text and call"): [f"{CALL}Let me see."],
    ("diffusion_gemma", "call, result, answer"): [CALL, "Second.<turn|>\n"],
    # Reasoning in the content is text to these templates, and reasoning to us, as it is with reasoning_content.
    ("diffusion_gemma", "thinking in content"): [f"{text}<turn|>\n" for text in NOT_THINKING],
    ("gptoss", "thinking in content"): [f"{FINAL}{NOT_THINKING[0]}<|end|>", f"{FINAL}{NOT_THINKING[1]}<|return|>"],
    ("muse_glimmer", "thinking in content"): [f"{START} to=user<|message|>{text}<|eot|>" for text in NOT_THINKING],
    ("qwen3_8", "thinking in content"): [f"{THINK}{CLOSED}{text}<|im_end|>\n" for text in NOT_THINKING],
    # An earlier answer stands as it is generated: with its reasoning, and with the token that ends a generation.
    ("glm4moe", "thinking in content"): ["\n<think></think>\nFirst.<|user|>", "\n<think>Well.</think>\nSecond.<|user|>"],
    ("gptoss", "several turns"): [f"{FINAL}First.<|end|>", f"{FINAL}Second.<|return|>"],
    **{
        (name, "thinking in content"): ["First.<|im_end|>\n", f"{NOT_THINKING[1]}<|im_end|>\n"]
        for name in MARKED if name.startswith("lfm2_2_5")
    },
    # The prompt ends with a line's end that Nemotron's templates do not write if an answer has no reasoning.
    **{
        (name, "reasoning_content"): [f"{THINK}Hm.{between}First.<|im_end|>\n"]
        for between, names in {"\n</think>\n": ("nano", "super"), "</think>": ("ultra", "5_lightning")}.items()
        for name in [f"nemotron_3_{size}" for size in names]
    },
    **{
        (name, "thinking in content"): ["<think></think>\n\nFirst.<|im_end|>\n", f"{NOT_THINKING[1]}<|im_end|>\n"]
        for name in MARKED if name.startswith("nemotron")
    },
}  # fmt: skip
"""TRL's targets where they are others: (template, scenario) -> a text a turn."""


def theirs(name, scenario):
    """TRL's targets, a text a turn, and all tokens."""
    on, given = base(name), row(scenario)
    messages = [dict(message) for message in given["messages"]]
    for message in messages:
        message.pop("weight", None)
        if on.template._needs_parts:
            message["content"] = [{"type": "text", "text": message["content"]}]
        if "tool_calls" in message:
            message["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
        if reasoning := message.pop("reasoning_content", None):
            message.update(dict.fromkeys(("reasoning_content", "reasoning", "thinking"), reasoning))
    made = on.tokenizer.apply_chat_template(
        messages, tools=given.get("tools"), chat_template=SOURCES[MARKED[name]], return_dict=True, return_assistant_tokens_mask=True
    )  # fmt: skip
    return marked(on, made["input_ids"], made["assistant_masks"]), made["input_ids"]


def marked(on, ids, mask):
    """The text of each run of masked tokens."""
    starts = [t for t in range(len(ids)) if mask[t] and not (t and mask[t - 1])]
    ends = [next((t for t in range(start, len(ids)) if not mask[t]), len(ids)) for start in starts]
    return [on.tokenizer.decode(ids[start:end]) for start, end in zip(starts, ends, strict=True)]


def expected(name, scenario, ours):
    """TRL's targets, from ours and what is said above about their difference."""
    if (name, scenario) in OTHERWISE:
        return OTHERWISE[name, scenario]
    made = [f"{BEFORE.get(name, '')}{text}{BEHIND.get(name, '')}" for text in ours]
    if name.startswith("phi3"):  # it marks the end of all text behind the conversation
        made[-1] += "<|endoftext|>"
    return made


def test_nearly_all_templates_have_marks():
    assert len(MARKED) >= 34
    assert {name.partition("_")[0] for name in set(NAMES) - set(MARKED)} == {"gemma4", "llama3"}, (
        "whose other versions have some"
    )
    assert {name for name, _ in OTHERWISE} | BEFORE.keys() | BEHIND.keys() <= MARKED.keys()


@pytest.mark.parametrize("scenario", [scenario for scenario in SCENARIOS if scenario != "weight 0"])
@pytest.mark.parametrize("name", MARKED)
def test_targets_are_those_of_trls_masks_but_for_what_is_written_here(name, scenario):
    on = base(name)
    rows, refused = rows_of(row(scenario), on)
    if refused:  # what a template leaves out silently, TRL trains without
        return
    ours = [text for r in rows for text in marked(on, r.ids, [t in set(r.target_indices) for t in range(len(r.ids))])]
    runs, ids = theirs(name, scenario)
    assert runs == expected(name, scenario, ours)
    plain = [f"{BEFORE.get(name, '')}{text}{BEHIND.get(name, '')}" for text in ours]
    assert (name, scenario) not in OTHERWISE or runs != plain, "an exception that is none"
    (whole,), _ = rows_of(row(scenario), on, "everything")
    texts = [on.tokenizer.decode(one) for one in (ids, whole.ids)]
    if (name, scenario) not in OTHERWISE and name not in NO_LINE and not (name in FORGETS and len(ours) > 1):
        assert texts[0].startswith(texts[1]), "what stands before and between them is the same, too"
        assert texts[0][len(texts[1]) :].strip() in ("", *on.control_tokens)
        assert whole.target_indices == list(range(1, len(whole.ids)))


@pytest.mark.parametrize("name", ["llama3", "phi3", "phi3_5", "qwen3", "cohere2"])
def test_a_token_more_or_less_is_found(name):
    """The negative control of the comparison."""
    on = base(name)
    (r,), _ = rows_of(row("single"), on)
    runs, _ = theirs(name, "single")
    for targets in (r.target_indices[1:], r.target_indices[:-1], [r.target_indices[0] - 1, *r.target_indices]):
        ours = marked(on, r.ids, [t in set(targets) for t in range(len(r.ids))])
        assert runs != expected(name, "single", ours)
