"""Loading models and tokenizers from files: every tensor or none, and without running code that comes with them."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.base.classes import auto_class
from trimtab.core.errors import ArtifactError, StorageError, TrimtabError, UnsupportedModel, listing
from trimtab.core.files import read_json
from trimtab.core.hub import is_hub_name, parse_hub_name
from trimtab.core.process import gc_frozen

_OLD_BUFFERS = re.compile(r"(^|\.)(masked_bias|rotary_emb\.inv_freq|position_ids)$")
"""Constants that older versions of Transformers saved, and that today's models compute. Transformers knows most of them."""
_OTHER_MODELS = {"vision_config", "audio_config"}
"""Keys of a configuration whose files hold another model beside the text model, which may be read without it."""
SAMPLE_TEXTS = (
    "hello world", "Is 2+2=4? 12345, 3.14!", "def f(x):\n    return x\n\n\n# done", "naïve café, Straße", "你好，世界。", "Привет, мир", "مرحبا",
    "tabs\tand\r\nlines", "a  b   c", "don't I'LL", "snake_case MiXeD", "e\u0301 \u00e9 😀", "https://example.com/a?b=c",
)  # fmt: skip
"""Texts that every reading of one tokenizer.json should give the same tokens."""
FILE_TOKENIZER = "TokenizersBackend"
"""The tokenizer class that takes tokenizer.json unchanged; others rebuild parts of it."""
_CODE = "_implementation"
"""The ending of configuration keys that can name a kernel on the hub, which is code."""


def read_model(place: Path | str, **arguments: Any) -> Any:
    """A causal language model or multimodal wrapper from a folder (a Path) or the hub (a str), with every tensor from its files.

    Raises:
        ArtifactError: The files lack tensors of the model, or hold others; the message names them.
        UnsupportedModel: It requires code that comes with it, or from the hub.
        Exception: Any kind that Transformers raises; see `explaining_failure`.
    """
    with warnings.catch_warnings(), gc_frozen():
        warnings.simplefilter("ignore")
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        config = read_config(place) if "gguf_file" not in arguments else {}
        AutoModel, (name, revision) = auto_class(config), parse_hub_name(str(place))
        arguments |= {"revision": revision} if revision else {}
        if config.get("attn_logit_softcapping") is not None:  # before Transformers 5.22 its sdpa leaves the cap out silently
            arguments.setdefault("attn_implementation", "eager")
        arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, by name
        with _load_report() as lines:
            try:
                loaded: Any = AutoModel.from_pretrained(name, trust_remote_code=False, **arguments)
            except RuntimeError as error:
                if broken := re.findall(r"(?m)^(\S+)\s+\|\s+CONVERSION", "\n".join(lines)):
                    raise _wrong_tensors(place, [f"{name}: cannot be put together" for name in sorted(set(broken))]) from error
                raise
    model, info = loaded
    if problems := _problems(model, info, config):
        raise _wrong_tensors(place, problems, type(model).__name__)
    if revision:
        model.config._name_or_path = str(place)  # where its other files are found
    return model


def read_config(place: Path | str) -> dict[str, Any]:
    """The content of config.json. Raises UnsupportedModel if it names code."""
    from transformers import PreTrainedConfig

    hub = parse_hub_name(str(place))
    config: dict[str, Any] = PreTrainedConfig.get_config_dict(hub.repository, **hub.arguments)[0]
    _refuse_kernels(config, place)
    return config


def read_skeleton(place: Path | str) -> Any:
    """A causal language model from its configuration alone, on the `meta` device. Raises as `read_model` does."""
    with warnings.catch_warnings(), gc_frozen():
        warnings.simplefilter("ignore")
        from transformers import AutoConfig

        AutoModel, hub = auto_class(read_config(place)), parse_hub_name(str(place))
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(hub.repository, trust_remote_code=False, **hub.arguments)
            return AutoModel.from_config(config, trust_remote_code=False)


