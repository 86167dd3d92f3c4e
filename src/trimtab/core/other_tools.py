"""What settings of Transformers, TRL, PEFT, LLaMA-Factory, Axolotl, ms-swift and Unsloth are here; other_tools_only.py has what is not.

Messages about unknown keys, `trimtab convert` and docs/migration.md read it; `core/synonyms.py` has the functions that look things up.
"""


def each(groups: dict[str, str]) -> dict[str, str]:
    """{what many names have in common: the names} as {name: what}."""
    return {name: said for said, names in groups.items() for name in names.split()}


SAME = each({
    "train.lr": "learning_rate lr",
    "train.epochs": "num_train_epochs num_epochs n_epochs max_epochs epochs",
    "train.max_steps": "max_steps num_steps total_steps iters",
    "train.rows_per_step": "rows_per_step",
    "train.tokens_per_step": "tokens_per_step",
    "train.pack_tokens": "pack_tokens",
    "train.schedule": "lr_scheduler_type lr_scheduler scheduler schedule",
    "train.warmup": "warmup_steps warmup_ratio num_warmup_steps warmup",
    "train.floor": "cosine_min_lr_ratio min_lr_rate min_lr_ratio floor",
    "train.decay": "num_decay_steps decay",
    "train.weight_decay": "weight_decay",
    "train.optimizer": "optim optimizer optimizers",
    "train.optimizer.betas": "adam_beta1 adam_beta2",
    "train.optimizer.eps": "adam_epsilon",
    "train.optimizer=muon": "use_muon",
    "train.clip": "max_grad_norm gradient_clipping clip grad_clip",
    "train.seed": "seed random_state",
    "data.seed": "data_seed",
    "train.recompute": "gradient_checkpointing use_gradient_checkpointing recompute activation_checkpointing disable_gradient_checkpointing",
    "train.evaluate_every": "eval_steps eval_strategy evaluation_strategy evals_per_epoch evaluate_every eval_every",
    "train.save_every": "save_steps save_strategy saves_per_epoch save_every",
    "train.keep": "save_total_limit keep",
    "train.patience": "early_stop_interval early_stopping_patience early_stopping_steps early_stopping patience",
    "train.min_improvement": "early_stopping_threshold min_improvement",
    "train.deterministic": "full_determinism use_deterministic_algorithms",
    "method.rank": "lora_r lora_rank r rank",
    "method.alpha": "lora_alpha alpha",
    "method.dropout": "lora_dropout dropout",
    "method.targets": "target_modules lora_target lora_target_modules oft_target target_regex targets",
    "method.targets=all-linear": "lora_target_linear",
    "method.rank_stabilized": "use_rslora peft_use_rslora",
    "method.ranks": "rank_pattern lora_rank_pattern",
    "method.alphas": "alpha_pattern lora_alpha_pattern",
    "method.b_rate": "loraplus_lr_ratio lorap_lr_ratio",
    "method.init": "init_lora_weights peft_init_lora_weights init_weights",
    "method.init=pissa": "pissa_init",
    "method.block_size": "oft_block_size",
    "devices": "nproc_per_node num_gpus num_processes",
    "distributed.engine": "deepspeed fsdp",
    "distributed.engine=ddp": "ddp",
    "train.neftune": "neftune_noise_alpha neftune_alpha noisy_embedding_alpha",
    "method.layers": "layers_to_transform peft_layers_to_transform",
    "method.tokens": "num_virtual_tokens trainable_token_indices peft_trainable_token_indices",
    "method=dora": "use_dora peft_use_dora",
    "method=full": "full_finetuning",
    "method.name": "adapter peft_type finetuning_type train_type sft_type tuner_type peft_method use_peft",
    "model.quantize=nf4": "load_in_4bit",
    "model.quantize=int8": "load_in_8bit",
    "model.quantize": "quantization_bit quant_bits quantization quant_method quantization_method quantization_type bnb_4bit_quant_type",
    "model.dtype": "torch_dtype dtype precision compute_dtype",
    "model.dtype=bfloat16": "bf16 bfloat16 pure_bf16",
    "model.dtype=float16": "fp16 float16",
    "model.dtype=float32": "float32",
    "model.name": "model model_id_or_path model_name_or_path base_model model_name model_id model_path pretrained_model_name_or_path "
    "base_model_name_or_path",
    "model.name=org/model@revision": "revision model_revision revision_of_model",
    "model.device": "device device_map",
    "model.device=cpu": "use_cpu",
    "model.chat_template": "chat_template_path chat_template_jinja",
    "model.template.enable_thinking": "enable_thinking",
    "model.template.preserve_thinking": "preserve_thinking",
    "model.template": "chat_template_kwargs",
    "data.train": "dataset datasets dataset_name train_file train_data data_path train_dataset dataset_path pretraining_dataset",
    "data.train.NAME.subset": "dataset_config dataset_config_name subset",
    "data.train.NAME.split": "dataset_train_split train_split",
    "data.train.NAME.limit": "max_samples num_samples num_train_samples max_train_samples limit",
    "data.train.NAME.weight": "interleave_probs interleave_prob mix_strategy",
    "data.eval": "val_size val_set_size eval_dataset validation_split split_dataset_ratio validation_file test_datasets val_dataset test_size "
    "dataset_test_split",
    "data.max_length": "cutoff_len max_seq_length max_seq_len sequence_len max_length model_max_length",
    "data.overlong": "truncation_strategy truncation_mode excess_length_strategy",
    "data.columns": "field_messages columns",
    "data.columns.text": "dataset_text_field",
    "data.system": "system default_system default_system_message system_prompt",
    "data.train_on=everything": "train_on_inputs train_on_prompt",
    "data.train_on=last": "mask_history",
    "data.train_on": "assistant_only_loss completion_only_loss roles_to_train loss_scale",
    "data.duplicates=remove": "dataset_exact_deduplication dedup deduplicate",
    "output": "output_dir",
    "start": "lora_model_dir adapter_name_or_path adapter_folder adapters",
    "objective.name": "stage rl rlhf_type",
    "objective.loss_type": "loss_type pref_loss dpo_loss_type",
    "objective.beta": "beta pref_beta dpo_beta rl_beta",
    "objective.gamma": "simpo_gamma",
    "objective.weight": "orpo_alpha",
    "objective.sft": "pref_ftx rpo_alpha loss_weights dpo_loss_weights",
    "objective.label_smoothing": "label_smoothing dpo_label_smoothing",
    "objective.desirable": "desirable_weight kto_desirable_weight kto_chosen_weight",
    "objective.undesirable": "undesirable_weight kto_undesirable_weight kto_rejected_weight",
    "objective.reference": "ref_model ref_model_adapters ref_adapters ref_model_revision",
    "eval.max_new_tokens": "max_new_tokens generation_max_new_tokens generation_max_length eval_max_new_tokens",
    "eval.temperature": "temperature generation_temperature",
    "eval.top_p": "top_p generation_top_p",
    "eval.top_k": "top_k generation_top_k",
    "eval.repetition_penalty": "repetition_penalty",
    "eval.stop": "stop stop_words stop_strings",
    "eval.metrics": "metrics eval_metric",
    "track": "report_to",
    "track=wandb": "use_wandb",
    "track=swanlab": "use_swanlab swanlab",
    "track=tensorboard": "use_tensorboard",
    "track=mlflow": "use_mlflow",
    "track=trackio": "use_trackio",
    "track={name: wandb, run: …} (a list of trackers; each may have a run's name)": "run_name",
    "track={name: wandb, project: …}": "wandb_project",
    "track={name: wandb, entity: …}": "wandb_entity",
    "track={name: wandb, run: …}": "wandb_name wandb_run_name",
    "track={name: wandb, mode: …}": "wandb_mode",
    "track={name: swanlab, project: …}": "swanlab_project",
    "track={name: swanlab, workspace: …}": "swanlab_workspace",
    "track={name: swanlab, run: …}": "swanlab_run_name swanlab_experiment_name swanlab_exp_name",
    "track={name: swanlab, mode: …}": "swanlab_mode",
    "track={name: mlflow, uri: …}": "mlflow_tracking_uri",
    "track={name: mlflow, project: …}": "mlflow_experiment_name",
    "track={name: mlflow, run: …}": "mlflow_run_name",
    "track={name: trackio, project: …}": "trackio_project_name project",
    "track={name: trackio, run: …}": "trackio_run_name",
})  # fmt: skip
"""The key of the recipe with the same meaning; `key=value` where a switch is a value of it."""

