"""One training run by a peer, in a process of its own: python run_peer.py SPEC.json, where peft (and, for TRL, trl) is installed.

It needs nothing of Trimtab, whose environment may be another. The examples are tokens already, in the order of training;
the adapter starts from the same weights as Trimtab's.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch


def run(spec: dict[str, Any]) -> dict[str, Any]:
    import peft
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(spec["model"], trust_remote_code=False)
    losses: list[torch.Tensor] = []
    if spec["objective"]["name"] == "sft":
        model = _model(spec)
        model = peft.PeftModel.from_pretrained(model, spec["start"], is_trainable=True)
        make = _trl if spec["library"] == "trl" else _transformers
        trainer = make(spec, model, tokenizer, [_labelled(row) for row in spec["rows"]], losses)
    else:
        trainer = preference_trainer(spec, tokenizer, losses)
    started = time.perf_counter()
    trainer.train()
    read = torch.stack(losses).tolist()  # all at once, when the device has done its work
    seconds = time.perf_counter() - started
    return {"losses": read, "seconds": seconds, "peak_gb": peak_gb()}


def _model(spec: dict[str, Any]) -> Any:
    import transformers

    dtype = getattr(torch, spec["dtype"])
    return transformers.AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype, trust_remote_code=False)


def peak_gb() -> float:
    """The peak memory of this process: on the device if there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # getrusage begins with the parent's peak
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def _labelled(row: dict[str, Any]) -> dict[str, Any]:
    targets = set(row["targets"])
    return {"input_ids": row["ids"], "labels": [t if place in targets else -100 for place, t in enumerate(row["ids"])]}


def preference_trainer(spec: dict[str, Any], tokenizer: Any, losses: list[torch.Tensor]) -> Any:
    """TRL's trainer for pairs or judged answers; its reference is the model without the adapter, which is new."""
    import datasets
    import peft
    import trl
    from safetensors.torch import load_file

    objective, of_pairs = dict(spec["objective"]), spec["objective"]["name"] == "dpo"
    settings = {**_settings(spec), "max_length": None, "beta": objective["beta"]}
    trainer: Any
    config: Any
    if of_pairs:
        trainer = trl.DPOTrainer
        config = trl.DPOConfig(**settings, loss_type=[objective["loss_type"]], label_smoothing=objective["label_smoothing"])
    else:
        weights = {"desirable_weight": objective["desirable"], "undesirable_weight": objective["undesirable"]}
        trainer, config = trl.KTOTrainer, trl.KTOConfig(**settings, **weights)

    class Tokenized(_recording(trainer, losses)):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    adapter = peft.PeftConfig.from_pretrained(spec["start"])
    adapter.inference_mode = False
    peer = Tokenized(
        model=_model(spec),
        args=config,
        train_dataset=datasets.Dataset.from_list(_units(spec["rows"], of_pairs)),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    peft.set_peft_model_state_dict(peer.model, load_file(Path(spec["start"]) / "adapter_model.safetensors"))
    return peer


def _units(rows: list[dict[str, Any]], of_pairs: bool) -> list[dict[str, Any]]:
    """Two neighbours each as one: chosen and rejected, or an answer and a mismatched one."""
    paired = []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        start = first["targets"][0]
        prompt, answer, second_answer = first["ids"][:start], first["ids"][start:], second["ids"][start:]
        if of_pairs:
            paired.append({"prompt_ids": prompt, "chosen_ids": answer, "rejected_ids": second_answer})
        else:
            unit = {"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": second_answer}
            paired.append({**unit, "label": first["side"] == "good"})
    return paired


def _settings(spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": spec["scratch"],
        "per_device_train_batch_size": spec["rows_per_step"],
        "num_train_epochs": 1,
        "learning_rate": spec["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "gradient_checkpointing": spec["recompute"],
        "train_sampling_strategy": "group_by_length" if spec["grouped"] else "sequential",  # they are shuffled already
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 10_000,
        "disable_tqdm": True,
        "use_cpu": spec["device"] == "cpu",
        "bf16": spec["dtype"] == "bfloat16",  # LoRA's matrices are float32, and multiplied in 16 bits
        "fp16": spec["dtype"] == "float16",
    }


def _recording(kind: Any, losses: list[torch.Tensor]) -> type:
    class Recording(kind):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    return Recording


def _transformers(
    spec: dict[str, Any], model: Any, tokenizer: Any, data: list[dict[str, Any]], losses: list[torch.Tensor]
) -> Any:
    import transformers

    settings = transformers.TrainingArguments(**_settings(spec))
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, padding="longest")
    return _recording(transformers.Trainer, losses)(model=model, args=settings, train_dataset=data, data_collator=collator)


def _trl(spec: dict[str, Any], model: Any, tokenizer: Any, data: list[dict[str, Any]], losses: list[torch.Tensor]) -> Any:
    import datasets
    import trl

    settings = trl.SFTConfig(**_settings(spec), max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    rows = datasets.Dataset.from_list(data)
    return _recording(trl.SFTTrainer, losses)(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(json.loads(Path(sys.argv[1]).read_text()))) + "\n")
