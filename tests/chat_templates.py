"""The chat templates that `trl` ships, some forty of twenty families, and what a conversation on each has to teach.

What it has to teach is written here by hand, from what each family's models write and read; no code of ours, and no template,
is asked for it. The tokenizers are made up, with each family's own special tokens.
"""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import trl
from templates import CORPUS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab.base import Base

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))

# Conversations

TOOLS = [{
    "type": "function",
    "function": {
        "name": "weather", "description": "Says how it is.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where"}, "days": {"type": "integer", "description": "How many"}},
            "required": ["city"],
        },
    },
}]  # fmt: skip
CALLS = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 2}'}}]
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "1", "content": "Cold."}


def _user(content):
    return {"role": "user", "content": content}


def _said(content, **more):
    return {"role": "assistant", "content": content, **more}


def _thought(reasoning, answer):
    return f"<think>\n{reasoning}\n</think>\n\n{answer}"


SCENARIOS = {
    "single": [_user("One?"), _said("First.")],
    "system": [{"role": "system", "content": "Be brief."}, _user("One?"), _said("First.")],
    "several turns": [_user("One?"), _said("First."), _user("Two?"), _said("Second.")],
    "thinking in content": [
        _user("One?"),
        _said(_thought("Hm.", "First.")),
        _user("Two?"),
        _said(_thought("Well.", "Second.")),
    ],
    "reasoning_content": [_user("One?"), _said("First.", reasoning_content="Hm.")],
    "call last": [_user("One?"), _said("", tool_calls=CALLS)],
    "text and call": [_user("One?"), _said("Let me see.", tool_calls=CALLS)],
    "call, result, answer": [_user("One?"), _said("", tool_calls=CALLS), RESULT, _said("Second.")],
    "weight 0": [_user("One?"), _said("First.", weight=0), _user("Two?"), _said("Second.")],
}


def row(scenario):
    """A row of data."""
    messages = SCENARIOS[scenario]
    return (
        {"messages": messages, "tools": TOOLS}
        if any("tool_calls" in message for message in messages)
        else {"messages": messages}
    )


# What they have to teach

NO_REASONING = "does not write reasoning_content"
NO_CALLS = "leaves out its tool_calls"
NO_CONTENT = "leaves out its content: 'Let me see.'"
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
XML = "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
LFM = "<|tool_call_start|>[weather(city='Oslo', days=2)]<|tool_call_end|>"
GEMMA = '<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:2}<tool_call|>'
ATEM = (
    '<atem:function_calls>\n<atem:invoke name="weather">\n<atem:parameter name="city">Oslo</atem:parameter>\n'
    '<atem:parameter name="days">2</atem:parameter>\n</atem:invoke>\n</atem:function_calls>'
)
GLM = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
LLAMA = '{"name": "weather", "parameters": {"city": "Oslo", "days": 2}}'
CHATML_OPENS = "<|im_start|>assistant\n"


@dataclass(frozen=True)
class Taught:
    """What a template has to teach. What begins with `!` is refused, with that in the reason."""

    eos: str
    """The token by which the tokenizer says that a text ends."""
    opens: str
    """How a prompt ends."""
    answer: str
    """With {A} for an answer."""
    reasoned: str = f"!{NO_REASONING}"
    """With {R} for its reasoning."""
    thinking: str | None = None
    """What thinking in the content becomes: reasoning, if there is such a thing, or part of the answer."""
    call: str = f"!{NO_CALLS}"
    both: str = f"!{NO_CALLS}"
    """A text and a call."""
    after: str | None = None
    """An answer after the result of a call; as any other unless given."""
    system: str | None = None
    """Why a system message is refused."""
    stops: tuple[str, ...] = ()
    """Tokens by which a generation ends, as the generation config says, beside the first."""
    words: tuple[str, ...] = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
    """Tokens that are not special."""
    switches: dict = field(default_factory=dict)

    def runs(self, scenario: str) -> list[str]:
        """What is trained on, a text a turn; or one that begins with `!`."""
        first, second = self.answer.format(A="First."), self.answer.format(A="Second.")
        thinking = self.thinking or (self.answer if self.reasoned.startswith("!") else self.reasoned)
        whole = [{"A": _thought("Hm.", "First."), "R": ""}, {"A": _thought("Well.", "Second."), "R": ""}]
        parts = [{"A": "First.", "R": "Hm."}, {"A": "Second.", "R": "Well."}]
        after = (self.after or self.answer).format(A="Second.")
        return {
            "single": [first],
            "system": [f"!{self.system}"] if self.system else [first],
            "several turns": [first, second],
            "thinking in content": [thinking.format(**one) for one in (parts if "{R}" in thinking else whole)],
            "reasoning_content": [self.reasoned.format(**parts[0])],
            "call last": [self.call],
            "text and call": [self.both.replace("{A}", "Let me see.")],
            "call, result, answer": [self.call] if self.call.startswith("!") else [self.call, after],
            "weight 0": [second],
        }[scenario]


