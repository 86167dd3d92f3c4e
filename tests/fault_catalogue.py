"""The catalogue of silent failures known in fine-tuning, and how Trimtab prevents each: the source of docs/faults.md.

Each names the tests that provoke it; test_fault_catalogue.py checks that those exist.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    what: str
    outcome: str
    """refused, repaired, shown, or impossible (tests prove that it does not happen)."""
    how: str
    tests: tuple[str, ...]


FAULTS = {
    # Loss and optimizer steps
    "A01": Fault(
        "micro-batch losses are averaged, so short examples weigh more",
        "impossible",
        "one divisor per step",
        (
            "test_train::test_a_step_does_not_depend_on_how_its_rows_are_cut_into_packs",
            "suite::I23_the_cut_into_packs_does_not_change_gradients",
        ),
    ),
    "A02": Fault(
        "the loss is divided twice",
        "impossible",
        "one divisor per step",
        ("test_train::test_the_loss_and_the_first_step_are_those_of_the_plain_formula", "test_trl::test_ten_steps_are_trls"),
    ),
    "A04": Fault(
        "the last, smaller step is dropped",
        "impossible",
        "it is trained like every other step",
        (
            "test_data_load::test_every_row_is_learned_once_an_epoch",
            "test_data_load::test_steps_of_tokens_hold_every_row_once_an_epoch",
        ),
    ),
    "A05": Fault(
        "the learning rate decays too fast",
        "impossible",
        "it is a function of the step",
        ("test_schedule::test_the_learning_rate_rises_to_its_peak_and_never_below_zero",),
    ),
    "A06": Fault(
        "an example, or every one, has no target tokens",
        "refused",
        "with its line, before training",
        (
            "test_data_labels::test_a_longer_row_is_cut_when_told_to_and_never_empty",
            "test_train::test_a_step_with_nothing_to_learn_is_refused",
        ),
    ),
    "A07": Fault(
        "a NaN or Inf loss ruins the weights and is hidden from the log",
        "repaired",
        "the step is skipped, its examples named, the value logged; three in a row end the run",
        (
            "test_guards::test_a_step_that_is_not_finite_is_skipped_and_logged_as_it_was",
            "test_guards::test_three_in_a_row_end_the_run",
        ),
    ),
    "A08": Fault(
        "an adapter on the head is never trained",
        "impossible",
        "the head is adapted in the loss; a tensor unchanged by the third step stops the run",
        (
            "test_peft_variants::test_the_ends_of_a_model_go_both_ways",
            "suite::I07_every_tensor_moves_by_the_third_step",
            "test_certificate::test_what_no_gradient_reaches_is_said_after_three_steps",
        ),
    ),
    "A09": Fault(
        "gradient checkpointing loses gradients",
        "impossible",
        "gradients are equal bit for bit",
        (
            "suite::I24_activation_recomputation_changes_nothing",
            "test_virtual::test_recomputation_that_would_lose_gradients_is_refused",
        ),
    ),
    "A10": Fault(
        "nothing is trained, or everything",
        "impossible",
        "the trained parameters are the adapter's own",
        ("suite::I06_what_trains_is_the_adapter_and_nothing_else", "test_resume::test_a_state_of_other_parameters_is_refused"),
    ),
    "A11": Fault(
        "the optimizer holds other weights than the model's",
        "refused",
        "a tensor unchanged by the third step stops the run",
        ("test_certificate::test_what_no_gradient_reaches_is_said_after_three_steps",),
    ),
    "A12": Fault(
        "an adapter in half precision loses its updates",
        "impossible",
        "its parameters are float32",
        ("suite::I26_masters_are_float32_on_a_base_of_fewer_bits",),
    ),
    "A13": Fault(
        "the optimizer overwrites a loaded adapter",
        "impossible",
        "it keeps no copies",
        ("test_keys::test_start_trains_an_earlier_adapter_on", "test_resume::test_what_it_forgets_is_noticed"),
    ),
    "A14": Fault(
        "moments are assigned to the wrong parameters",
        "refused",
        "they are assigned by name",
        ("test_resume::test_a_state_of_other_parameters_is_refused", "test_resume::test_what_it_forgets_is_noticed"),
    ),
    "A15": Fault(
        "the reference of a continued adapter is the base model",
        "refused",
        "margins are measured before the first step",
        (
            "test_preference::test_the_base_as_the_reference_of_an_adapter_that_was_trained_is_caught",
            "test_preference::test_every_method_starts_as_its_reference",
        ),
    ),
    "A16": Fault(
        "the reference drifts",
        "impossible",
        "its log-probabilities are computed once, and cached by content",
        (
            "test_preference::test_what_the_reference_makes_of_a_row_is_computed_once",
            "test_preference::test_another_model_or_adapter_is_another_reference",
        ),
    ),
    "A17": Fault(
        "dropout adds noise to a comparison",
        "refused",
        "with the key to change",
        ("test_preference::test_dropout_is_refused_where_answers_are_compared",),
    ),
    "A18": Fault(
        "KTO's KL is estimated on matched pairs, or in batches of one",
        "impossible",
        "a fixed derangement, averaged over the step",
        (
            "test_objectives::test_nobody_gets_the_own_answer_and_every_answer_is_used_once",
            "test_objectives::test_the_pooled_number_is_the_whole_steps_and_no_gradient_goes_through_it",
            "test_objectives::test_one_prompt_alone_is_refused",
        ),
    ),
    "A19": Fault(
        "an answer is empty after truncation",
        "refused",
        "with its line",
        (
            "test_data_compared::test_sides_that_are_the_same_once_they_are_cut_are_refused",
            "test_data_labels::test_a_longer_row_is_cut_when_told_to_and_never_empty",
        ),
    ),
    "A20": Fault(
        "both answers of a pair are equal",
        "refused",
        "with its line",
        ("test_data_compared::test_what_compares_nothing_is_refused",),
    ),
    "A21": Fault(
        "the scale differs between training and inference",
        "impossible",
        "outputs are compared with PEFT's",
        ("test_peft::test_peft_loads_ours", "test_peft_variants::test_peft_loads_ours"),
    ),
    "A22": Fault(
        "settings out of range are accepted",
        "refused",
        "with the key and its range",
        (
            "test_methods::test_hyperparameters_out_of_range_are_refused",
            "test_peft::test_a_configuration_of_pefts_out_of_range_is_refused",
        ),
    ),
    "A23": Fault(
        "a target that matches nothing is ignored",
        "refused",
        "with the nearest name",
        ("test_methods::test_a_target_that_cannot_be_adapted_is_refused",),
    ),
    "A24": Fault(
        "fused experts stay frozen",
        "impossible",
        "all-linear adapts them, or the method is refused by name",
        ("test_methods::test_all_linear_skips_no_fused_experts",),
    ),
    "A25": Fault(
        "two adapters act together unnoticed",
        "refused",
        "names are unique; only the newest is active",
        (
            "test_methods::test_a_second_adapter_of_the_same_name_is_refused",
            "test_base::test_a_model_that_peft_has_an_adapter_on_is_refused",
            "test_composition::test_the_newest_acts_alone_and_names_choose",
        ),
    ),
    "A26": Fault(
        "sums over many tokens are rounded to half precision at every addition",
        "impossible",
        "sums over tiles, examples and packs are float32, on a half-precision base model too",
        (
            "test_head::test_a_token_that_predicts_many_has_their_gradients_added_up_in_float32",
            "test_packing::test_what_many_rows_see_has_their_gradients_added_up_in_float32",
        ),
    ),
    "A27": Fault(
        "an answer that has become certain makes the gradient NaN",
        "impossible",
        "loss and gradient are finite up to log p = 0",
        (
            "test_objectives::test_losses_and_gradients_are_right_where_answers_are_impossible_or_certain",
            "test_objectives::test_an_answer_that_is_certain_does_not_break_a_step",
        ),
    ),
    "A28": Fault(
        "cuDNN's attention gives NaN gradients where tokens are masked",
        "impossible",
        "it is excluded from the attention kernels",
        ("test_device::test_attention_does_without_cudnn_and_the_process_keeps_its_setting",),
    ),
    "A29": Fault(
        "small gradients vanish in float16, or examples are left out where large ones overflow",
        "impossible",
        "the loss is scaled by a power of two, and a step that overflows is computed again with a smaller one",
        (
            "test_loss_scale::test_small_gradients_vanish_in_float16_unless_the_loss_is_scaled",
            "test_loss_scale::test_a_scale_that_is_too_large_costs_passes_and_neither_steps_nor_examples",
        ),
    ),
    # Examples, tokens, labels
    "B01": Fault(
        "padding is the end token, so the end is never trained on",
        "impossible",
        "labels are set by position, and the end of every example is counted",
        (
            "test_data_labels::test_pad_and_eos_may_be_one_token",
            "test_check::test_of_good_rows_everything_is_good",
            "test_check::test_an_answer_without_its_stop_token_is_noticed",
        ),
    ),
    "B02": Fault(
        "the trained end token is not one that stops generation",
        "refused",
        "ends are compared with the stop tokens, and answers are generated",
        (
            "test_check::test_rows_that_are_cut_are_counted_and_if_all_are_it_is_refused",
            "test_certificate::test_an_adapter_that_never_stops_does_not_pass",
        ),
    ),
    "B03": Fault(
        "the loss mask is all zeros or all ones",
        "impossible",
        "spans come from rendering, exact to the character",
        (
            "test_data_labels::test_any_conversation_on_any_template_learns_exactly_its_answers",
            "test_check::test_what_generation_would_not_see_is_refused",
        ),
    ),
    "B04": Fault(
        "an answer's marker is searched for and not found",
        "impossible",
        "nothing is searched for",
        ("test_data_labels::test_any_conversation_on_any_template_learns_exactly_its_answers",),
    ),
    "B05": Fault(
        "the loss mask covers the wrong span",
        "impossible",
        "tested with repeated texts and tool turns",
        (
            "test_data_labels::test_any_conversation_on_any_template_learns_exactly_its_answers",
            "test_data_labels::test_tool_calls_are_learned_and_tool_results_are_not",
        ),
    ),
    "B06": Fault(
        "a BOS token stands twice, or is missing",
        "refused",
        "one in a text is not doubled; a template's is checked",
        (
            "test_data_labels::test_a_bos_or_eos_that_a_text_brings_along_is_not_doubled",
            "test_check::test_a_template_that_writes_two_beginnings_is_refused",
        ),
    ),
    "B07": Fault(
        "the chat template differs from training",
        "refused",
        "it is part of the base model's fingerprint",
        (
            "test_peft::test_an_adapter_of_another_base_is_refused_with_what_differs",
            "test_real_model::test_what_training_reads_is_what_a_chat_asks",
        ),
    ),
    "B08": Fault(
        "earlier turns change when a conversation continues",
        "repaired",
        "rendered turn by turn, and counted",
        (
            "test_data_labels::test_a_template_that_drops_earlier_thinking_is_laid_out_turn_by_turn",
            "test_check::test_conversations_that_are_laid_out_turn_by_turn_are_compared_too",
        ),
    ),
    "B09": Fault(
        "prompt and answer share a token",
        "repaired",
        "the prompt's tokens are those of generation",
        (
            "test_data_labels::test_a_completion_is_learned_to_the_character_after_the_prompts_own_tokens",
            "test_data_labels::test_pieces_that_cannot_be_written_apart_are_refused",
        ),
    ),
    "B10": Fault(
        "answers are truncated",
        "refused",
        "or counted, where truncation is requested",
        (
            "test_data_load::test_rows_that_are_too_long_are_refused_with_the_way_out",
            "test_check::test_rows_that_are_cut_are_counted_and_if_all_are_it_is_refused",
        ),
    ),
    "B11": Fault(
        "examples vanish",
        "impossible",
        "examples in = used + rejected",
        (
            "test_bad_data::test_bad_files_are_accounted_for_or_refused",
            "test_data_read::test_rows_in_are_rows_used_and_refused_whatever_happens_to_a_file",
        ),
    ),
    "B12": Fault(
        "packed examples attend to each other",
        "impossible",
        "gradients between examples are exactly 0",
        ("test_packing::test_no_gradient_reaches_another_rows_tokens", "suite::I22_packed_is_alone_and_no_row_reaches_another"),
    ),
    "B13": Fault(
        "positions continue from one packed example to the next",
        "impossible",
        "a packed example gives the results of the example alone",
        (
            "test_packing::test_packed_losses_and_gradients_equal_those_of_rows_alone",
            "test_packing::test_a_broken_mask_window_or_position_is_noticed",
        ),
    ),
    "B14": Fault(
        "an example's first token is predicted from the example before",
        "impossible",
        "it is no target",
        ("test_data_load::test_the_first_token_of_a_packed_row_is_never_predicted_from_the_row_before",),
    ),
    "B15": Fault(
        "position ids are mistaken for packing",
        "impossible",
        "packing is explicit, by a tree of segments",
        ("test_packing::test_calls_without_a_layout_are_the_models_own_bit_for_bit",),
    ),
    "B16": Fault(
        "stale tokens come from a cache",
        "impossible",
        "its key is a hash of everything that determines them, the code included",
        ("test_data_cache::test_whatever_decides_the_tokens_has_them_made_anew",),
    ),
    "B17": Fault(
        "embeddings of new tokens are not trained, or not saved",
        "impossible",
        "they have a method of their own, tested on a new base model",
        (
            "test_tokens::test_an_adapter_folder_carries_them_to_a_fresh_base",
            "test_tokens::test_a_run_adds_them_before_it_reads_its_data_and_its_adapter_answers_with_them",
        ),
    ),
    "B18": Fault(
        "padding changes results",
        "impossible",
        "training has no padding; virtual tokens are tested with Transformers' padding",
        ("test_virtual::test_padding_changes_nothing",),
    ),
    "B19": Fault(
        "a key of the recipe has no effect",
        "impossible",
        "another value of each gives another result",
        ("test_keys::test_another_value_gives_another_result", "test_keys::test_no_key_is_left_out_here"),
    ),
    "B20": Fault(
        "nulls added to a tool call by a table's schema are trained on",
        "repaired",
        "removed, and counted; those written in JSON stay",
        (
            "test_data_read::test_what_arrow_fills_up_with_nulls_is_left_out_and_counted",
            "test_data_read::test_without_its_pruning_arrow_would_teach_nulls",
            "test_data_read::test_nulls_of_ones_own_stay",
        ),
    ),
    "B21": Fault(
        'an unknown key of a message, such as "loss": false, is ignored',
        "refused",
        "with its line, and the supported key",
        (
            "test_data_labels::test_a_key_of_a_message_that_nothing_reads_is_refused",
            "test_data_labels::test_a_key_of_a_message_that_the_template_writes_is_read",
            "test_data_shapes::test_a_column_that_another_format_reads_is_never_dropped",
        ),
    ),
    "B22": Fault(
        "the template truncates or omits a part of an answer",
        "refused",
        "every text of every trained turn has to be in its rendering",
        (
            "test_chat_templates::test_it_teaches_what_it_has_to_or_says_why_not",
            "test_chat_templates::test_without_a_text_of_the_message_nothing_is_taught",
            "test_data_labels::test_a_template_that_leaves_tool_calls_out_is_refused",
        ),
    ),
    "B23": Fault(
        "the template writes the date, so the prompt differs on another day",
        "impossible",
        "the time of the run's start is stored with the adapter, and written wherever that is used",
        (
            "test_chat_templates::test_templates_that_write_the_date_write_that_of_the_run",
            "test_resume::test_a_run_is_resumed_on_another_day_with_a_template_that_writes_the_date",
        ),
    ),
    # Saving, loading, resuming
    "C01": Fault(
        "no tensor of the file matches, and the base model is served",
        "refused",
        "tensors match exactly, or are refused",
        ("suite::I13_tensors_fit_exactly_or_are_refused", "test_peft::test_an_adapter_of_pefts_that_does_not_fit_is_refused"),
    ),
    "C02": Fault(
        "the saved adapter has no effect though training worked",
        "refused",
        "a new process has to reproduce training's log-probabilities",
        (
            "test_certificate::test_what_is_saved_must_be_what_was_trained",
            "test_certificate::test_a_process_that_cannot_load_it_says_why",
        ),
    ),
    "C03": Fault(
        "a trained tensor is not saved",
        "refused",
        "the same",
        ("test_certificate::test_what_is_saved_must_be_what_was_trained", "suite::I13_tensors_fit_exactly_or_are_refused"),
    ),
    "C04": Fault(
        "an incomplete checkpoint prevents resuming",
        "repaired",
        "folders appear atomically; the newest complete one is used",
        ("test_resume::test_real_kills", "test_resume::test_a_damaged_state_is_passed_over_for_the_one_before"),
    ),
    "C05": Fault(
        "the disk is full",
        "repaired",
        "checkpoints stay; the same command resumes",
        (
            "test_failing_disk::test_a_disk_that_fails_loses_nothing",
            "test_cli::test_a_disk_that_fills_up_keeps_what_was_whole",
            "test_check::test_a_disk_without_room_is_refused_before_the_run",
        ),
    ),
    "C06": Fault(
        "the wrong checkpoint is removed",
        "impossible",
        "those that the two newest states refer to stay, and states are read back first",
        (
            "test_keys::test_the_adapter_handed_over_is_the_best_one_and_both_it_and_the_last_are_kept",
            "test_resume::test_a_damaged_state_is_passed_over_for_the_one_before",
        ),
    ),
    "C07": Fault(
        "a part of the state is missing, and the resumed run differs",
        "refused",
        "a state is complete, or an earlier one is used",
        (
            "test_resume::test_a_damaged_state_is_passed_over_for_the_one_before",
            "test_resume::test_a_state_of_other_parameters_is_refused",
        ),
    ),
    "C08": Fault(
        "random numbers differ after resuming",
        "impossible",
        "dropout is a function of seed and step",
        (
            "test_resume::test_it_goes_on_as_if_it_had_not_ended",
            "test_train::test_two_runs_are_equal_to_the_last_bit_with_dropout_whatever_happened_before",
        ),
    ),
    "C09": Fault(
        "the order of examples differs after resuming",
        "impossible",
        "it is a function of seed and epoch",
        (
            "test_resume::test_any_method_and_objective_goes_on_at_random_cuts",
            "test_data_load::test_the_order_is_decided_by_seed_and_epoch_alone",
        ),
    ),
    "C10": Fault(
        "the loss jumps after resuming",
        "impossible",
        "losses are equal bit for bit",
        ("test_resume::test_it_goes_on_as_if_it_had_not_ended",),
    ),
    "C11": Fault(
        "the final adapter is not the best one",
        "impossible",
        "its bytes are compared",
        ("test_keys::test_the_adapter_handed_over_is_the_best_one_and_both_it_and_the_last_are_kept",),
    ),
    "C12": Fault(
        "bits rot",
        "refused",
        "by the name of the file or tensor",
        (
            "test_faults::test_flipped_bits_are_noticed",
            "test_faults::test_structural_damages_are_noticed",
            "test_peft::test_every_flipped_bit_is_noticed",
        ),
    ),
    "C13": Fault(
        "an adapter is loaded on another base model",
        "refused",
        "with the differences",
        (
            "test_peft::test_an_adapter_of_another_base_is_refused_with_what_differs",
            "suite::I14_another_base_or_an_edited_folder_is_refused",
        ),
    ),
    "C14": Fault(
        "its configuration was edited, or needs unsupported features",
        "refused",
        "by the key",
        (
            "suite::I14_another_base_or_an_edited_folder_is_refused",
            "test_peft::test_a_key_that_asks_for_more_is_refused_by_name",
        ),
    ),
    "C15": Fault(
        "the dtype changes on loading",
        "impossible",
        "dtypes are in the manifest",
        ("test_methods::test_state_survives_a_round_trip_and_misfits_are_refused_by_name",),
    ),
    "C16": Fault(
        "an adapter's name contains another's",
        "impossible",
        "whole names are compared",
        ("test_composition::test_names_are_free_and_one_that_contains_another_is_not_it",),
    ),
    "C17": Fault(
        "a name is used twice",
        "refused",
        "with the name",
        ("test_composition::test_a_name_that_is_taken_or_unknown_is_refused",),
    ),
    "C18": Fault(
        "after a swap of adapters the old scale acts",
        "impossible",
        "every adapter has its own layers",
        ("test_composition::test_the_newest_acts_alone_and_names_choose", "suite::I19_adapters_leave_each_other_alone"),
    ),
    "C19": Fault(
        "tensors missing from a base model's files are initialized at random, or unknown ones dropped",
        "refused",
        "at load, by the tensors' names",
        (
            "test_loading::test_a_folder_that_does_not_hold_the_models_tensors_is_refused_by_name",
            "test_loading::test_a_model_in_memory_that_was_not_read_whole_is_refused",
            "test_loading::test_a_gguf_file_that_is_not_read_whole_is_refused",
        ),
    ),
    "C20": Fault(
        "another version of Transformers reads a merged folder differently",
        "impossible",
        "its configuration serves 4.57 and 5; `make compat` reads it with both",
        (
            "test_written::test_rotary_embeddings_are_said_in_both_versions_words",
            "test_written::test_what_transformers_5_wrote_is_written_so_that_4_reads_it",
        ),
    ),
    "C21": Fault(
        "the base model's dtype, device or quantization in training is forgotten",
        "impossible",
        "it is in the adapter's manifest, and restored on loading",
        (
            "test_held::test_a_base_in_any_number_type_comes_back_in_it",
            "test_held::test_a_run_on_the_cpu_stays_there_though_an_accelerator_is_found",
        ),
    ),
    "C22": Fault(
        "two runs write into one folder",
        "refused",
        "the folder is locked before anything in it is read; with the process that holds the lock",
        ("test_resume::test_two_processes_do_not_train_into_one_folder",),
    ),
    # Merging and combining
    "D01": Fault(
        "a merge in bfloat16 loses the change",
        "shown",
        "merged in float32 by default, otherwise with the share that is kept",
        (
            "test_merge::test_a_bfloat16_base_is_merged_in_float32",
            "test_written::test_fewer_bits_are_rounded_once_and_told",
            "test_written::test_a_small_change_is_lost_in_bfloat16_and_kept_in_float32",
        ),
    ),
    "D02": Fault(
        "a merge into a quantized base model",
        "refused",
        "with what to do",
        ("test_quantized::test_merging_into_it_and_methods_that_need_its_weights_are_refused",),
    ),
    "D04": Fault(
        "tied embeddings change with the head",
        "impossible",
        "they stay tied, or the merge is refused",
        ("test_merge::test_tied_embeddings_stay_tied",),
    ),
    "D05": Fault(
        "merging and unmerging drifts",
        "impossible",
        "the base model is never changed",
        ("suite::I16_merging_twice_gives_the_same_and_leaves_the_base_alone",),
    ),
    "D06": Fault(
        "NaN or Inf is merged",
        "refused",
        "nothing is written",
        ("test_merge::test_values_that_are_not_finite_are_refused_and_nothing_is_written",),
    ),
    "D07": Fault(
        "a combination of adapters is not their sum",
        "shown",
        "exact, or with its error",
        (
            "test_composition::test_a_combination_is_the_weighted_sum_of_changes",
            "test_composition::test_a_smaller_rank_is_the_best_there_is_and_its_error_is_told",
        ),
    ),
    "D10": Fault(
        "a prefix is merged", "refused", "with what to do", ("suite::I17_what_is_no_change_of_weights_is_not_merged",)
    ),
    "D11": Fault(
        "an adapter that made the model worse is merged",
        "refused",
        "an uncertified adapter is merged only with --force",
        (
            "test_certificate::test_an_adapter_that_is_worse_than_its_base_does_not_pass",
            "test_certificate::test_what_is_not_certified_is_merged_only_if_that_is_meant",
        ),
    ),
    # Inference
    "E03": Fault(
        "examples of different adapters in one batch get each other's",
        "impossible",
        "each gives the results of the example alone",
        ("suite::I20_a_row_of_a_mixed_batch_is_the_row_alone",),
    ),
    "E06": Fault(
        "virtual tokens have no effect in generation",
        "impossible",
        "cached decoding equals the forward pass, also in Transformers' generate()",
        (
            "suite::I21_cached_decoding_is_the_forward_pass",
            "test_virtual::test_transformers_generates_as_trimtab_does_once_it_is_trained",
        ),
    ),
    "E07": Fault(
        "generation continues beyond the model's context",
        "impossible",
        "an answer ends there, which is reported",
        (
            "test_decode::test_an_answer_ends_where_the_context_does",
            "test_evaluate::test_an_answer_is_cut_off_where_the_context_is_full",
        ),
    ),
    # Code and dependencies
    "F01": Fault(
        "a pickle runs code",
        "impossible",
        "none is ever read",
        (
            "test_security::test_training_and_certifying_unpickle_nothing_and_connect_to_nothing",
            "test_security::test_a_pickle_in_an_adapter_folder_is_never_opened",
            "test_layers::test_the_house_keeps_its_rules",
        ),
    ),
    "F02": Fault(
        "an adapter's configuration runs code",
        "refused",
        "it is data with known keys",
        ("test_peft::test_a_key_that_asks_for_more_is_refused_by_name",),
    ),
    "F03": Fault(
        "a model folder's code runs",
        "impossible",
        "no option allows it, and no answer to a prompt",
        (
            "test_security::test_code_in_a_model_folder_never_runs_whatever_is_answered",
            "test_security::test_a_kernel_of_the_hub_is_not_fetched_because_a_folder_asks_for_it",
        ),
    ),
    "F04": Fault(
        "a chat template runs code, or endlessly",
        "refused",
        "a sandbox, with limits",
        (
            "test_security::test_a_template_that_reaches_for_python_is_refused",
            "test_security::test_a_template_that_never_ends_or_writes_without_end_is_refused_soon",
        ),
    ),
    "F05": Fault(
        "a file of tensors is malformed",
        "refused",
        "by its name",
        ("test_faults::test_structural_damages_are_noticed",),
    ),
    "F06": Fault(
        "a corrupt cache is trusted",
        "repaired",
        "a changed entry is computed again",
        ("test_data_cache::test_a_damaged_file_is_made_anew", "test_preference::test_a_damaged_cache_is_made_anew"),
    ),
    "F07": Fault(
        "another version of a library breaks a method silently",
        "shown",
        "`trimtab doctor`",
        (
            "test_doctor::test_virtual_tokens_that_transformers_own_generate_does_not_see",
            "test_doctor::test_what_breaks_is_found",
        ),
    ),
    "F08": Fault(
        "a file in the working folder is imported instead of a library",
        "impossible",
        "Trimtab's processes do not import from there",
        (
            "test_security::test_the_certificates_process_imports_nothing_from_the_folder_that_it_is_run_in",
            "test_security::test_a_process_of_ours_imports_nothing_from_the_folder_that_it_is_run_in",
            "test_security::test_what_is_planted_would_run",
        ),
    ),
    "F09": Fault(
        "control codes in a text reach the terminal",
        "impossible",
        "all output goes through one console, which escapes them",
        (
            "test_terminal::test_no_text_of_a_row_steers_the_terminal",
            "test_terminal::test_what_a_model_says_is_shown_as_it_comes_and_steers_nothing",
            "test_terminal::test_the_negative_control",
        ),
    ),
}
MISSING = {"A03": "several devices: not supported yet"}
"""Faults of A, B, C and F that cannot be tested yet, and why."""
