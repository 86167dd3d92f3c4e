"""Step 5: load the adapter onto the base in a new process, and ask; a prompt, several prompts, a conversation.

python examples/05_chat.py         # or: trimtab chat runs/course/lora --base
"""

import json

import trimtab

MODEL = "smollm2-135m-instruct"  # or "Qwen/Qwen2.5-1.5B"
with open("runs/course/data/belle.jsonl", encoding="utf-8") as lines:
    examples = [json.loads(line) for _, line in zip(range(3), lines, strict=False)]
prompts = [f"{example['instruction']}\n{example['input']}" for example in examples]

base = trimtab.load(MODEL)


def ask(question: str) -> str:
    return " ".join(trimtab.answer(base, question, max_new_tokens=24).split())


print("base:   ", ask(prompts[0]))
adapter = trimtab.load_adapter(base, "runs/course/lora/adapter")  # refuses another base than it was trained on
for prompt, example in zip(prompts, examples, strict=True):
    print("expected:", example["output"])
    print("adapter: ", ask(prompt))

with adapter.disabled():
    print("switched off:", ask(prompts[0]))
said = [{"role": "user", "content": prompts[0]}, {"role": "assistant", "content": examples[0]["output"]}]
said += [{"role": "user", "content": prompts[1]}]
print("sampled: ", end="")
for piece in trimtab.stream(base, said, max_new_tokens=24, temperature=0.7, seed=0):
    print(piece, end="", flush=True)
print()
