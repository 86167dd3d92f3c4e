"""Other tools' names for recipe keys, methods and objectives, and Trimtab's equivalents: Transformers, TRL, PEFT, LLaMA-Factory, Axolotl,
ms-swift and Unsloth."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

SAME = {
    "learning_rate": "train.lr", "lr": "train.lr",
    "num_train_epochs": "train.epochs", "num_epochs": "train.epochs", "n_epochs": "train.epochs", "max_epochs": "train.epochs",
    "epochs": "train.epochs",
    "rows_per_step": "train.rows_per_step", "tokens_per_step": "train.tokens_per_step", "pack_tokens": "train.pack_tokens",
    "lr_scheduler_type": "train.schedule", "lr_scheduler": "train.schedule", "scheduler": "train.schedule", "schedule": "train.schedule",
    "weight_decay": "train.weight_decay", "max_grad_norm": "train.clip", "gradient_clipping": "train.clip", "clip": "train.clip",
    "grad_clip": "train.clip", "seed": "train.seed", "data_seed": "data.seed",
    "gradient_checkpointing": "train.recompute", "use_gradient_checkpointing": "train.recompute", "recompute": "train.recompute",
    "activation_checkpointing": "train.recompute",
    "eval_steps": "train.evaluate_every", "save_steps": "train.save_every", "evals_per_epoch": "train.evaluate_every",
    "eval_strategy": "train.evaluate_every", "save_strategy": "train.save_every", "evaluation_strategy": "train.evaluate_every",
    "saves_per_epoch": "train.save_every", "evaluate_every": "train.evaluate_every", "eval_every": "train.evaluate_every",
    "save_every": "train.save_every", "save_total_limit": "train.keep", "keep": "train.keep",
    "max_steps": "train.max_steps", "num_steps": "train.max_steps", "total_steps": "train.max_steps", "iters": "train.max_steps",
    "warmup_steps": "train.warmup", "warmup_ratio": "train.warmup", "num_warmup_steps": "train.warmup", "warmup": "train.warmup",
    "early_stopping_patience": "train.patience", "early_stopping": "train.patience", "patience": "train.patience",
    "early_stopping_threshold": "train.min_improvement", "min_improvement": "train.min_improvement",
    "min_lr_rate": "train.floor", "cosine_min_lr_ratio": "train.floor", "floor": "train.floor", "num_decay_steps": "train.decay",
    "decay": "train.decay",
    "lora_r": "method.rank", "lora_rank": "method.rank", "r": "method.rank", "rank": "method.rank",
    "lora_alpha": "method.alpha", "alpha": "method.alpha", "lora_dropout": "method.dropout", "dropout": "method.dropout",
    "target_modules": "method.targets", "lora_target": "method.targets", "lora_target_modules": "method.targets",
    "lora_target_linear": "method.targets (all-linear is the default)", "targets": "method.targets",
    "use_rslora": "method.rank_stabilized", "peft_use_rslora": "method.rank_stabilized", "rank_pattern": "method.ranks",
    "alpha_pattern": "method.alphas", "loraplus_lr_ratio": "method.b_rate", "init_lora_weights": "method.init",
    "num_virtual_tokens": "method.tokens", "use_dora": "method=dora", "peft_use_dora": "method=dora",
    "adapter": "method.name", "peft_type": "method.name", "finetuning_type": "method.name", "train_type": "method.name",
    "tuner_type": "method.name", "peft_method": "method.name", "use_peft": "method.name (lora is the default)",
    "load_in_4bit": "model.quantize=nf4", "quantization_bit": "model.quantize=nf4, or int8", "load_in_8bit": "model.quantize=int8",
    "quantization": "model.quantize", "quant_method": "model.quantize", "bnb_4bit_quant_type": "model.quantize",
    "torch_dtype": "model.dtype", "dtype": "model.dtype", "bf16": "model.dtype=bfloat16", "fp16": "model.dtype", "tf32": "model.dtype",
    "precision": "model.dtype", "compute_dtype": "model.dtype", "mixed_precision": "model.dtype",
    "model_name_or_path": "model.name", "base_model": "model.name", "model_name": "model.name", "model_id": "model.name",
    "model_path": "model.name", "pretrained_model_name_or_path": "model.name", "device": "model.device", "device_map": "model.device",
    "revision": "model.name=org/model@revision", "model_revision": "model.name=org/model@revision",
    "chat_template": "model.chat_template", "chat_template_path": "model.chat_template", "chat_template_jinja": "model.chat_template",
    "enable_thinking": "model.template.enable_thinking", "chat_template_kwargs": "model.template",
    "dataset": "data.train", "datasets": "data.train", "dataset_name": "data.train", "train_file": "data.train",
    "train_data": "data.train", "data_path": "data.train", "train_dataset": "data.train", "dataset_path": "data.train",
    "dataset_dir": "data.train (paths may be relative)", "val_size": "data.eval", "val_set_size": "data.eval", "eval_dataset": "data.eval",
    "validation_split": "data.eval", "split_dataset_ratio": "data.eval", "validation_file": "data.eval", "test_datasets": "data.eval",
    "val_dataset": "data.eval", "test_size": "data.eval",
    "cutoff_len": "data.max_length", "max_seq_length": "data.max_length", "max_seq_len": "data.max_length",
    "sequence_len": "data.max_length", "max_length": "data.max_length", "model_max_length": "data.max_length",
    "truncation_strategy": "data.overlong", "field_messages": "data.columns", "dataset_text_field": "data.columns.text",
    "output_dir": "output", "overwrite_output_dir": "output (nothing is overwritten: give another)",
    "resume_from_checkpoint": "resume (the same command resumes a run)", "auto_resume_from_checkpoints": "resume",
    "full_determinism": "train.deterministic", "use_deterministic_algorithms": "train.deterministic",
    "stage": "objective.name", "rl": "objective.name", "rlhf_type": "objective.name", "loss_type": "objective.loss_type",
    "beta": "objective.beta", "pref_beta": "objective.beta", "dpo_beta": "objective.beta", "rl_beta": "objective.beta",
    "ref_model": "objective.reference", "pref_loss": "objective.loss_type", "label_smoothing": "objective.label_smoothing",
    "lora_model_dir": "start", "adapter_name_or_path": "start", "adapters": "start",
}  # fmt: skip
"""The key of the recipe with the same meaning."""

AUTOMATIC = {
    **dict.fromkeys(
        ("batch_size", "per_device_train_batch_size", "micro_batch_size", "train_batch_size", "per_device_eval_batch_size",
         "eval_batch_size", "gradient_accumulation_steps", "effective_batch_size", "total_batch_size"),
        "train.rows_per_step is the effective batch size; the micro-batch is derived from the free memory",
    ),
    **dict.fromkeys(
        ("packing", "sample_packing", "neat_packing", "padding_free", "group_by_length", "pad_to_sequence_len", "pad_to_multiple_of",
         "use_cache", "flash_attn", "flash_attention", "attn_implementation", "attn_impl", "use_liger_kernel", "enable_liger_kernel",
         "liger_kernel", "remove_unused_columns", "eval_sample_packing"),
        "it is not needed: examples are always packed without padding, and shared prefixes are computed once",
    ),
    **dict.fromkeys(
        ("train_on_inputs", "mask_history", "train_on_prompt", "assistant_only_loss", "completion_only_loss", "roles_to_train",
         "loss_scale"),
        "only the assistant's messages are trained on, without those that have weight: 0",
    ),
    **dict.fromkeys(
        ("template", "prompt_template", "conversation_template"),
        "the model's own chat template is used; its switches are set with model.template, and another one with model.chat_template=FILE",
    ),
    **dict.fromkeys(
        ("logging_steps", "logging_strategy", "logging_dir", "logging_first_step"), "every step is logged, in the run's metrics.jsonl"
    ),
    **dict.fromkeys(
        ("save_only_model", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        "the adapter with the lowest validation loss is the result, and checkpoints are kept automatically",
    ),
    **dict.fromkeys(
        ("num_proc", "preprocessing_num_workers", "dataloader_num_workers", "dataset_num_proc", "dataset_processes",
         "preprocessing_batch_size", "dataset_prepared_path", "overwrite_cache", "shuffle", "shuffle_merged_datasets"),
        "tokenization and its cache are automatic, and examples are shuffled by train.seed",
    ),
    **dict.fromkeys(
        ("bias", "task_type", "inference_mode", "peft_layers_to_transform", "fan_in_fan_out"),
        "it needs no key; see docs/methods.md for what each method trains",
    ),
    **dict.fromkeys(
        ("tokenizer", "tokenizer_name", "tokenizer_type", "tokenizer_name_or_path", "model_type", "processor"),
        "the model's own is used, and detected automatically",
    ),
    **dict.fromkeys(
        ("special_tokens", "add_special_tokens", "resize_vocab", "new_special_tokens"),
        "new tokens are trained with method: {name: tokens, new: […]}",
    ),
}  # fmt: skip
"""Settings that need no key, and what Trimtab does."""

UNSUPPORTED = {
    **dict.fromkeys(
        ("report_to", "wandb_project", "use_wandb", "wandb_entity", "swanlab", "use_swanlab", "mlflow_tracking_uri", "run_name"),
        "no tracker is supported yet; a run's metrics.jsonl has a line a step",
    ),
    **dict.fromkeys(
        ("optim", "optimizer", "optimizers", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args"), "AdamW is used, with betas 0.9 and 0.999"
    ),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "ddp_timeout", "ddp_find_unused_parameters", "local_rank", "tensor_parallel_size",
         "nproc_per_node", "num_gpus"),
        "one device is used",
    ),
    **dict.fromkeys(("neftune_noise_alpha", "neftune_alpha"), "noise is not added to embeddings"),
    **dict.fromkeys(
        ("hub_model_id", "push_to_hub", "hub_token", "hub_strategy"), "nothing is uploaded; the files to upload are in the run's folder"
    ),
    **dict.fromkeys(
        ("system", "default_system_message", "system_prompt"), "a system message comes with the examples, in a column `system` or as a message"
    ),
    **dict.fromkeys(("streaming", "max_samples", "num_train_samples", "limit"), "all examples of data.train are used"),
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "predict_with_generate"), "trimtab train trains and evaluates; trimtab eval answers"),
    **dict.fromkeys(("strict", "debug", "plugins", "hooks", "callbacks"), "there are no plugins"),
}  # fmt: skip
"""Settings that Trimtab does not have, and what it has instead."""

CHOICES = {
    "qlora": "it is method: lora with model.quantize: nf4",
    "rslora": "it is method: lora with method.rank_stabilized: true",
    "pissa": "it is method: lora with method.init: pissa",
    "eva": "it is method: lora with method.init: eva",
    "loraplus": "it is method: lora with method.b_rate: 16",
    "lora+": "it is method: lora with method.b_rate: 16",
    **dict.fromkeys(("adapter", "adapters", "houlsby", "pfeiffer", "bottleneck_adapter"), "it is method: bottleneck"),
    **dict.fromkeys(("prefix_tuning", "prefix-tuning", "prefixtuning"), "it is method: prefix"),
    **dict.fromkeys(("p_tuning", "p-tuning"), "it is method: ptuning"),
    **dict.fromkeys(("p_tuning_v2", "p-tuning-v2", "ptuning-v2", "ptuningv2"), "it is method: ptuning_v2"),
    **dict.fromkeys(("prompt_tuning", "prompt-tuning"), "it is method: prompt"),
    **dict.fromkeys(("(ia)3", "ia^3", "ia3_tuning"), "it is method: ia3"),
    **dict.fromkeys(("boft", "hra", "goft"), "method: oft is the nearest"),
    **dict.fromkeys(
        ("loha", "lokr", "adalora", "vera", "vblora", "fourierft", "longlora", "galore", "badam", "lisa", "freeze"),
        "it is not supported: `trimtab methods` lists the methods that are",
    ),
    **dict.fromkeys(("pretrain", "pt", "cpt", "pretraining", "clm"), "it is objective: sft on examples with the column `text`"),
    **dict.fromkeys(("sft_trainer", "instruct", "instruction"), "it is objective: sft"),
    **dict.fromkeys(("ipo", "hinge"), "it is objective: {name: dpo, loss_type: …}"),
    **dict.fromkeys(
        ("grpo", "ppo", "rloo", "reinforce", "online_dpo", "gkd", "rm", "reward", "reward_model", "prm", "dapo", "gspo", "nash_md", "xpo"),
        "it is not supported: Trimtab trains on existing examples, not on answers generated during training. TRL has it",
    ),
}  # fmt: skip
"""Other tools' names of methods and objectives."""