_FASTEST = "the fastest operations that are exact on the device are used, and probed against plain PyTorch first (docs/gpu.md)"

AUTOMATIC = each({
    "train.rows_per_step is the effective batch size, and the micro-batch is derived from the free memory":
        "batch_size per_device_train_batch_size micro_batch_size train_batch_size per_device_eval_batch_size eval_batch_size "
        "gradient_accumulation_steps effective_batch_size total_batch_size auto_find_batch_size eval_accumulation_steps "
        "average_tokens_across_devices dataloader_drop_last precompute_ref_batch_size",
    "it is not needed: examples are always packed without padding, and shared prefixes are computed once":
        "packing sample_packing neat_packing padding_free group_by_length length_column_name pad_to_sequence_len pad_to_multiple_of "
        "eval_sample_packing eval_packing packing_strategy max_packed_sequence_len sample_packing_group_size sample_packing_bin_size "
        "sample_packing_sequentially sample_packing_mp_start_method sample_packing_eff_est sample_packing_seq_len_multiplier "
        "total_num_tokens total_supervised_tokens batch_flattening multipack_real_batches block_diag_attn pretrain_multipack_attn "
        "pretrain_multipack_buffer_size pretraining_sample_concatenation streaming_multipack_buffer_size dpo_padding_free "
        "train_sampling_strategy use_packed_sequences packing_length packing_num_proc padding_side",
    _FASTEST:
        "use_cache use_kv_cache flash_attn flash_attention attn_implementation attn_impl use_liger_kernel enable_liger_kernel liger_kernel "
        "liger_kernel_config cut_cross_entropy flash_attn_cross_entropy flash_attn_d512 flash_attn_fuse_mlp flash_attn_rms_norm "
        "flash_optimum flex_attention flex_attn_compile_kwargs sdp_attention sdpa_varlen xformers_attention eager_attention "
        "large_head_attention gemma4_hybrid_attn_impl fused_attn_kernel experts_implementation chunked_cross_entropy "
        "chunked_cross_entropy_num_chunks tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp lora_mlp_kernel lora_qkv_kernel "
        "lora_o_kernel lora_embedding_kernel llama4_linearized_experts use_kernels use_scattermoe use_sonicmoe use_v1_kernels use_unsloth "
        "dpo_use_liger_kernel dpo_use_logits_to_keep torch_compile torch_compile_backend torch_compile_mode torch_compile_options "
        "experimental_skip_move_to_device bias_activation_fusion apply_rope_fusion masked_softmax_fusion cross_entropy_loss_fusion "
        "moe_grouped_gemm low_cpu_mem_usage experts_impl use_logits_to_keep unsloth_tiled_mlp",
    "train.recompute is auto: gradient checkpointing is used as far as memory asks for it":
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs selective_checkpointing use_reentrant_gc use_unsloth_gc "
        "recompute_granularity recompute_method recompute_num_layers gc_steps gc_collect_steps torch_empty_cache_steps",
    "sums, norms and losses are in float32 where 16 bits would round them too coarsely, and so are the adapter's weights":
        "mixed_precision upcast_layernorm upcast_lmhead_output embeddings_skip_upcast fp32_norms fp32_norm_classes peft_autocast_adapter_dtype "
        "autocast_adapter_dtype bf16_full_eval fp16_full_eval infer_dtype lora_dtype float32_mixed_precision",
    "matrix products of float32 are exact: TF32 is not used": "tf32",
    "the data's format is recognized by its columns":
        "remove_unused_columns label_names skip_prepare_dataset dataset_kwargs preprocess_iterable is_preprocess tool_format "
        "ignore_pad_token_for_loss disable_auto_column_mapping agent_template",
    "the model's own chat template is used; its switches are set with model.template, and another one with model.chat_template=FILE":
        "template prompt_template conversation_template chat_template eot_tokens use_chat_template template_backend",
    "every step is logged, in the run's metrics.jsonl and to its trackers":
        "logging_steps logging_strategy logging_dir logging_first_step logging_nan_inf_filter include_tokens_per_second include_tkps "
        "include_num_input_tokens_seen include_effective_tokens_per_second plot_loss disable_tqdm log_level log_level_replica "
        "log_on_each_node print_param_status",
    "the adapter with the lowest validation loss is the result; checkpoints hold what resuming needs":
        "save_only_model load_best_model_at_end metric_for_best_model greater_is_better save_safetensors ignore_data_skip save_first_step "
        "restore_callback_states_from_checkpoint enable_jit_checkpoint dynamic_checkpoint",
    "the base model is evaluated before the first step, and the whole validation set each time":
        "eval_on_start eval_delay do_eval eval_on_each_dataset prediction_loss_only batch_eval_metrics eval_do_concat_batches "
        "eval_use_gather_object include_for_metrics eval_sequence_len",
    "tokenization, its cache and the order of examples are automatic: shuffled by a seed":
        "num_proc preprocessing_num_workers dataloader_num_workers dataset_num_proc dataset_processes preprocessing_batch_size "
        "dataset_prepared_path overwrite_cache shuffle shuffle_merged_datasets shuffle_dataset shuffle_before_merging_datasets "
        "dataset_keep_in_memory dataset_shard_num dataset_shard_idx num_dataset_shards_to_save buffer_size data_shared_file_system "
        "cache_dir tokenized_path dataloader_in_order dataloader_multiprocessing_context dataloader_persistent_workers "
        "dataloader_pin_memory dataloader_prefetch_factor skip_memory_metrics sortish_sampler lazy_tokenize cached_dataset "
        "cached_val_dataset load_from_cache_file dataset_shuffle val_dataset_shuffle shuffle_buffer_size download_mode train_dataloader_shuffle",
    "all examples of a source are used, or data.train.NAME.limit of them; text larger than memory takes data.corpus":
        "streaming dataset_streaming",
    "it needs no key; see docs/methods.md for what each method trains":
        "bias task_type lora_task_type inference_mode fan_in_fan_out lora_fan_in_fan_out auto_mapping peft_version runtime_config "
        "ensure_weight_tying peft_ensure_weight_tying ignore_bias_buffers create_new_adapter lora_on_cpu qlora_sharded_model_loading "
        "tuner_backend use_swift_lora load_in_16bit acc_strategy",
    "files are written in one way: safetensors in a folder of the run's, without links or versions":
        "safe_serialization max_shard_size add_version create_checkpoint_symlink temporary_location disable_log_stats",
    "a recipe is one file, and names what it needs":
        "load_args load_data_args ignore_args_error custom_dataset_info use_hf local_repo_path enable_npu_model_patch "
        "ds3_gather_for_generation model_kwargs",
    "experts of all-linear's targets are adapted, and quantized with the rest":
        "target_parameters lora_target_parameters quantize_moe_experts",
    "PiSSA starts from an exact decomposition, and the saved adapter holds for the original model": "pissa_iter pissa_convert",
    "double quantization and the storage of nf4 are as QLoRA has them":
        "double_quantization use_bnb_nested_quant bnb_4bit_use_double_quant bnb_4bit_quant_storage bnb_4bit_compute_dtype",
    "the model's own is used, and detected automatically":
        "tokenizer tokenizer_name tokenizer_type tokenizer_name_or_path model_type type_of_model processor processor_type use_fast_tokenizer "
        "tokenizer_use_fast tokenizer_legacy tokenizer_use_mistral_common tokenizer_save_jinja_files tokenizer_config eos_token pad_token "
        "split_special_tokens skip_special_tokens base_model_config is_falcon_derived_model is_llama_derived_model "
        "is_mistral_derived_model is_qwen_derived_model problem_type ref_model_type fix_tokenizer use_exact_model_name text_only check_model",
    "code that comes with a model or a dataset is never run; models that Transformers knows need none": "trust_remote_code",
    "the model's own special tokens are used; new ones are trained with method: {name: tokens, new: […]}":
        "special_tokens tokens add_tokens add_special_tokens resize_vocab new_special_tokens new_special_tokens_config init_special_tokens "
        "resize_token_embeddings_to_32x added_tokens_overrides fix_untrained_tokens mean_resizing_embeddings shrink_embeddings",
    "method.dropout is 0 unless it is given": "disable_dropout",
    "nothing is overwritten: the same command resumes a run, and another run needs another output": "overwrite_output_dir "
        "auto_resume_from_checkpoints",
    "data.train has the whole path of a file, which may be relative": "dataset_dir",
    "the reference's log-probabilities are computed before training, with the adapter switched off":
        "precompute_ref_log_probs",
    "eval.temperature is 0 unless given: answers are the likeliest; above 0 they are sampled": "do_sample generation_do_sample",
    "trimtab eval RUN answers validation examples, and measures eval.metrics": "compute_accuracy generate_samples num_generation_samples",
    "fsdp divides each decoder layer among the devices of a machine, and what is saved is whole": "fsdp_config fsdp_version "
        "fsdp_final_state_dict_type save_on_each_node",
    "launchers say it, and trimtab train reads it from them": "local_rank world_size master_addr master_port accelerator_config",
    "a loss is divided by the target tokens of the whole step, over all devices": "calculate_per_token_loss",
    "an adapter's gradients are added once a step": "overlap_grad_reduce overlap_param_gather",
    "trimtab train trains, evaluates and answers eval.samples examples; trimtab eval answers all":
        "do_train do_predict predict_with_generate do_causal_lm_eval",
})  # fmt: skip
"""Settings that need no key, and what Trimtab does."""

AUTOMATIC_FAMILIES = {
    "liger_": _FASTEST,
    "ddp_": "an adapter's gradients are added once a step, without a wrapper around the model",
}
"""How the names of more settings begin that need no key."""
