"""Small fast tokenizers with hand-written chat templates in the style of the well-known families, and bases around them.

What each template is to write is said here by hand (`Family.prompt`, `Family.said`), not by the template.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab.base import Base
from trimtab.testing import tiny_base

CORPUS = [
    "What is the capital of France? The capital of France is Paris.\n\nWhat is 2+2? It is 4. It is 4.",
    "system user assistant model tool end of turn start header\n\n\nhello hello world, the the answer answer is is",
    "assistant\n assistant\n\n user\n\nuser: ++ 2++ x  y   z\n\n\n\nhello, hello; the world. 中文 你好 你好世界",
    "### Instruction:\n\n### Response:\n\nhello the answer. Question: answer: hello\n\nthe\n\n",
]


LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def bytes_tokenizer(specials: tuple[str, ...], *, words: str | None = None, trim_offsets: bool = False) -> Tokenizer:
    """Byte-level BPE: any text, exactly. Split into words as GPT-2 does, or by `words`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if words:
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), letters])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[]
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    if trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return tokenizer


def pieces_tokenizer(specials: tuple[str, ...]) -> Tokenizer:
    """BPE on pieces with `▁` for a space and bytes for unknown characters, as Llama 2 and Mistral have it."""
    trained = Tokenizer(models.BPE())
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    trained.pre_tokenizer = metaspace
    trained.train_from_iterator(
        [part for text in CORPUS for part in text.split("\n")] * 2, trainers.BpeTrainer(vocab_size=200, show_progress=False)
    )
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for token in sorted(trained.get_vocab()):
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, _merges(trained), unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = metaspace
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return tokenizer


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def puts_around(tokenizer: Tokenizer, before: str = "", behind: str = "") -> Tokenizer:
    """The tokenizer, which then puts these special tokens around every plain text."""
    named = [(token, tokenizer.token_to_id(token)) for token in (before, behind) if token]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{before} $A {behind}".strip(), special_tokens=named)
    return tokenizer


def base_of(tokenizer: Tokenizer, template: str | None = None, *, layers: int = 1, **tokens: str) -> Base:
    """A base with this tokenizer, around a tiny model that nobody runs."""
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    fast.chat_template = template
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Base(LlamaForCausalLM(config), fast)


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' + message['content'] }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% set ns = namespace(asked=-1) %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and loop.index0 < ns.asked and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '<tool_call>\n' + call['function'] | tojson + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITHOUT_END = (
    "{% for message in messages %}{{ '### ' + message['role'] + ':\n\n' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """What one of the bases below should write and teach."""

    make: Callable[[], Base]
    turn: Callable[[str, str], str]
    """(role, content) -> the turn's whole text, a question's or an answer's."""
    opening: str
    """What asks for an answer."""
    said: Callable[[str], str]
    """An answer's text -> what is learned of it, without its end."""
    end: str
    """The token that ends a turn."""
    bos: str = ""
    system: bool = True
    """Takes a system message."""
    tools: bool = False
    """Takes tools and tool calls."""

    def prompt(self, messages: list[dict]) -> str:
        """The text that asks for an answer to these messages."""
        return self.bos + "".join(self.turn(m["role"], m["content"]) for m in messages) + self.opening


def _same(text: str) -> str:
    return text


def _chatml() -> Base:
    tokenizer = bytes_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    return base_of(tokenizer, CHATML, eos_token="<|im_end|>", pad_token="<|im_end|>")


def _llama3() -> Base:
    names = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
    tokenizer = puts_around(bytes_tokenizer(names, words=LLAMA3_WORDS), before="<|begin_of_text|>")
    return base_of(tokenizer, LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def _mistral() -> Base:
    tokenizer = puts_around(pieces_tokenizer(("<s>", "</s>")), before="<s>")
    return base_of(tokenizer, MISTRAL, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _gemma() -> Base:
    tokenizer = puts_around(bytes_tokenizer(("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")), before="<bos>")
    return base_of(tokenizer, GEMMA, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def _phi3() -> Base:
    tokenizer = bytes_tokenizer(("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), trim_offsets=True)
    return base_of(tokenizer, PHI3, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def _qwen3() -> Base:
    tokenizer = bytes_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in ("<think>", "</think>", "<tool_call>")])
    return base_of(tokenizer, QWEN3, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _chatml_turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def _qwen3_turn(role: str, content: str) -> str:
    """An earlier turn: its thinking is gone."""
    thought = role == "assistant" and "</think>" in content
    return _chatml_turn(role, content.split("</think>")[-1].lstrip("\n") if thought else content)


def _llama3_turn(role: str, content: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{content.strip()}<|eot_id|>"


def _mistral_turn(role: str, content: str) -> str:
    return f"[INST] {content} [/INST]" if role == "user" else f" {content}</s>"


def _gemma_turn(role: str, content: str) -> str:
    return f"<start_of_turn>{'model' if role == 'assistant' else role}\n{content}<end_of_turn>\n"


def _phi3_turn(role: str, content: str) -> str:
    return f"<|{role}|>\n{content}<|end|>\n"


FAMILIES = {
    "chatml": Family(cache(_chatml), _chatml_turn, "<|im_start|>assistant\n", _same, "<|im_end|>"),
    "llama3": Family(
        cache(_llama3),
        _llama3_turn,
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        str.strip,
        "<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "mistral": Family(cache(_mistral), _mistral_turn, "", lambda text: f" {text}", "</s>", bos="<s>", system=False),
    "gemma": Family(cache(_gemma), _gemma_turn, "<start_of_turn>model\n", _same, "<end_of_turn>", bos="<bos>", system=False),
    "phi3": Family(cache(_phi3), _phi3_turn, "<|assistant|>\n", _same, "<|end|>"),
    "qwen3": Family(cache(_qwen3), _qwen3_turn, "<|im_start|>assistant\n", _same, "<|im_end|>", tools=True),
}


@cache
def without_end() -> Base:
    """A base whose template ends no turn by a token."""
    return base_of(bytes_tokenizer(("<|endoftext|>",)), WITHOUT_END, eos_token="<|endoftext|>")


@cache
def plain(bos: bool = False, eos_behind: bool = False) -> Base:
    """A base without a chat template; its tokenizer puts a BOS before plain text, and an EOS behind it, as told."""
    tokenizer = bytes_tokenizer(("<s>", "</s>"))
    if bos or eos_behind:
        puts_around(tokenizer, before="<s>" if bos else "", behind="</s>" if eos_behind else "")
    return base_of(tokenizer, eos_token="</s>", **({"bos_token": "<s>"} if bos else {}))


def saved_base(path):
    """A tiny model with a chat tokenizer, saved as Transformers saves it."""
    base = tiny_base()
    base.model.save_pretrained(path)
    base.tokenizer.save_pretrained(path)
    return path
