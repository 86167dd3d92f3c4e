"""Step 5: load the adapter onto the base in a new process, and ask; a prompt, several prompts, a conversation.

    python examples/05_chat.py         # or: trimtab chat runs/course/lora --base

The orders are of demo/test.jsonl, on which no step trains.
"""

import json

import trimtab

MODEL = "smollm2-135m-instruct"  # or "Qwen/Qwen2.5-1.5B"
with open("demo/test.jsonl", encoding="utf-8") as lines:
    orders = [
        [message["content"] for message in json.loads(line)["messages"]] for _, line in zip(range(20), lines, strict=False)
    ]
prompts, expected = [f"{rule}\n{order}" for rule, order, _ in orders], [line for _, _, line in orders]

base = trimtab.load(MODEL)


def ask(question: str) -> str:
    return " ".join(trimtab.answer(base, question, max_new_tokens=24).split())


print("base:   ", ask(prompts[0]))
adapter = trimtab.load_adapter(base, "runs/course/lora/adapter")  # refuses another base than it was trained on
for prompt, line in zip(prompts[:3], expected, strict=False):
    print("expected:", line)
    print("adapter: ", ask(prompt))
answers = trimtab.answers(base, prompts, max_new_tokens=24)  # computed together
print(f"right: {sum(answer == line for answer, line in zip(answers, expected, strict=True))} of {len(expected)}")

with adapter.disabled():
    print("switched off:", ask(prompts[0]))
said = [{"role": "user", "content": prompts[0]}, {"role": "assistant", "content": expected[0]}]
said += [{"role": "user", "content": prompts[1]}]
print("sampled: ", end="")
for piece in trimtab.stream(base, said, max_new_tokens=24, temperature=0.7, seed=0):
    print(piece, end="", flush=True)
print()
