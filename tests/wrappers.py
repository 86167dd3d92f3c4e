"""Tiny random multimodal wrappers: a text model, and beside it a vision tower and what projects from it, as checkpoints have them."""

import torch
import transformers
from worlds import make_tokenizer

TEXT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=1,
)  # fmt: skip
VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
QWEN = dict(depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=8, out_hidden_size=32)
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
IMAGE_TOKENS = dict(image_token_id=4, video_token_id=5, vision_start_token_id=6, vision_end_token_id=7)


def _gemma3(text):
    text = text | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "query_pre_attn_scalar": 8}
    return transformers.Gemma3Config(
        text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=4, boi_token_index=5, eoi_token_index=6
    )


def _gemma4(text):
    text = text | {
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
        "global_head_dim": 8, "vocab_size_per_layer_input": text["vocab_size"],
    }  # fmt: skip
    vision = {
        k: VISION[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    }
    vision |= {"head_dim": 8, "global_head_dim": 8, "num_key_value_heads": 2, "position_embedding_size": 16}
    return transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, image_token_id=4)


def _mistral3(text):
    vision = VISION | {"model_type": "pixtral", "head_dim": 8}
    return transformers.Mistral3Config(text_config=text | {"model_type": "mistral"}, vision_config=vision, image_token_index=4)


def _qwen3_vl(text):
    text = text | {"rope_parameters": ROPE}
    vision = QWEN | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **IMAGE_TOKENS)


def _qwen2_5_vl(text):
    vision = QWEN | {"fullatt_block_indexes": [1], "window_size": 16}
    return transformers.Qwen2_5_VLConfig(text_config=text | {"rope_parameters": ROPE}, vision_config=vision, **IMAGE_TOKENS)


WRAPPERS = {"gemma3": _gemma3, "gemma4": _gemma4, "mistral3": _mistral3, "qwen3_vl": _qwen3_vl, "qwen2_5_vl": _qwen2_5_vl}


def wrapper(kind, vocabulary=300):
    """A wrapper of this kind, with weights large enough that a mistake shows, in the towers too."""
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(WRAPPERS[kind](TEXT | {"vocab_size": vocabulary}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.2)
    return model.eval().requires_grad_(False)


def save_wrapper(kind, folder, template=None):
    """Its folder, with a tokenizer and the files of its processor."""
    tokenizer = make_tokenizer(template) if template else make_tokenizer()
    wrapper(kind, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor", "size": {"height": 16}}')
    (folder / "processor_config.json").write_text('{"image_seq_length": 4}')
    return folder
