"""A script with TRL, as its users write it: python tests/trl_script.py FOLDER. It leaves its arguments, its first adapter and its losses."""

import json
import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

folder = Path(sys.argv[1])
rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
peft_config = LoraConfig(**settings["LoraConfig"])
args = SFTConfig(
    output_dir=str(folder / "theirs"), use_cpu=True, bf16=False, report_to="none", logging_steps=1, save_strategy="no", seed=1,
    **settings["SFTConfig"],
)  # fmt: skip
losses = []


class Losses(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **more):
        if "loss" in logs:
            losses.append(logs["loss"])


trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(folder / "tiny", dtype="float32", trust_remote_code=False),
    processing_class=AutoTokenizer.from_pretrained(folder / "tiny", trust_remote_code=False),
    args=args, train_dataset=Dataset.from_list(rows), peft_config=peft_config, callbacks=[Losses()],
)  # fmt: skip
trainer.model.save_pretrained(folder / "start")
trainer.train()
plain = {"LoraConfig": peft_config.to_dict(), "SFTConfig": args.to_dict()}
(folder / "theirs.json").write_text(
    json.dumps(plain, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
)
(folder / "losses.json").write_text(json.dumps(losses))