def translate_key(name: str, known: Iterable[str] = ()) -> str | None:
    """What another tool's key is in Trimtab, as a sentence without its end; None if the key is unknown.

    Args:
        known: The keys of the section in which it was used. A key that another section has under the same name is
            translated only where sections are known, at the top of the recipe.
    """
    name = _normalize(name)
    if (same := SAME.get(name)) and (not same.endswith(f".{name}") or same.partition(".")[0] in known):
        return f"it is {same} here"
    return AUTOMATIC.get(name) or (f"it is not supported: {UNSUPPORTED[name]}" if name in UNSUPPORTED else None)


def translate_choice(name: str, known: Iterable[str] = ()) -> str | None:
    """What another tool's method or objective is in Trimtab."""
    return CHOICES.get(name.strip().lower()) or CHOICES.get(_normalize(name))


def suggest(name: Any, known: Iterable[str], translate: Callable[[str, Iterable[str]], str | None]) -> str:
    """How a message about an unknown name ends: `. Did you mean …?`, the name's translation, or all known names.

    Args:
        translate: Explains a name that other tools use.
    """
    name, known = str(name), list(known)
    same = [candidate for candidate in known if _normalize(candidate) == _normalize(name)]
    if not same and (translation := translate(name, known)):
        return f": {translation}."
    nearest = same or difflib.get_close_matches(name, known, n=1, cutoff=0.65)
    return f". Did you mean {nearest[0]!r}?" if nearest else f". Known: {', '.join(known)}." if known else ". It has none."


def key_for_option(option: str) -> str | None:
    """The recipe key to write instead of an unknown command-line option such as `--lr=1e-4`, if there is one."""
    name, equals, value = option.lstrip("-").partition("=")
    key = name if "." in name else SAME.get(_normalize(name), "").partition(" ")[0]
    return f"{key}={value if equals else '…'}" if key and "=" not in key else key or None


def _normalize(name: str) -> str:
    return name.strip().lower().replace("-", "_")
