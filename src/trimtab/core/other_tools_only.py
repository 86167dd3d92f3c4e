"""Settings of other tools that Trimtab does not have, and what it has instead: the other half of core/other_tools.py."""

from trimtab.core.other_tools import each

_TRACKERS = "track: its trackers get metrics, the recipe and sampled answers, no weights or code, and a login is theirs (docs/trackers.md)"
_DEVICES = "devices divide a step's examples, or a model's layers, and never one layer or one example: see distributed"
_MEDIA = "images, video and audio are not supported: Trimtab trains on text"
_EARNED = "Trimtab trains on existing examples, not on answers generated or judged during training. TRL has it"
_UPLOAD = "training uploads nothing: trimtab push RUN ORG/NAME does, afterwards"
_EXPORT = "it is for another command: trimtab merge saves a standalone model, trimtab chat answers"
_LOSS = "the loss is the objective's own; `trimtab train --help` and docs/recipe.md list the objectives"
_OPTIMIZER = "this optimizer is not there; docs/recipe.md lists those that are"
_VARIANT = "this variant of LoRA is not there; `trimtab methods` lists the methods that are"
_PROFILER = "profile the command with PyTorch's own profiler"
_LAYERS = "blocks are neither added, skipped nor unfrozen; method: full trains chosen modules with method.targets"