def _chatml(**more):
    return Taught("<|im_end|>", CHATML_OPENS, "{A}<|im_end|>", stops=("<|endoftext|>",), **more)


def _hermes(**more):
    return _chatml(call=f"{HERMES}<|im_end|>", both=f"{{A}}\n{HERMES}<|im_end|>", **more)


def _lfm(**more):
    return _chatml(call=f"{LFM}<|im_end|>", both=f"{{A}}{LFM}<|im_end|>", **more)


def _thinks(opens, before, between, after="", **more):
    """Qwen 3.5 and later, and Nemotron 3: an answer without reasoning closes what the prompt has opened."""
    return Taught(
        "<|im_end|>", f"{CHATML_OPENS}{opens}", f"{before}{{A}}<|im_end|>", f"{{R}}{between}{{A}}<|im_end|>",
        stops=("<|endoftext|>",), **more,
    )  # fmt: skip


def _gemma4(end="<|tool_response>", **more):
    return Taught(
        "<eos>", "<|turn>model\n", "{A}<turn|>", call=f"{GEMMA}{end}", both=f"{GEMMA}{{A}}{end}",
        stops=("<turn|>", "<|tool_response>"), **more,
    )  # fmt: skip


NEMOTRON = {"call": f"</think>\n{XML}\n<|im_end|>", "both": f"</think>{{A}}\n{XML}\n<|im_end|>"}
QWEN35 = {"call": f"\n</think>\n\n{XML}<|im_end|>", "both": f"\n</think>\n\n{{A}}\n\n{XML}<|im_end|>"}
DEEPSEEK = (
    "<｜end▁of▁sentence｜>",
    "<｜Assistant｜><think>\n",
    "\n</think>\n\n{A}<｜end▁of▁sentence｜>",
    "{R}\n</think>\n\n{A}<｜end▁of▁sentence｜>",
)
COHERE = "<|END_OF_TURN_TOKEN|>"
LLAMA3 = ("<|end_of_text|>", "<|start_header_id|>assistant<|end_header_id|>\n\n", "{A}<|eot_id|>")

