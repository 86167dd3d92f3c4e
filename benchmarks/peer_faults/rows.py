"""B01-B11, B16: examples, their tokens, and the loss mask."""

import importlib
import sys
from pathlib import Path

import datasets
import peft
import torch
import transformers
from harness import Found, injected, trial
from tiny import (
    BOS,
    CHATML,
    END,
    END_OF_TEXT,
    MARKED,
    adapted,
    chat,
    llama,
    lora,
    saved,
    sft,
    texts,
    tokenizer,
)

THINKING = (
    "{% set ns = namespace(asked=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}"
    "{% if loop.index0 > ns.asked %}{{ m['content'] }}{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}"
    "{{ '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Leaves out what was thought in earlier turns, as Qwen3's does."""


def _learned(words: transformers.PreTrainedTokenizerFast, row: dict[str, list[int]]) -> str:
    return words.decode([token for token in row["labels"] if token != -100])


@trial("B01", "Transformers' DataCollatorForLanguageModeling", r"\bpad\b|\beos\b|pad_token|end of")
def end_is_never_learned(folder: Path) -> Found:
    words = tokenizer()
    words.pad_token = words.eos_token  # as Transformers' guide to causal language modeling says
    rows = [{"input_ids": words(f"hello {'world ' * n}")["input_ids"] + [END]} for n in range(8)]
    with injected():
        labels = transformers.DataCollatorForLanguageModeling(words, mlm=False)(rows)["labels"]
    lost = sum(END not in row for row in labels.tolist())
    other = sft(folder, adapted(llama()), texts(*["hello world"] * 8), words)
    kept = sum(END in row["labels"] for row in other.train_dataset)
    said = f"with pad = eos the end is no label in {lost} of 8 rows"
    return Found(lost > 0, f"{said}; TRL's own collator learns it in {kept} of 8")


@trial("B02", "TRL SFTTrainer", r"im_end|end-of-turn|stop|eos_token")
def learned_end_is_not_the_end(folder: Path) -> Found:
    # ChatML ends a turn by <|im_end|>, and the tokenizer's own end is <|endoftext|>, as in many a base model
    words, model = tokenizer(eos="<|endoftext|>"), llama(eos_token_id=END_OF_TEXT)
    rows = [chat("hello", "the answer is 42")] * 4
    with injected():
        trainer = sft(folder, model, rows, words, max_steps=120, learning_rate=3e-3)
        trainer.train()
        prompt = words.apply_chat_template(
            rows[0]["messages"][:1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        written = trainer.model.eval().generate(**prompt, max_new_tokens=40, do_sample=False)
    answer = written[0, prompt["input_ids"].shape[1] :].tolist()
    assert END in answer, words.decode(answer)
    place = answer.index(END) + 1
    return Found(
        len(answer) > place, f"the learned end is written as token {place}, and generation ends at {len(answer)} of 40"
    )


@trial("B03", "TRL SFTTrainer", r"mask|generation")
def mask_is_all_zeros(folder: Path) -> Found:
    with injected():
        trainer = sft(folder, adapted(llama()), [chat("hello", "yes")], assistant_only_loss=True)
    learned = {_learned(tokenizer(), row) for row in trainer.train_dataset}
    return Found(learned != {"yes<|im_end|>"}, f"learned: {learned}")


@trial("B05", "TRL SFTTrainer", r"mask|span|assistant")
def mask_lands_elsewhere(folder: Path) -> Found:
    words = tokenizer(MARKED)
    rows = [
        chat("yes", "yes", "yes yes", "yes"),
        chat("say it", "42", "42", "42", roles=("user", "assistant", "tool", "assistant")),
        chat("say nothing", ""),
        chat("user", "assistant", "hello", "<|im_start|>"),
        chat("你好", "你好 你好", "no", "hello, hello"),
    ]
    wanted = ["".join(m["content"] + "<|im_end|>" for m in row["messages"] if m["role"] == "assistant") for row in rows]
    with injected():
        trainer = sft(folder, adapted(llama()), rows, words, assistant_only_loss=True)
    wrong = sum(_learned(words, row) != text for row, text in zip(trainer.train_dataset, wanted, strict=True))
    return Found(wrong > 0, f"{len(rows) - wrong} of {len(rows)} conversations learn their answers and nothing else")


@trial("B06", "TRL SFTTrainer", r"\bbos|beginning")
def two_beginnings(folder: Path) -> Found:
    # a template that writes the BOS, applied before the trainer tokenizes: the usual way to a column of texts
    words = tokenizer("{{ bos_token }}" + CHATML, begins=True)
    chats = [chat("hello", f"it is {n}")["messages"] for n in range(8)]
    rows = texts(*(words.apply_chat_template(messages, tokenize=False) for messages in chats))
    with injected():
        trainer = sft(folder, adapted(llama()), rows, words)
    learned = [row["input_ids"].count(BOS) for row in trainer.train_dataset]
    used = words.apply_chat_template(chats[0], return_dict=True)["input_ids"].count(BOS)
    wrong = sum(count != used for count in learned)
    return Found(wrong > 0, f"{wrong} of 8 rows begin with {max(learned)} beginnings, and a chat with {used}")


@trial("B07", "PEFT", r"template|tokenizer")
def another_template_in_use(folder: Path) -> Found:
    question, base = chat("hello")["messages"], llama()
    trainer = sft(folder, base, [chat("hello", "yes")], peft_config=lora(), max_steps=1)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    saved(folder / "base", llama())
    saved(
        folder / "base", tokenizer("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant: ")
    )
    with injected():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
        peft.PeftModel.from_pretrained(model, str(folder / "adapter"))
        words = transformers.AutoTokenizer.from_pretrained(folder / "base")
        used = words.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    learned = tokenizer().apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    said = f"{len(used)} tokens of what it learned as {len(learned)}"
    return Found(used != learned, f"the adapter loads, and the template of its base makes {said}")


@trial("B08", "TRL SFTTrainer", r"prefix|think|earlier|changes")
def earlier_turns_change(folder: Path) -> Found:
    words = tokenizer(THINKING)
    row = chat("hello", "<think>it is 4</think>4", "and 2", "<think>it is 42</think>42")
    with injected():
        trainer = sft(folder, adapted(llama()), [row], words, assistant_only_loss=True)
    learned = _learned(words, trainer.train_dataset[0])
    kept = learned.count("<think>")
    return Found(
        kept < 2,
        f"of two answers that begin by thinking, {kept} is learned with what it thought, by a template that TRL does not know",
    )


@trial("B09", "TRL SFTTrainer", r"not a prefix")
def prompt_and_answer_share_a_token(folder: Path) -> Found:
    words, row = tokenizer(), {"prompt": "say hel", "completion": "lo world"}
    with injected():
        trainer = sft(folder, adapted(llama()), [row], words)
    (made,) = trainer.train_dataset
    asked = words(row["prompt"])["input_ids"]
    learned = made["input_ids"][: made["labels"].count(-100)]
    said = f"after {len(learned)} of its tokens, where generation has {len(asked)}"
    return Found(learned != asked, f"the answer to a prompt is learned {said}")


@trial("B10", "TRL SFTTrainer", r"trunc|max_length|longer than|cut")
def answers_are_cut(folder: Path) -> Found:
    with injected():
        trainer = sft(folder, adapted(llama()), texts(*["hello" + " hello" * 1500] * 4))
    cut = sum(END not in row["input_ids"] for row in trainer.train_dataset)
    return Found(cut > 0, f"{cut} of 4 rows of 1,500 words end in their middle, without an end token")


@trial("B11", "TRL SFTTrainer", r"dropp|filtered|trunc|max_length|skipp")
def rows_vanish(folder: Path) -> Found:
    rows = [{"prompt": "say" + " hello" * (n * 40), "completion": " yes"} for n in range(4)]
    with injected():
        trainer = sft(folder, adapted(llama()), rows, max_length=32)
    gone = len(rows) - len(trainer.train_dataset)
    return Found(gone > 0, f"{gone} of {len(rows)} rows are gone: their prompts fill the length")


@trial("B16", "TRL SFTTrainer", r"cache|fingerprint|hash")
def old_tokens_from_a_cache(folder: Path) -> Found:
    (folder / "rows.json").write_text('{"q": "hello"}\n{"q": "world"}\n', encoding="utf-8")
    wording = folder / "wording.py"  # the user's own module, which is edited between two runs
    sys.path.insert(0, str(folder))
    seen = []
    for word in ("Question", "Say"):
        wording.write_text(f'def say(row):\n    return "{word}: " + row["q"]\n', encoding="utf-8")
        say = importlib.reload(importlib.import_module("wording")).say
        rows = datasets.load_dataset("json", data_files=str(folder / "rows.json"), split="train")
        with injected():
            trainer = sft(folder, adapted(llama()), rows, formatting_func=say)
        seen.append(tokenizer().decode(trainer.train_dataset[0]["input_ids"]))
    old = seen[1].startswith("Question")
    return Found(old, f'after an edit of the module of formatting_func, a row is {"still" if old else "now"} "{seen[1]}"')


@trial("B17", "TRL SFTTrainer, PEFT", r"not .*train|trainable_token|untrained|never")
def new_tokens_are_not_trained(folder: Path) -> Found:
    words = tokenizer()
    model = llama(vocab_size=len(words))
    words.add_tokens(["<new>"])
    model.resize_token_embeddings(len(words))
    row = words.convert_tokens_to_ids("<new>")
    before = model.get_input_embeddings().weight[row].clone(), model.get_output_embeddings().weight[row].clone()
    with injected():
        trainer = sft(folder, model, texts(*["hello <new> world <new>"] * 8), words, peft_config=lora(), max_steps=10)
        trainer.train()
    ends = trainer.model.get_input_embeddings().weight[row], trainer.model.get_output_embeddings().weight[row]
    still = all(torch.equal(one, other) for one, other in zip(ends, before, strict=True))
    return Found(still, "after 10 steps a new token's rows are the random ones it was given" if still else "they are trained")
