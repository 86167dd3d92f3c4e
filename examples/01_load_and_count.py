"""Step 1: load a model and its tokenizer, ask it something, and count what LoRA, an adapter and a prefix would train.

    python examples/01_load_and_count.py

The steps build on each other: run them in their order. docs/course.md shows what each prints. Everything goes to runs/course.
"""

import trimtab

MODEL = "smollm2-135m-instruct"  # or "Qwen/Qwen2.5-1.5B", a folder, a GGUF file: each step runs on it by this one line

base = trimtab.load(MODEL)  # a frozen model with its tokenizer and chat template, in bfloat16 where there is a GPU
print(f"{base.source}: {sum(p.numel() for p in base.model.parameters()):,} parameters, {base.model.dtype!s}")
answer = trimtab.answer(base, "Ten oak shelves to Oslo, please. - Eva Lind", max_new_tokens=20)
print("Before training:", " ".join(answer.split()))

# LoRA puts a layer around each q_proj and v_proj: y = W x + alpha/rank · B A x. A is rank × inputs and B outputs × rank,
# so a matrix adds rank · (inputs + outputs) parameters. v_proj is narrower than q_proj where heads share keys and values.
lora = trimtab.LoRA(rank=8, alpha=32, dropout=0.1, targets=["q_proj", "v_proj"])
adapter = trimtab.attach(base.model, lora)
print(f"\nLoRA replaces {len(adapter.layers)} modules:\n{adapter}")
b = adapter.parameters()["model.layers.0.self_attn.q_proj.B"]
print(f"B starts at zero, so nothing has changed yet: its largest number is {float(b.detach().abs().max())}")
adapter.detach()  # takes the layers off: the model is what it was, to the last bit

# A bottleneck adapter is a small network after each MLP; a prefix is keys and values of virtual tokens in every layer.
bottleneck = trimtab.attach(base.model, trimtab.BottleneckAdapter(reduction=16))
print(f"\nBottleneck adapters:\n{bottleneck}")
bottleneck.detach()
examples = trimtab.rows([{"prompt": "Ten oak shelves to Oslo, please.", "completion": "10 | oak shelves"}] * 2, base)
prefix = trimtab.attach(base.model, trimtab.PrefixTuning(tokens=20), sample=trimtab.sample(base, examples))
print(f"\nA prefix of 20 virtual tokens:\n{prefix}")
prefix.detach()
base.check_unchanged()
