"""Step 9: merge: in memory and back, to the last bit; and into a folder that Transformers loads without Trimtab.

    python examples/09_merge.py        # or: trimtab merge runs/course/lora runs/course/merged

The adapter is that of step 3.
"""

import torch
import transformers

import trimtab

MODEL = "smollm2-135m-instruct"  # or "Qwen/Qwen2.5-1.5B"
base = trimtab.load(MODEL)
adapter = trimtab.load_adapter(base, "runs/course/lora/adapter")
ids = torch.tensor([base.tokenizer("Ten oak shelves to Oslo, please.")["input_ids"]])


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=ids.to(base.device)).logits.float().cpu()


before = logits(base.model)
kept = adapter.merge()  # each matrix is now W + alpha/rank · B A, in one product
print(f"merged in memory: {kept:.1%} of the change is left, largest difference {(logits(base.model) - before).abs().max():.0e}")
adapter.unmerge()
print("unmerged, the logits are what they were:", torch.equal(logits(base.model), before))

report = trimtab.merge(base, adapter, "runs/course/merged")  # written only if its logits are right
print(f"in a folder: {report.matrices} matrices, largest difference {report.max_logit_difference:.0e}")
plain = transformers.AutoModelForCausalLM.from_pretrained("runs/course/merged")
print("Transformers alone:", f"{(logits(plain.to(base.device)) - before).abs().max():.0e}")