UNSUPPORTED = each({
    _TRACKERS: "hf_mlflow_log_artifacts eval_table_size",
    "of trackers, track has swanlab, wandb, tensorboard, mlflow and trackio": "use_comet use_otel_metrics",
    _DEVICES: "sequence_parallel_size zero_hpz_partition_size deepspeed_autotp_size use_flash_ckpt device_groups deepcompile "
    "parallelism_config resources_per_worker tensor_parallel_size tensor_model_parallel_size "
    "pipeline_model_parallel_size virtual_pipeline_model_parallel_size expert_model_parallel_size "
    "context_parallel_size sequence_parallel sequence_parallel_degree dp_shard_size dp_replicate_size "
    "heads_k_stride ring_attn_func hyper_parallel_args hyper_parallel_cp_size use_hyper_parallel use_ray use_mca "
    "use_megatron_bridge megatron_bridge_args megatron_config megatron_core megatron_pretrained_checkpoint "
    "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split moe_token_dispatcher_type "
    "use_distributed_optimizer export_hf_on_finish extra_config",
    _UPLOAD: "push_to_hub push_dataset_to_hub",
    "a checkpoint of another tool holds a state of its own: train its adapter further with start: FOLDER, or resume a run of Trimtab with "
    "resume": "resume_from_checkpoint resume_only_model",
    "the base model is as large as it is: nothing is held on another device":
        "activation_offloading layer_offloading offload_folder max_memory gpu_memory_limit quantization_device_map use_kt",
    "log in with `hf auth login`, which Transformers uses, too": "token hf_hub_token hf_use_auth_token ms_hub_token om_hub_token",
    _MEDIA: "media_dir freeze_vision_tower freeze_multi_modal_projector freeze_language_model freeze_mm_modules crop_to_patches "
    "use_audio_in_video audio_sampling_rate processor_kwargs role_boundaries max_pixels norm_bbox freeze_llm freeze_vit freeze_aligner "
    "vit_gradient_checkpointing aligner_lr vit_lr",
    _EARNED: "reward_model reward_model_adapters reward_model_quantization_bit reward_model_type process_reward_model "
    "center_rewards_coefficient num_labels cls_model_config trl vllm ebft gkd_logits_topk lmbda max_completion_length mrl_dims seq_kd sft_alpha",
    _EXPORT: "fast_inference gpu_memory_utilization max_lora_rank float8_kv_cache stream logprobs top_logprobs structured_outputs_regex "
    "response_prefix add_non_thinking_prefix infer_backend merge_lora merge_method num_beams eval_num_beams generation_num_beams "
    "length_penalty generation_config "
    "generation_prompt_ratio",
    _LOSS: "enable_dft_loss enable_channel_loss is_binary_loss_scale disable_ignore_empty_think label_smoothing_factor use_dft_loss "
    "use_asft_loss asft_alpha use_eaft_loss use_eaft eaft_alpha eaft_k ld_alpha cpo_alpha "
    "pref_bco_weight f_divergence_type f_alpha_divergence_coef discopop_tau use_weighting dpo_use_weighting dpo_norm_loss "
    "dpo_generate_during_eval router_aux_loss_coef moe_aux_loss_coef",
    "the reference model stays as it is": "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps ref_model_quantization_bit",
    _OPTIMIZER: "optim_args optim_target_modules use_galore use_apollo use_badam use_adam_mini adam_epsilon2 adam_beta3 torchdistx_path",
    "all trained weights have one learning rate, but for method.b_rate":
        "loraplus_lr_embedding embedding_lr embedding_lr_scale lr_groups",
    "of the schedules, docs/recipe.md lists those that are there": "lr_scheduler_kwargs lr_div_factor lr_quadratic_warmup "
    "cosine_constant_lr_ratio",
    "adapted modules are those of method.targets, and a whole copy of another module is not trained beside them: add its name to "
    "method.targets (embed_tokens and lm_head are adapted, too)": "modules_to_save additional_target lora_modules_to_save",
    _LAYERS: "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules use_llama_pro unfrozen_parameters layer_replication "
    "peft_layer_replication layers_pattern peft_layers_pattern exclude_modules mixture_of_depths use_pose s2_attention shift_attn "
    "train_from_scratch reinit_weights freeze_parameters freeze_parameters_regex freeze_parameters_ratio trainable_parameters "
    "trainable_parameters_regex finetune_last_n_layers",
    "method.dropout is LoRA's; oft has none, and its blocks have one size, method.block_size": "module_dropout oft_rank",
    _VARIANT: "adapter_act adapter_length loftq_config corda_config lora_ga_config velora_config monteclora_config arrow_config "
    "kasa_config use_qalora qalora_group_size "
        "use_bdlora alora_invocation_tokens lora_bias relora peft",
    "init: eva has no settings of its own": "eva_config",
    "weights are quantized to nf4 or int8 as they are loaded, or come so; others are refused":
        "hqq_axis load_in_fp8 qat_scheme gptq bnb_config_kwargs model_quantization_config model_quantization_config_kwargs use_onebitllms "
        "fp8 fp8_backend "
        "fp8_enable_fsdp_float8_all_gather qat",
    "the model's configuration is its own: change it in its folder's config.json":
        "init_strategy max_model_len offload_embedding resize_model_vocab rope_scaling model_init_kwargs overrides_of_model_config "
        "overrides_of_model_kwargs scaling_softmax scaling_softmax_factor "
        "scaling_softmax_bias sage_attention",
    "the loss and the gradients are watched for NaN and Inf alone; see train.patience": "loss_watchdog_threshold loss_watchdog_patience",
    "examples are not left out for being short, and prompts have no limit of their own: data.max_length is an example's":
        "min_sample_len max_prompt_len",
    "examples are shuffled": "disable_shuffling curriculum_sampling",
    "benchmarks are measured after training: trimtab eval RUN": "do_bench_eval bench_dataset bench_split eval_causal_lm_metrics "
    "eval_use_evalscope eval_dataset_args eval_limit eval_generation_config "
        "extra_eval_args",
    "placeholders in examples are not filled in: write the name into them": "model_author",
    "sources without weights are joined, and with weights each goes on to its end": "stopping_strategy",
    "there are no plugins":
        "strict debug plugins hooks callbacks trainer_cls axolotl_config_path external_plugins custom_register_path",
    _PROFILER: "profile_modules enable_torch_profiler",
})  # fmt: skip
"""Settings that Trimtab does not have, and what it has instead."""

FAMILIES = each({
    _TRACKERS: "wandb_ swanlab_ mlflow_ comet_ trackio_ otel_",
    _UPLOAD: "hub_ export_hub_",
    _EXPORT: "export_ vllm_ sglang_ gradio_",
    _MEDIA: "image_ video_",
    _EARNED: "ppo_ grpo_",
    _DEVICES: "ray_ kt_ expert_parallel_ context_",
    _OPTIMIZER: "galore_ qgalore_ apollo_ badam_ dion_",
    _LAYERS: "lisa_ pose_ llamapro_",
    _VARIANT: "relora_ jagged_ fourier_ boft_ vera_ adalora_ reft_ lora_ga_",
    _PROFILER: "profiler_",
})  # fmt: skip
"""How the names of more such settings begin."""
