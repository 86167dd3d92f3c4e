"""A model's configuration and tokenizer as files that today's Transformers reads, and 4.57, on which servers and converters still stand.

Where the model came from a folder or the hub and nothing of this was changed since, they are that folder's own.
"""

import copy
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trimtab.base.fingerprint import tokenizer_identity
from trimtab.base.loading import PLAIN, file_of, read_otherwise, read_tokenizer
from trimtab.core import files
from trimtab.core.errors import UnsupportedModel

Json = dict[str, Any]

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
_OF_TOKENIZERS = (
    TOKENIZER_CONFIG, "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip
_SAID_ANEW = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "tie_word_embeddings",
    "transformers_version",
    "vocab_size",
}
"""Keys of a configuration that say nothing of what the model computes, or that a merged model says for itself."""
_OWN_WORDS = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
}
"""By the type of a model: what 4.57 calls what others call otherwise there."""
_SINCE_5 = {"backend", "is_local", "local_files_only"}
"""Keys of a tokenizer's configuration that Transformers 5 writes, and nobody needs."""


def write_config(model: Any, folder: Path, facts: Json) -> None:
    """Make config.json, as the model's `save_pretrained` has written it, the one that is handed over. `facts` are of the weights there."""
    path = folder / CONFIG
    config, own = json.loads(path.read_text()), file_of(model.config._name_or_path, CONFIG)
    if own is not None and _same(type(model.config), original := json.loads(own.read_text()), model.config):
        config = original | {"architectures": config["architectures"]}
    config.pop("auto_map", None)  # to code that is not handed over
    facts = facts | {"torch_dtype": facts["dtype"]}
    parts = _parts(config)
    for part in parts:
        part |= {key: value for key, value in facts.items() if key in part} | _as_in_4(part)
    config |= {key: value for key, value in facts.items() if key.endswith("dtype") or not any(key in part for part in parts)}
    files.write_json(path, config)


def _parts(config: Json) -> list[Json]:
    """A configuration, and that of the text model in it, if there is one."""
    return [config, *(part for part in [config.get("text_config")] if isinstance(part, dict))]


def _same(kind: Any, original: Json, config: Any) -> bool:
    """Whether a config.json says what the model's configuration says now."""
    with suppress(Exception):  # it is then no such configuration
        one, other = kind.from_dict(copy.deepcopy(original)).to_dict(), config.to_dict()
        return {k: v for k, v in one.items() if k not in _SAID_ANEW} == {k: v for k, v in other.items() if k not in _SAID_ANEW}
    return False


def _as_in_4(part: Json) -> Json:
    """What Transformers 5 says of rotary embeddings and experts, in the words of 4.57, which overlooks 5's."""
    words: Json = (
        {"num_experts": part["num_local_experts"]} if "num_local_experts" in part and "num_experts" not in part else {}
    )
    rotary = part.get("rope_parameters")
    if not rotary or "rope_theta" in part:
        return words
    if "full_attention" in rotary:  # by the kind of layer
        words["rope_local_base_freq"] = (rotary.get("sliding_attention") or rotary["full_attention"])["rope_theta"]
        rotary = rotary["full_attention"]
    scaling = {key: value for key, value in rotary.items() if key not in ("rope_theta", "partial_rotary_factor")}
    words |= {
        "rope_theta": rotary["rope_theta"],
        "rope_scaling": scaling if rotary.get("rope_type", "default") != "default" else None,
    }
    if "partial_rotary_factor" in rotary:
        words["partial_rotary_factor"] = rotary["partial_rotary_factor"]
    return words | {theirs: words[ours] for ours, theirs in _OWN_WORDS.get(part["model_type"], {}).items() if ours in words}


def write_tokenizer(tokenizer: Any, folder: Path, *, changed: bool) -> None:
    """Write it so that it reads as it is now: its own files byte for byte, unless it was `changed` since it was read.

    Raises:
        UnsupportedModel: What is written reads as another tokenizer.
    """
    for name in () if changed else _OF_TOKENIZERS:
        if (own := file_of(tokenizer.name_or_path, name)) is not None:
            files.write_bytes(folder / name, own.read_bytes())
    if _reads_as(tokenizer, folder):
        return
    for name in _OF_TOKENIZERS:
        files.remove_file(folder / name)
    tokenizer.save_pretrained(folder)
    if not _reads_as(tokenizer, folder):
        raise UnsupportedModel(
            f"{type(tokenizer).__name__}, once it is written, reads as another tokenizer, so it can't be handed over."
        )


def write_switches(folder: Path, switches: Mapping[str, Any]) -> None:
    """Let the chat template that is written there take these values of its switches where nobody gives others."""
    if not switches:
        return
    sets = "".join(
        f"{{%- set {name} = {name} if {name} is defined else {json.dumps(value)} -%}}" for name, value in switches.items()
    )
    for path in (folder / "chat_template.jinja", *(folder / "additional_chat_templates").glob("*.jinja")):
        if path.exists():
            files.write_text(path, sets + path.read_text(encoding="utf-8"))
    path = folder / TOKENIZER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    template = config.get("chat_template")
    if isinstance(template, str):
        files.write_json(path, config | {"chat_template": sets + template})
    elif template:  # several, by their names
        files.write_json(path, config | {"chat_template": [one | {"template": sets + one["template"]} for one in template]})


def _reads_as(tokenizer: Any, folder: Path) -> bool:
    """Whether what is written there is this tokenizer, for whoever makes some of it anew and whoever reads it as it stands."""
    file = folder / "tokenizer.json"
    if not file.exists() or read_otherwise(tokenizer, file, _texts(tokenizer)) is not None:
        return False
    _readable(folder / TOKENIZER_CONFIG)
    return tokenizer_identity(read_tokenizer(folder)) == tokenizer_identity(tokenizer)


def _texts(tokenizer: Any) -> list[str]:
    """Texts that tell readings of a tokenizer apart: spaces at the ends, and before and behind special tokens."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return [*PLAIN, " x", "  x ", "\nx", *(f"a {token}x {token} y{token}\n" for token in special[:50])]


def _readable(path: Path) -> None:
    """Let 4.57 read a tokenizer's configuration, if 5 has written it."""
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
    files.write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})  # reads tokenizer.json as it stands
