"""A model's configuration and tokenizer as files for Transformers 5 and for 4.57, which servers and converters still use.

Where the model came from a folder or the hub and was not changed since, they are the original files.
"""

import copy
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trimtab.base.fingerprint import tokenizer_identity
from trimtab.base.loading import SAMPLE_TEXTS, fetch_file, find_file, first_difference, read_tokenizer
from trimtab.core import files
from trimtab.core.errors import UnsupportedModel

Json = dict[str, Any]

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
_TOKENIZER_FILES = (
    TOKENIZER_CONFIG, "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip
PROCESSOR_TEMPLATE = "chat_template.json"
_PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", PROCESSOR_TEMPLATE)
_NOT_COMPARED = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "tie_word_embeddings",
    "transformers_version",
    "vocab_size",
}
"""Keys of a configuration that don't affect what the model computes, or that a merged model sets itself."""
_KEYS_IN_4 = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
}
"""By model type: the usual name of a key -> the name that 4.57 reads."""
_ROPE_TYPES_IN_4 = {"default", "linear", "dynamic", "yarn", "longrope", "llama3"}
"""Kinds of rotary embedding in 4.57. A model with another one (Gemma 4) is not in it, and 5 would misread such a kind under its old name."""
_SINCE_5 = {"backend", "is_local", "local_files_only"}
"""Keys of a tokenizer's configuration that Transformers 5 adds and nothing needs."""


def write_config(model: Any, folder: Path, facts: Json) -> None:
    """Rewrite the config.json that `save_pretrained` wrote for export. `facts` (dtype, …) describe the exported weights."""
    path = folder / CONFIG
    config, own = json.loads(path.read_text()), find_file(model.config._name_or_path, CONFIG)
    if own is not None and _same(type(model.config), original := json.loads(own.read_text()), model.config):
        config = original | {"architectures": config["architectures"]}
    config.pop("auto_map", None)  # it names code that is not exported
    facts = facts | {"torch_dtype": facts["dtype"]}
    text = config.get("text_config")
    parts = [config, *([text] if isinstance(text, dict) else [])]
    for part in parts:
        part |= {key: value for key, value in facts.items() if key in part}
    config |= {key: value for key, value in facts.items() if key.endswith("dtype") or not any(key in part for part in parts)}
    config = _for_4(type(model.config), config)
    files.write_json(path, config)


def _for_4(kind: Any, config: Json) -> Json:
    """The configuration under 4.57's names too, if Transformers 5 reads it as the same: kinds that 4.57 does not know may use them otherwise."""
    converted = copy.deepcopy(config)
    with suppress(Exception):  # whatever conversions meet in a configuration of a new kind
        text = converted.get("text_config")
        for part in [converted, *([text] if isinstance(text, dict) else [])]:
            part |= _as_in_4(part)
        plain, renamed = (_compared(kind.from_dict(copy.deepcopy(each))) for each in (config, converted))
        if plain == {key: renamed.get(key) for key in plain}:
            return converted
    return config


def _same(kind: Any, original: Json, config: Any) -> bool:
    """Whether a config.json still describes the model's configuration."""

    with suppress(Exception):  # it is then not a configuration of this kind
        return _compared(kind.from_dict(copy.deepcopy(original))) == _compared(config)
    return False


def _compared(config: Any) -> Json:
    return {key: value for key, value in config.to_dict().items() if key not in _NOT_COMPARED}


def _as_in_4(part: Json) -> Json:
    """The keys of rotary embeddings and experts under their names in 4.57, which ignores those of Transformers 5."""
    renamed: Json = (
        {"num_experts": part["num_local_experts"]} if "num_local_experts" in part and "num_experts" not in part else {}
    )
    rotary = part.get("rope_parameters")
    if not rotary or "rope_theta" in part:
        return renamed
    if "full_attention" in rotary:  # by the kind of layer
        local = (rotary.get("sliding_attention") or rotary["full_attention"])["rope_theta"]
        rotary = rotary["full_attention"]
        renamed |= {"rope_local_base_freq": local} if rotary.get("rope_type", "default") in _ROPE_TYPES_IN_4 else {}
    if rotary.get("rope_type", "default") not in _ROPE_TYPES_IN_4:
        return renamed
    scaling = {key: value for key, value in rotary.items() if key not in ("rope_theta", "partial_rotary_factor")}
    renamed |= {
        "rope_theta": rotary["rope_theta"],
        "rope_scaling": scaling if rotary.get("rope_type", "default") != "default" else None,
    }
    if "partial_rotary_factor" in rotary:
        renamed["partial_rotary_factor"] = rotary["partial_rotary_factor"]
    names = _KEYS_IN_4.get(part["model_type"], {})
    return renamed | {name: renamed[usual] for usual, name in names.items() if usual in renamed}


