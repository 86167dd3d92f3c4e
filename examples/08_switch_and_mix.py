"""Step 8: several adapters on one base: load them while it runs, switch, serve them in one batch, mix LoRAs, take one off.

    python examples/08_switch_and_mix.py

The adapters are those of steps 3, 6 and 7.
"""

import trimtab

MODEL = "smollm2-135m-instruct"  # or "Qwen/Qwen2.5-1.5B"
RULE = "Write each order as: quantity | item | customer | city | day. Use - for what is missing."
ORDER = f"{RULE}\n18 oak shelves to Oslo by Monday, please. Yours, Eva Lind"

base = trimtab.load(MODEL)


def line(text: str) -> str:
    return " ".join(text.split())


def ask() -> str:
    return line(trimtab.answer(base, ORDER, max_new_tokens=24))


trimtab.load_adapter(base, "runs/course/lora/adapter", name="orders")
trimtab.load_adapter(base, "runs/course/dpo/adapter", name="preferred")
trimtab.load_adapter(base, "runs/course/prefix/adapter", name="prefix")
print("on the model:", ", ".join(trimtab.adapters(base.model)))

for name in ("orders", "prefix"):
    trimtab.activate(base.model, name)  # this one acts, and no other
    print(f"{name}: {ask()}")
with trimtab.active(base.model):  # none within this block, in this thread
    print(f"base: {ask()}")

# One batch, in which each row has its own adapter, or none.
(row,) = trimtab.rows([{"prompt": ORDER, "completion": "-"}], base)
prompt, owners = row.ids[: row.target_indices[0]], ["orders", "prefix", None]
answers = trimtab.generate(base.model, [prompt] * 3, base.stop_ids, max_new_tokens=24, owners=owners)
for owner, answer in zip(owners, answers, strict=True):
    print(f"in one batch, {owner or 'base'}: {line(base.decode(answer))}")

# A weighted sum of LoRAs is a LoRA: exact by concatenation, or of a smaller rank with its error.
mixed = trimtab.combine(base.model, {"orders": 0.7, "preferred": 0.3}, "mixed")
print(f"mixed: rank {mixed.rank}, error {mixed.error:.1e}: {ask()}")
small = trimtab.combine(base.model, {"orders": 0.7, "preferred": 0.3}, "small", rank=8)
print(f"of rank {small.rank}: error {small.error:.1e}")

for adapter in trimtab.adapters(base.model).values():
    adapter.detach()
base.check_unchanged()  # the base is what it was, to the last bit
print("all off; the base is unchanged")
