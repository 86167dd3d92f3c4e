"""Step 2: data. The demo's orders in BELLE's columns, pairs for DPO, and judged answers for KTO; then how examples become tokens.

    python examples/02_data.py

Your own data needs no such step: name its file instead. See `trimtab init FILE` for what is found in it.
"""

import json
from pathlib import Path

import trimtab

MODEL = "smollm2-135m-instruct"  # or "Qwen/Qwen2.5-1.5B"
DEMO = Path("demo/train.jsonl")  # 480 invented orders, as messages
DATA = Path("runs/course/data")
LIMIT = 10_000  # the chapter's, of BELLE; the demo has 480


def write(name: str, rows: list[dict[str, object]]) -> None:
    (DATA / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{DATA / name}: {len(rows)} examples, {', '.join(rows[0])}")


def swapped(answer: str) -> str:
    """A worse answer: the customer and the city have changed places."""
    quantity, item, customer, city, day = answer.split(" | ")
    return " | ".join([quantity, item, city, customer, day])


DATA.mkdir(parents=True, exist_ok=True)
with DEMO.open(encoding="utf-8") as lines:
    orders = [[message["content"] for message in json.loads(line)["messages"]] for line in lines]
write("belle.jsonl", [{"instruction": rule, "input": order, "output": line} for rule, order, line in orders])
asked = [{"prompt": f"{rule}\n{order}", "good": line, "bad": swapped(line)} for rule, order, line in orders]
write("pairs.jsonl", [{"prompt": a["prompt"], "chosen": a["good"], "rejected": a["bad"]} for a in asked])
judged = [(a["prompt"], a["bad" if n % 2 else "good"], n % 2 == 0) for n, a in enumerate(asked)]
write("judged.jsonl", [{"prompt": prompt, "completion": answer, "label": good} for prompt, answer, good in judged])

# instruction and input make the user's turn and output the assistant's, as the model's own chat template writes them.
# The loss is on the answer alone: the chapter's -100. `limit` takes a random sample, and the rest is not read any further.
base = trimtab.load(MODEL)
rows = trimtab.rows(DATA / "belle.jsonl", base, limit=LIMIT)
first = rows[0]
print(f"\n{len(rows)} rows; the first ({first.where.rpartition('/')[2]}), with the targets of the loss in [ ]:")
start, end = first.target_indices[0], first.target_indices[-1] + 1
print(base.raw_text(first.ids[:start]) + "[" + base.raw_text(first.ids[start:end]) + "]" + base.raw_text(first.ids[end:]))