def write_tokenizer(tokenizer: Any, folder: Path, *, changed: bool) -> None:
    """Write a tokenizer: its original files byte for byte, unless it was `changed` since it was read.

    Raises:
        UnsupportedModel: The written files read as another tokenizer.
    """
    for name in () if changed else _TOKENIZER_FILES:
        if (own := find_file(tokenizer.name_or_path, name)) is not None:
            files.write_bytes(folder / name, own.read_bytes())
    if _reads_as(tokenizer, folder):
        return
    for name in _TOKENIZER_FILES:
        files.remove_file(folder / name)
    tokenizer.save_pretrained(folder)
    if not _reads_as(tokenizer, folder):
        raise UnsupportedModel(
            f"{type(tokenizer).__name__}, once it is written, reads as another tokenizer, so it can't be exported."
        )


def write_processor(model: Any, folder: Path, *, own_template: bool) -> None:
    """Copy the files of a multimodal model's processor, so that AutoProcessor reads them beside the exported weights.

    Args:
        own_template: The chat template is still the model's own; else the processor's, which goes before the tokenizer's, is left out.
    """
    if model.config.get_text_config() is model.config:
        return
    for name in _PROCESSOR_FILES:
        own = fetch_file(_place(model.config._name_or_path), name)
        if own is None or (name == PROCESSOR_TEMPLATE and not own_template):
            continue
        files.write_bytes(folder / name, own.read_bytes())
        if name == "processor_config.json" and not own_template:
            config = {key: value for key, value in files.read_json(own).items() if key != "chat_template"}
            files.write_json(folder / name, config)


def _place(name: str) -> Path | str:
    return Path(name) if Path(name).exists() else name


def write_switches(folder: Path, switches: Mapping[str, Any]) -> None:
    """Make these values the defaults of the switches in the chat template that is written there."""
    if not switches:
        return
    sets = "".join(
        f"{{%- set {name} = {name} if {name} is defined else {json.dumps(value)} -%}}" for name, value in switches.items()
    )
    for path in (folder / "chat_template.jinja", *(folder / "additional_chat_templates").glob("*.jinja")):
        if path.exists():
            files.write_text(path, sets + path.read_text(encoding="utf-8"))
    for path in (folder / name for name in (TOKENIZER_CONFIG, PROCESSOR_TEMPLATE, "processor_config.json")):
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        template = config.get("chat_template")
        if isinstance(template, str):
            files.write_json(path, config | {"chat_template": sets + template})
        elif template:  # a list of named templates
            named = [one | {"template": sets + one["template"]} for one in template]
            files.write_json(path, config | {"chat_template": named})


def _reads_as(tokenizer: Any, folder: Path) -> bool:
    """Whether the files there are this tokenizer, both for classes that rebuild parts of tokenizer.json and for those that don't."""
    file = folder / "tokenizer.json"
    if not file.exists() or first_difference(tokenizer, file, _texts(tokenizer)) is not None:
        return False
    _make_readable_by_4(folder / TOKENIZER_CONFIG)
    with suppress(Exception):  # Transformers finds no class for it, because only the model's config.json says which
        return tokenizer_identity(read_tokenizer(folder)) == tokenizer_identity(tokenizer)
    return False


def _texts(tokenizer: Any) -> list[str]:
    """Texts on which different readings of a tokenizer differ: spaces at the ends, and around special tokens."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return [*SAMPLE_TEXTS, " x", "  x ", "\nx", *(f"a {token}x {token} y{token}\n" for token in special[:50])]


def _make_readable_by_4(path: Path) -> None:
    """Rewrite a tokenizer's configuration for 4.57, if Transformers 5 has written it."""
    if not path.exists():
        return
    config = json.loads(path.read_text())
    extra = config.get("extra_special_tokens")
    if not (isinstance(extra, list) or config.keys() & _SINCE_5 or config.get("auto_map")):
        return
    config = {key: value for key, value in config.items() if key not in _SINCE_5 | {"auto_map"}}
    if isinstance(extra, list):
        del config["extra_special_tokens"]
        config["additional_special_tokens"] = extra
    files.write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})  # reads tokenizer.json unchanged