def _problems(model: Any, info: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """The wrong tensors in Transformers' report of a load."""
    shapes = {
        name: f"has shape {tuple(stored)}, expected {tuple(expected)}" for name, stored, expected in info["mismatched_keys"]
    }
    unexpected = [name for name in info["unexpected_keys"] if not _is_ignorable(name, model, config)]
    problems = [f"{name}: missing" for name in sorted(info["missing_keys"])]
    problems += [f"{name}: {shape}" for name, shape in sorted(shapes.items())]
    return problems + [f"{name}: unexpected" for name in sorted(unexpected)]


def read_tokenizer(place: Path | str, **arguments: Any) -> Any:
    """The tokenizer of a folder or a name on the hub.

    Raises:
        UnsupportedModel: Transformers reads it differently than tokenizer.json says.
        Exception: Any kind that Transformers raises.
    """
    with warnings.catch_warnings(), gc_frozen():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        hub = parse_hub_name(str(place))
        tokenizer = AutoTokenizer.from_pretrained(hub.repository, trust_remote_code=False, **hub.arguments, **arguments)
        if hub.revision:
            tokenizer.name_or_path = str(place)
        if tokenizer.chat_template is None and "gguf_file" not in arguments:
            tokenizer.chat_template = _processor_template(place)
    file = None if "gguf_file" in arguments else find_file(place, "tokenizer.json")
    if (
        file is not None
        and type(tokenizer).__name__ != FILE_TOKENIZER
        and (text := first_difference(tokenizer, file, SAMPLE_TEXTS)) is not None
    ):
        raise UnsupportedModel(
            f"model: {place}: Transformers reads its tokenizer as a {type(tokenizer).__name__}, which gives {text!r} other tokens than "
            f'tokenizer.json says. Write "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json, which reads the file unchanged.'
        )
    return tokenizer


def _processor_template(place: Path | str) -> str | None:
    """The chat template that older multimodal models keep with their processor, beside a tokenizer without one."""
    for name in ("chat_template.json", "processor_config.json"):
        if (path := fetch_file(place, name)) is not None:
            content = read_json(path)
            template = content.get("chat_template") if isinstance(content, dict) else None
            if isinstance(template, str):
                return template
    return None


def first_difference(tokenizer: Any, file: Path, texts: Sequence[str]) -> str | None:
    """The first of these texts that the tokenizer gives other tokens than a tokenizer.json does, special tokens around it aside."""
    from tokenizers import Tokenizer

    expected = Tokenizer.from_file(str(file))
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    different = (t for t, own in zip(texts, ids, strict=True) if expected.encode(t, add_special_tokens=False).ids != own)
    return next(different, None)


def find_file(place: Path | str, name: str) -> Path | None:
    """A file of a folder, or of a name on the hub if it is in the hub's cache."""
    if not str(place):
        return None
    if (Path(place) / name).is_file():
        return Path(place) / name
    from huggingface_hub import try_to_load_from_cache

    with suppress(Exception):  # not a valid hub name
        hub = parse_hub_name(str(place))
        cached = try_to_load_from_cache(hub.repository, name, revision=hub.revision)
        return Path(cached) if isinstance(cached, str) else None
    return None


def fetch_file(place: Path | str, name: str) -> Path | None:
    """The same, downloaded from the hub where it is not yet in the cache. None if there is none, or the hub can't be reached."""
    if (path := find_file(place, name)) is not None or not isinstance(place, str) or not is_hub_name(place):
        return path
    from transformers.utils import cached_file

    hub = parse_hub_name(place)
    with suppress(OSError):
        found = cached_file(hub.repository, name, _raise_exceptions_for_missing_entries=False, **hub.arguments)
        return Path(found) if found is not None else None
    return None


def refuse_partly_initialized(name: str, weights: Mapping[str, Tensor]) -> None:
    """Raise ArtifactError for a model in memory of which some weights were not read from its files.

    Transformers marks each parameter that it reads, and not those that it initializes at random. Quantized matrices have no marks.
    """
    marked = {
        key: hasattr(p, "_is_hf_initialized")
        for key, p in weights.items()
        if isinstance(p, nn.Parameter) and p.is_floating_point()
    }
    if any(marked.values()) and not all(marked.values()):
        problems = [f"{key}: not from its files" for key, read in marked.items() if not read]
        raise ArtifactError(
            f"{name} was read from files, except for:\n{listing(problems)}\n"
            "If the files lack them, Transformers has initialized them at random: download the files again. If they were added on purpose "
            "(by resize_token_embeddings, say), save the model (save_pretrained) and load that, so that adapters find their base again."
        )


def _wrong_tensors(place: Path | str, problems: Sequence[str], name: str = "the model") -> ArtifactError:
    return ArtifactError(
        f"model: {place} does not hold exactly the tensors of {name}:\n{listing(list(problems))}\n"
        "Missing tensors would be initialized at random, and unexpected ones left out. Download the files again; "
        "if a tensor is there on purpose, config.json does not declare it: correct it, or save the model without the tensor."
    )


def _is_ignorable(name: str, model: Any, config: dict[str, Any]) -> bool:
    """Whether a tensor that the model does not have may be left out."""
    if _OLD_BUFFERS.search(name):
        return True
    known = {child for part in (model, model.base_model) for child, _ in part.named_children()} | {model.base_model_prefix}
    return bool(_OTHER_MODELS & config.keys()) and name.partition(".")[0] not in known


def _refuse_kernels(config: Any, place: Path | str) -> None:
    """Raise UnsupportedModel if a configuration names an implementation that Transformers would download and run."""
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        named = value.values() if isinstance(value, dict) and key.endswith(_CODE) else [value]
        if key.endswith(_CODE) and any("/" in str(name) for name in named):
            raise UnsupportedModel(
                f"model: {place} asks in config.json for code from the hub ({key}: {value}), which is never run. Remove the key."
            )
        _refuse_kernels(value, place)


@contextmanager
def explaining_failure(place: Path | str) -> Iterator[None]:
    """Raise UnsupportedModel, or StorageError for a name on the hub (a str), in place of any error of Transformers."""
    try:
        yield
    except TrimtabError:
        raise
    except Exception as error:  # Transformers raises a dozen kinds
        if "custom code" in str(error):
            raise UnsupportedModel(
                f"model: {place} can only be read by custom code (auto_map), and code from a model folder or hub is never run. "
                "Use a model that Transformers supports itself."
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(place, str):
            raise StorageError(
                f"model: {place} is no local file or folder, and it could not be downloaded from the hub: {reason}"
            ) from error
        raise UnsupportedModel(f"model: {place} cannot be loaded: {type(error).__name__}: {reason}") from error


@contextmanager
def _load_report() -> Iterator[list[str]]:
    """Messages of Transformers while it loads, of which the report of wrong tensors is not printed: errors of ours name them."""
    messages: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        message = re.sub(r"\x1b\[\d*m", "", record.getMessage())
        messages.append(message)
        return "LOAD REPORT" not in message

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        yield messages
    finally:
        logger.removeFilter(keep)