TAUGHT = {
    "cohere": Taught(COHERE, "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", f"{{A}}{COHERE}"),
    "cohere2": Taught(COHERE, "<|CHATBOT_TOKEN|><|START_RESPONSE|>", f"{{A}}<|END_RESPONSE|>{COHERE}"),
    "deepseek_r1_distill": Taught(*DEEPSEEK),
    "deepseekv3": Taught(*DEEPSEEK, call="!leaves out tools", both="!leaves out tools"),
    "diffusion_gemma": _gemma4(reasoned="<|channel>thought\n{R}\n<channel|>{A}<turn|>", after="<|turn>model\n{A}<turn|>"),
    "gemma": Taught("<eos>", "<start_of_turn>model\n", "{A}<end_of_turn>", system="System role not supported"),
    "gemma3": Taught("<eos>", "<start_of_turn>model\n", "{A}<end_of_turn>"),
    "gemma4": _gemma4(),
    "gemma4_v2": _gemma4(end="<turn|>"),
    "gemma4_v3": _gemma4(),
    "gemma4_v4": _gemma4(),
    "gemma4_v5": _gemma4(reasoned="<|channel>thought\n{R}\n<channel|>{A}<turn|>"),
    "glm4moe": Taught(
        "<|endoftext|>", "<|assistant|>", "\n<think></think>\n{A}<|user|>", "\n<think>{R}</think>\n{A}<|user|>",
        call=f"\n<think></think>\n{GLM}<|observation|>", both=f"\n<think></think>\n{{A}}\n{GLM}<|observation|>",
        stops=("<|user|>", "<|observation|>"),
    ),
    "gptoss": Taught(
        "<|return|>", "<|start|>assistant", "<|channel|>final<|message|>{A}<|return|>",
        "<|channel|>analysis<|message|>{R}<|end|><|start|>assistant<|channel|>final<|message|>{A}<|return|>",
        call=' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo", "days": 2}<|call|>',
        both="<|channel|>analysis<|message|>{A}<|end|><|start|>assistant"
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo", "days": 2}<|call|>',
        stops=("<|call|>", "<|endoftext|>"),
    ),
    "idefics3": Taught("<end_of_utterance>", "\nAssistant:", " {A}<end_of_utterance>"),
    "lfm2": _chatml(),
    "lfm2_2_5": _lfm(reasoned="<think>{R}</think>{A}<|im_end|>"),
    "lfm2_2_5_v2": _lfm(reasoned="<think>{R}</think>{A}<|im_end|>"),
    "lfm2_2_5_vl": _lfm(reasoned="<think>{R}</think>{A}<|im_end|>"),
    "lfm2_v2": _lfm(),
    "llama3": Taught(*LLAMA3),
    "llama3_1": Taught(*LLAMA3, call=f"{LLAMA}<|eot_id|>", both=f"!{NO_CONTENT}", stops=("<|eom_id|>", "<|eot_id|>")),
    "llama3_2": Taught(*LLAMA3, call=f"{LLAMA}<|eot_id|>", both=f"!{NO_CONTENT}", stops=("<|eom_id|>", "<|eot_id|>")),
    "llava_next": Taught("</s>", " [/INST]", " {A}</s>"),
    "muse_glimmer": Taught(
        "<|eot|>", "<|start|>assistant", " to=user<|message|>{A}<|eot|>",
        " to=self<|message|>{R}<|eom|><|start|>assistant to=user<|message|>{A}<|eot|>",
        call=f" to=weather<|message|>{ATEM}<|eot|>", both=f"!{NO_CONTENT}",
    ),
    "nemotron_3_5_lightning": _thinks("<think>\n", "</think>", "</think>", **NEMOTRON),
    "nemotron_3_nano": _thinks("<think>\n", "</think>", "\n</think>\n", **NEMOTRON),
    "nemotron_3_super": _thinks("<think>\n", "</think>", "\n</think>\n", **NEMOTRON),
    "nemotron_3_ultra": _thinks("<think>\n", "</think>", "</think>", **NEMOTRON),
    "phi3": Taught("<|endoftext|>", "<|assistant|>\n", "{A}<|end|>", stops=("<|end|>",)),
    "phi3_5": Taught("<|endoftext|>", "<|assistant|>\n", "{A}<|end|>", stops=("<|end|>",)),
    "qwen2_5": _hermes(),
    "qwen2_5_vl": _chatml(),
    "qwen3": Taught(
        "<|im_end|>", CHATML_OPENS, "<think>\n\n</think>\n\n{A}<|im_end|>", "<think>\n{R}\n</think>\n\n{A}<|im_end|>",
        call=f"<think>\n\n</think>\n\n{HERMES}<|im_end|>", both=f"<think>\n\n</think>\n\n{{A}}\n{HERMES}<|im_end|>",
        stops=("<|endoftext|>",),
    ),
    "qwen3_5_nothink": Taught(
        "<|im_end|>", f"{CHATML_OPENS}<think>\n\n</think>\n\n", "{A}<|im_end|>", "!set model.template.enable_thinking=true",
        thinking="!set model.template.enable_thinking=true", call=f"{XML}<|im_end|>", both=f"{{A}}\n\n{XML}<|im_end|>",
        stops=("<|endoftext|>",),
    ),
    "qwen3_5_think": _thinks("<think>\n", "\n</think>\n\n", "\n</think>\n\n", **QWEN35),
    "qwen3_6": _thinks("<think>\n", "\n</think>\n\n", "\n</think>\n\n", **QWEN35),
    "qwen3_8": _thinks("<think>\n", "\n</think>\n\n", "\n</think>\n\n", **QWEN35),
    "qwen3_instruct_2507": _hermes(),
    "qwen3_vl": _hermes(),
    "smolvlm": Taught("<end_of_utterance>", "\nAssistant:", " {A}<end_of_utterance>"),
}  # fmt: skip

EMBEDDED = _chatml()
"""SmolLM2-135M-Instruct's."""

# Bases

_SPECIAL = r"<\|[^|<>\n]+\|>|<｜[^｜\n]+｜>|<(?:start|end)_of_(?:turn|utterance)>|<\|[a-z_\"]+>|<[a-z_\"]+\|>|\[gMASK\]|<sop>|</s>|<bos>|<eos>"


@cache
def base(name: str, **switches: bool) -> Base:
    """A base with this template of `trl`'s around a tiny model that nobody runs."""
    taught = TAUGHT[name]
    return base_with((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"), taught.eos, taught.stops, taught.words, **switches)


def base_with(
    source: str, eos: str, others: tuple[str, ...] = (), words: tuple[str, ...] = ("<think>", "</think>"), **switches: bool
) -> Base:
    """A base with this template and these tokens that end a generation."""
    special = dict.fromkeys([*re.findall(_SPECIAL, source), eos, *others])
    tokenizer = Tokenizer.from_str(_trained())
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<bos>", *special)])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in words])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token=eos)
    fast.chat_template = source
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip
    stops = [fast.convert_tokens_to_ids(token) for token in (eos, *others)]
    model.generation_config = GenerationConfig(eos_token_id=stops)
    return Base(model, fast, template=switches)


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS * 2, trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet, special_tokens=[])
    )
    return tokenizer.to_str()
