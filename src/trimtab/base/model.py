"""The base: a frozen Transformers causal language model with its tokenizer, template, stop tokens and fingerprint."""

import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trimtab.base import locate, quantized, vocabulary
from trimtab.base.config import ModelConfig, as_held, device_of, dtype_of
from trimtab.base.fingerprint import Fingerprint, fingerprint, own_weights, tokenizing_hash, weights_hash
from trimtab.base.loading import read_model, read_tokenizer, refuse_partly_made
from trimtab.base.quantized import Quantize
from trimtab.base.supported import context_length, refuse_unsupported
from trimtab.base.template import ChatTemplate, Ending, Message, Switches
from trimtab.base.vocabulary import Encoded
from trimtab.core.errors import ArtifactError, BaseChanged, RecipeError, StorageError, TrimtabError, UnsupportedModel
from trimtab.core.files import expand_user
from trimtab.core.process import give_back_freed_memory
from trimtab.core.wrapping import unwrap


class Base:
    """A frozen model together with everything that gives its tokens meaning.

    Wraps any Transformers causal language model that you hold already, before or after adapters were attached to it: `Base(model, tokenizer)`.

    Args:
        source: The name it was loaded from, stored with adapters.
        template: Switches of the chat template, such as {"enable_thinking": False}.

    Raises:
        UnsupportedModel: Trimtab can't train this model exactly; the message says why.
        ArtifactError: Some of its parameters were not read from its files.
        RecipeError: The chat template has no such switch.
    """

    quantize: Quantize = "none"
    """How it was quantized when it was loaded; one that was stored quantized, or is wrapped, says it itself."""
    asked_device: str | None = None
    """Where it was asked to be when it was loaded."""

    def __init__(self, model: Any, tokenizer: Any = None, source: str | None = None, template: Switches | None = None) -> None:
        refuse_unsupported(model, tokenizer)
        self._pristine = own_weights(model)  # the tensors themselves, as adapters rename them; of none that is on it already
        refuse_partly_made(type(model).__name__, self._pristine)
        self.model = model.eval()
        for tensor in self._pristine.values():
            tensor.requires_grad_(False)
        quantized.settle(model)
        self.tokenizer = self._own_tokenizer = tokenizer
        self.source = source or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.template_switches, self.moment = dict(template or {}), datetime.now()
        if template and not self.has_template:
            raise RecipeError(f"model.template: {self.source} has no chat template, so it has no switches.")
        if self.has_template:
            self.template.check_switches()
        ends: list[Any] = [unwrap(end) for end in (model.get_input_embeddings(), model.get_output_embeddings())]
        self._embedded = min(len(end.weight) for end in ends)

    @classmethod
    def load(cls, config: ModelConfig | str) -> "Base":
        """Load a base by name. See ModelConfig for what a name can be."""
        config = ModelConfig(name=config) if isinstance(config, str) else config
        folder = locate.folder_of(config.name)
        device = device_of(config)
        dtype = dtype_of(config, device)
        if folder is None:
            locate.check_hub(config.name)
        place = folder if folder is not None else config.name
        base = cls.load_folder(place, dtype, device, quantize=config.quantize, template=config.template)
        # What it was asked for by, rather than the cache folder that a GGUF file was converted into.
        local = folder is not None and config.name != locate.EMBEDDED
        base.source = str(expand_user(config.name).absolute()) if local else config.name
        base.asked_device = config.device
        return base

    @classmethod
    def load_folder(
        cls,
        place: Path | str,
        dtype: torch.dtype,
        device: torch.device,
        *,
        quantize: Quantize = "none",
        with_tokenizer: bool = True,
        template: Switches | None = None,
    ) -> "Base":
        """Load a model folder (a Path), or a name on the hub (a str), in a number type on a device."""
        settings = quantized.loading(quantize, dtype, device)
        try:
            model: Any = read_model(place, dtype=dtype, use_safetensors=True, **settings)
            tokenizer = read_tokenizer(place) if with_tokenizer else None
        except TrimtabError:
            raise
        except Exception as error:  # Transformers raises a dozen kinds; each means that this is not a model we can use
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if isinstance(place, str):
                raise StorageError(
                    f"model: {place} is no local file or folder, and it could not be fetched from the hub: {reason}"
                ) from error
            raise UnsupportedModel(f"model: {place} cannot be loaded: {type(error).__name__}: {reason}") from error
        kind = quantized.kind_of(model)
        if quantize not in ("none", kind):
            raise RecipeError(
                f"model.quantize: {quantize}, but {place} is then {kind}: it is stored so, or has no linear layers."
            )
        base = cls(model.to(device), tokenizer, str(place), template)
        base.quantize = quantize
        return base

    @property
    def config(self) -> ModelConfig:
        """What `load` makes the same base from, held as it is: in its number type, and on its device unless that was `auto`."""
        dtype = next(tensor.dtype for tensor in self._pristine.values() if tensor.is_floating_point())
        return as_held(self.source, dtype, self.asked_device or str(self.device), self.quantize, self.template_switches)

    def release(self) -> None:
        """Let go of the memory of all weights, an adapter's too. What is known of them (the fingerprint) stays known; they are gone."""
        _ = self.fingerprint
        for tensor in [*self.model.parameters(), *self._pristine.values()]:
            tensor.data = tensor.data.new_empty(0)
        give_back_freed_memory()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    # Identity

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Hashes of the weights, configuration, tokenizer and template, as they were when first asked for."""
        return fingerprint(self.model, self._pristine, self._own_tokenizer, self.template_switches)

    @property
    def quantization(self) -> str:
        """`none`, `nf4`, `int8`, … : how the matrices of its blocks are held."""
        return quantized.kind_of(self.model)

    def check_unchanged(self) -> None:
        """Raise BaseChanged if a weight has changed since `fingerprint` was first asked for."""
        if weights_hash(self._pristine) != self.fingerprint["weights"]:
            raise BaseChanged(
                f"The frozen weights of {self.source} changed while they were in use, so what was trained belongs to no known "
                "base. This is a fault in the program that held the model; load the base anew and train again."
            )

    def check_is(self, expected: Fingerprint, what: str) -> None:
        """Raise ArtifactError unless this is the base that `what` was made on, naming the parts that differ."""
        different = [part for part in expected if expected[part] != self.fingerprint.get(part)]
        if different:
            kind = str(next(iter(self._pristine.values())).dtype)
            kind += f", quantize: {self.quantization}" if self.quantization != "none" else ""
            raise ArtifactError(
                f"{what} was trained on another base than {self.source} ({kind}): different {', '.join(different)}. "
                "Give the base it was trained on, in the number type it was trained on."
            )

    # Text

    @property
    def tokenizing_hash(self) -> str:
        """A hash of all that decides what tokens a text or conversation becomes, and whether they can be used."""
        return f"{tokenizing_hash(self.tokenizer, self.template_switches, self.moment)} {self._embedded}"

    @property
    def context_length(self) -> int | None:
        """How many tokens a row may have, if the model's configuration says so."""
        return context_length(self.model)

    @property
    def device(self) -> torch.device:
        return next(iter(self._pristine.values())).device

    @property
    def has_template(self) -> bool:
        return getattr(self.tokenizer, "chat_template", None) is not None

    @property
    def template(self) -> ChatTemplate:
        """Its chat template, with the switches that are set, at the moment that counts as today. There must be one."""
        known = self.__dict__.get("_template")
        if known is None or known.tokenizer is not self.tokenizer or known.source is not self.tokenizer.chat_template:
            known = self._template = ChatTemplate(self.tokenizer, self.template_switches, frozenset(self._configured_stops))
        known.moment = self.moment
        return known

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, prompt: bool = False) -> str:
        """The text of a conversation by the model's own chat template; with `prompt`, up to where the model speaks.

        Raises:
            DataError: The template does not accept this conversation.
        """
        return self.template.render(messages, tools, prompt=prompt)

    def add_tokens(self, texts: Sequence[str]) -> None:
        """Have each of these texts read as one token from now on. The model has no embeddings for them; an adapter does.

        The tokenizer that the base came with is not changed, and identifies it as before. Raises RecipeError.
        """
        self.tokenizer = vocabulary.grown(self.tokenizer, self._own_tokenizer, texts, self.source)
        self.__dict__.pop("control_tokens", None)

    @property
    def added_tokens(self) -> dict[str, int]:
        """What `add_tokens` added: texts and ids."""
        return vocabulary.added(self.tokenizer, self._own_tokenizer)

    def pieces(self, text: str) -> list[int]:
        """A text as tokens of the tokenizer that the base came with."""
        return list(self._own_tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, texts: Sequence[str], *, special: bool = False) -> list[Encoded]:
        """Texts as tokens; with `special`, as plain texts begin: after a BOS, if the tokenizer puts one there.

        What it puts behind a text is left out, because that is ours to decide: a prompt goes on.
        """
        if not texts:
            return []
        batch = self.tokenizer(
            list(texts),
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
        )
        return [
            Encoded.of(*one)
            for one in zip(batch["input_ids"], batch["offset_mapping"], batch["special_tokens_mask"], strict=True)
        ]

    def unembedded(self, ids: Sequence[int]) -> str | None:
        """What is wrong with these tokens, if the model has no embedding for one of them, or can't say it."""
        return (
            vocabulary.unembedded(ids, self._embedded, self.tokenizer, self.added_tokens)
            if max(ids, default=0) >= self._embedded
            else None
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without the special ones."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def said(self, ids: Sequence[int]) -> str:
        """The answer in tokens that were generated or trained on: their text without special tokens, and without reasoning."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if self.has_template and self.template.answer_mark in text:
            text = text.rpartition(self.template.answer_mark)[2]
        return re.sub("|".join(map(re.escape, self.control_tokens)) or "(?!)", "", text).strip()

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """The texts that the tokenizer reads as special tokens, which no message may contain."""
        ends = set(self.stop_ids)
        added = self.tokenizer.added_tokens_decoder.items()
        return tuple(sorted({token.content for i, token in added if (token.special or i in ends) and token.content.strip()}))

    def ending(self, message: Message) -> Ending | None:
        """How the chat template ends this turn of the assistant's; None if by no special token."""
        return self.template.ending_of(message) if self.has_template else None

    @property
    def end_of_text(self) -> int | None:
        """The token that ends a plain text."""
        return self.tokenizer.eos_token_id

    @property
    def _configured_stops(self) -> set[int]:
        """Tokens that end a generation by the tokenizer and the generation config."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        return {i for i in (self.end_of_text, *(configured if isinstance(configured, list) else [configured])) if i is not None}

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that ends a generation: the template's, the tokenizer's, and those of the generation config."""
        ends = (self.template.ending, self.template.call_ending) if self.has_template else ()
        return tuple(sorted(self._configured_stops | {end.token for end in ends if end is not None}))
