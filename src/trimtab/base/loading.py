"""The door through which models and tokenizers come in from files: whole or not at all, and without running code of theirs."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import ArtifactError, UnsupportedModel, listing
from trimtab.core.process import gc_frozen

_OLD_BUFFERS = re.compile(r"(^|\.)(masked_bias|rotary_emb\.inv_freq|position_ids)$")
"""Constants that older versions of Transformers saved, and that today's models make themselves. It knows most of them."""
_OTHERS = {"vision_config", "audio_config"}
"""Keys of a configuration that say that its files hold another model beside the text model, which may be read alone."""
PLAIN = (
    "hello world", "Is 2+2=4? 12345, 3.14!", "def f(x):\n    return x\n\n\n# done", "naïve café, Straße", "你好，世界。", "Привет, мир", "مرحبا",
    "tabs\tand\r\nlines", "a  b   c", "don't I'LL", "snake_case MiXeD", "e\u0301 \u00e9 😀", "https://example.com/a?b=c",
)  # fmt: skip
"""Texts that no two readings of one tokenizer.json should differ on."""
AS_IT_STANDS = "TokenizersBackend"
"""The class of tokenizer that takes tokenizer.json as it is; others make some of it anew."""
_CODE = "_implementation"
"""How keys of a configuration end that can name a kernel on the hub, which is code."""


def read_model(place: Path | str, **how: Any) -> Any:
    """A causal language model from a folder (a Path) or the hub (a str), every tensor of it from its files.

    Raises:
        ArtifactError: The files lack tensors of the model, or hold others; the message names them.
        UnsupportedModel: It asks for code that comes with it, or from the hub.
        Exception: Whatever Transformers raises for what is not a model that it knows.
    """
    with warnings.catch_warnings(), gc_frozen():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM, PreTrainedConfig
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        config = PreTrainedConfig.get_config_dict(str(place))[0] if "gguf_file" not in how else {}
        _refuse_kernels(config, place)
        how |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # to be refused below, by name
        with _report() as said, _without_code(place):
            try:
                loaded: Any = AutoModelForCausalLM.from_pretrained(str(place), trust_remote_code=False, **how)
            except RuntimeError as error:
                if broken := re.findall(r"(?m)^(\S+)\s+\|\s+CONVERSION", "\n".join(said)):
                    raise _not_whole(place, [f"{name}: cannot be put together" for name in sorted(set(broken))]) from error
                raise
    model, info = loaded
    if problems := _problems(model, info, config):
        raise _not_whole(place, problems, type(model).__name__)
    return model


