"""Step 10: `trimtab.attach` in the place of PEFT's `get_peft_model`, in TRL's SFT, DPO and KTO trainers.

    pip install trl datasets && python examples/10_in_their_trainers.py

Losses are those with PEFT. Checkpoints hold the adapter alone, and trainers resume from them. DPO and KTO need no second model as the
reference if its log-probabilities are computed first (precompute_ref_log_probs), by the model with its fresh adapter: the base.
"""

import json
import os

import datasets
import transformers
import trl

import trimtab

MODEL = "smollm2-135m-instruct"  # or "Qwen/Qwen2.5-1.5B"
SHORT = int(os.environ.get("COURSE_STEPS", "0"))
TRAINERS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, "belle.jsonl", {}),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, "pairs.jsonl", {"precompute_ref_log_probs": True}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, "judged.jsonl", {"precompute_ref_log_probs": True}),
}

base = trimtab.load(MODEL)
for name, (trainer, config, file, own) in TRAINERS.items():
    adapter = trimtab.attach(base.model, trimtab.LoRA(rank=8, alpha=32, targets=["q_proj", "v_proj"]))
    with open(f"runs/course/data/{file}", encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(4 if SHORT else 32), lines, strict=False)]
    if name == "sft":  # TRL knows no BELLE
        rows = [{"prompt": f"{row['instruction']}\n{row['input']}\n", "completion": row["output"]} for row in rows]
    settings = config(
        f"runs/course/trl-{name}", max_steps=SHORT or 8, per_device_train_batch_size=2 if SHORT else 4, learning_rate=1e-3,
        logging_steps=1, save_steps=max(1, SHORT or 4), save_total_limit=2, report_to=[], disable_tqdm=True,
        gradient_checkpointing=False, bf16=False, **own,
    )  # fmt: skip
    trains = trainer(base.model, args=settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=base.tokenizer)
    trains.remove_callback(transformers.PrinterCallback)  # or each step's values are printed
    trains.train()
    losses = [line["loss"] for line in trains.state.log_history if "loss" in line]
    print(f"{name}: loss {losses[0]:.4f} to {losses[-1]:.4f}; second model: {getattr(trains, 'ref_model', None)}")
    trimtab.save_adapter(base, adapter, f"runs/course/trl-{name}/adapter")
    adapter.detach()