def read_skeleton(place: Path | str) -> Any:
    """A causal language model by its configuration alone, on the `meta` device. Raises as `read_model` does."""
    with warnings.catch_warnings(), gc_frozen():
        warnings.simplefilter("ignore")
        from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

        _refuse_kernels(PreTrainedConfig.get_config_dict(str(place))[0], place)
        with _without_code(place), torch.device("meta"):
            config = AutoConfig.from_pretrained(str(place), trust_remote_code=False)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _problems(model: Any, info: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Of what Transformers says of a load."""
    shapes = {name: f"has shape {tuple(found)}, expected {tuple(wanted)}" for name, found, wanted in info["mismatched_keys"]}
    unexpected = [name for name in info["unexpected_keys"] if not _plays_no_part(name, model, config)]
    problems = [f"{name}: missing" for name in sorted(info["missing_keys"])]
    problems += [f"{name}: {words}" for name, words in sorted(shapes.items())]
    return problems + [f"{name}: unexpected" for name in sorted(unexpected)]


def read_tokenizer(place: Path | str, **how: Any) -> Any:
    """The tokenizer of a folder or a name on the hub.

    Raises:
        UnsupportedModel: It is code; or Transformers makes another of it than tokenizer.json says.
        Exception: Whatever Transformers raises.
    """
    with warnings.catch_warnings(), gc_frozen():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        with _without_code(place):
            tokenizer = AutoTokenizer.from_pretrained(str(place), trust_remote_code=False, **how)
    file = None if "gguf_file" in how else file_of(place, "tokenizer.json")
    if (
        file is not None
        and type(tokenizer).__name__ != AS_IT_STANDS
        and (text := read_otherwise(tokenizer, file, PLAIN)) is not None
    ):
        raise UnsupportedModel(
            f"model: {place}: Transformers reads its tokenizer as a {type(tokenizer).__name__}, which gives {text!r} other tokens than "
            f'tokenizer.json says. Write "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json, which reads it as it stands.'
        )
    return tokenizer


def read_otherwise(tokenizer: Any, file: Path, texts: Sequence[str]) -> str | None:
    """The first of these texts that the tokenizer gives other tokens than a tokenizer.json does; a BOS and its like aside."""
    from tokenizers import Tokenizer

    said = Tokenizer.from_file(str(file))
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    found = (text for text, one in zip(texts, ids, strict=True) if said.encode(text, add_special_tokens=False).ids != one)
    return next(found, None)


def file_of(place: Path | str, name: str) -> Path | None:
    """A file of a folder, or of a name on the hub as far as it has been fetched."""
    if not str(place):
        return None
    if (Path(place) / name).is_file():
        return Path(place) / name
    from huggingface_hub import try_to_load_from_cache

    with suppress(Exception):  # it is no name of the hub
        found = try_to_load_from_cache(str(place), name)
        return Path(found) if isinstance(found, str) else None
    return None


def refuse_partly_made(name: str, weights: Mapping[str, Tensor]) -> None:
    """Raise ArtifactError for a model in memory that was read from files, but for some of its weights.

    Transformers marks each parameter that it has read; what it fills in at random it does not mark. A quantized matrix is made anew.
    """
    own = {
        key: hasattr(p, "_is_hf_initialized")
        for key, p in weights.items()
        if isinstance(p, nn.Parameter) and p.is_floating_point()
    }
    if any(own.values()) and not all(own.values()):
        problems = [f"{key}: not from its files" for key, read in own.items() if not read]
        raise ArtifactError(
            f"{name} was read from files, but for:\n{listing(problems)}\n"
            "If the files lack them, Transformers has made them up at random: get the files again. If they were made on purpose "
            "(resize_token_embeddings, say), save the model (save_pretrained) and load that, so that an adapter can find its base again."
        )


def _not_whole(place: Path | str, problems: Sequence[str], name: str = "the model") -> ArtifactError:
    return ArtifactError(
        f"model: {place} does not hold exactly the tensors of {name}:\n{listing(list(problems))}\n"
        "What is missing would be made up at random, and what is unexpected left out. Get the files again from where they came; "
        "if a tensor is there on purpose, config.json does not say what it is for: correct it, or save the model without the tensor."
    )


def _plays_no_part(name: str, model: Any, config: dict[str, Any]) -> bool:
    """Whether a tensor that the model does not know is right to leave out."""
    if _OLD_BUFFERS.search(name):
        return True
    known = {child for whole in (model, model.base_model) for child, _ in whole.named_children()} | {model.base_model_prefix}
    return bool(_OTHERS & config.keys()) and name.partition(".")[0] not in known


def _refuse_kernels(config: Any, place: Path | str) -> None:
    """Raise UnsupportedModel if a configuration names an implementation that Transformers would fetch and run."""
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        named = value.values() if isinstance(value, dict) and key.endswith(_CODE) else [value]
        if key.endswith(_CODE) and any("/" in str(one) for one in named):
            raise UnsupportedModel(
                f"model: {place} asks in config.json for code from the hub ({key}: {value}), which is never run. Take the key out."
            )
        _refuse_kernels(value, place)


@contextmanager
def _without_code(place: Path | str) -> Iterator[None]:
    """Say in our words what Transformers says of a model that only code of its own can read."""
    try:
        yield
    except ValueError as error:
        if "custom code" not in str(error):
            raise
        raise UnsupportedModel(
            f"model: {place} can only be read by code of its own (auto_map), and code from a model folder or hub is never run. "
            "Use a model of a kind that Transformers knows."
        ) from error


@contextmanager
def _report() -> Iterator[list[str]]:
    """What Transformers would print of tensors that it made up or left out: it is ours to say."""
    said: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        words = re.sub(r"\x1b\[\d*m", "", record.getMessage())
        said.append(words)
        return "LOAD REPORT" not in words

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        yield said
    finally:
        logger.removeFilter(keep)
