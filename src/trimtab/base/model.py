"""The base: a frozen Transformers causal language model with its tokenizer, template, stop tokens and fingerprint."""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trimtab.base import locate, quantized, vocabulary
from trimtab.base.config import ModelConfig, dtype_note, nearest_config, resolve_device, resolve_dtype
from trimtab.base.fingerprint import Fingerprint, fingerprint, own_weights, tokenizing_hash, weights_hash
from trimtab.base.loading import explaining_failure, read_tokenizer, refuse_partly_initialized
from trimtab.base.quantized import Quantize
from trimtab.base.room import find_room
from trimtab.base.stored_quantization import dequantization_note, read_stored
from trimtab.base.supported import context_length, refuse_unsupported
from trimtab.base.switches import Switches
from trimtab.base.template import ChatTemplate
from trimtab.base.template_file import choose_template
from trimtab.base.vocabulary import Encoded
from trimtab.core.errors import ArtifactError, BaseChanged, RecipeError
from trimtab.core.files import expand_user
from trimtab.core.process import give_back_freed_memory
from trimtab.core.processes import processes
from trimtab.core.wrapping import unwrap


class Base:
    """A frozen model with its tokenizer and chat template.

    Wraps any Transformers causal language model that is in memory, before or after adapters were attached to it: `Base(model, tokenizer)`.

    Args:
        source: The name it was loaded from, stored with adapters.
        template: Switches of the chat template, such as {"enable_thinking": False}.

    Raises:
        UnsupportedModel: Trimtab can't train this model exactly; the message says why.
        ArtifactError: Some of its parameters were not read from its files.
        RecipeError: The chat template has no such switch.
    """

    quantize: Quantize = "none"
    """How `load` quantized it; see `quantization` for one that was stored quantized or is wrapped."""
    requested_device: str | None = None
    """The device that `load` was asked for."""
    chat_template: str | None = None
    """The file whose chat template stands in the place of the model's own, or the name of one of its own."""
    _shares: tuple[torch.Tensor, ...] = ()
    _shares_hash = ""
    notes: tuple[str, ...] = ()
    """What to tell the user about how it was loaded."""

    def __init__(self, model: Any, tokenizer: Any = None, source: str | None = None, template: Switches | None = None) -> None:
        refuse_unsupported(model, tokenizer)
        self._frozen_weights = own_weights(
            model
        )  # the tensors themselves, because adapters rename them; without those of adapters
        refuse_partly_initialized(type(model).__name__, self._frozen_weights)
        self.model = model.eval()
        for tensor in self._frozen_weights.values():
            tensor.requires_grad_(False)
        quantized.make_exact(model)
        self.tokenizer = self._original_tokenizer = tokenizer
        self.source = source or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.template_switches, self.moment = dict(template or {}), datetime.now()
        if template and not self.has_template:
            raise RecipeError(f"model.template: {self.source} has no chat template, so it has no switches.")
        if self.has_template:
            self.template.check_switches()
        ends: list[Any] = [unwrap(end) for end in (model.get_input_embeddings(), model.get_output_embeddings())]
        self._embedding_count = min(len(end.weight) for end in ends)

    @classmethod
    def load(
        cls, config: ModelConfig | str, on_note: Callable[[str], None] = lambda _: None, *, moves: bool = False, copies: int = 0
    ) -> "Base":
        """Load a base by name. See ModelConfig for what a name can be.

        Args:
            on_note: Is told beforehand what loading it takes that is not to be expected. `notes` has the same.
            moves: Whether the CPU is taken, which is slow, if the device has no memory for it.
            copies: How many copies of it in float32 will be made beside it.
        """
        config = ModelConfig(name=config) if isinstance(config, str) else config
        device, dtype = resolve_device(config), resolve_dtype(config, resolve_device(config))
        with processes.first_here_first():  # a GGUF file is converted, or a model downloaded, once
            place = locate.loadable_place(config.name)
        with explaining_failure(place):
            note = dequantization_note(place, config.quantize, dtype)
        where, moved = find_room(config, place, dtype, device, moves=moves, copies=copies)
        for beforehand in filter(None, (note, moved)):
            on_note(beforehand)
        base = cls.load_folder(
            place, dtype, where, quantize=config.quantize, template=config.template, chat_template=config.chat_template
        )
        base.notes = tuple(filter(None, (dtype_note(config, device), note, moved)))
        # Its name, rather than the cache folder that a GGUF file was converted into.
        local = isinstance(place, Path) and config.name != locate.EMBEDDED
        base.source = str(expand_user(config.name).absolute()) if local else config.name
        base.requested_device = config.device
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
        chat_template: str | None = None,
    ) -> "Base":
        """Load a model folder (a Path), or a name on the hub (a str), in a dtype on a device."""
        with explaining_failure(place):
            arguments = quantized.load_arguments(quantize, dtype, device)
            tokenizer = read_tokenizer(place) if with_tokenizer else None
        if tokenizer is not None and chat_template is not None:
            tokenizer.chat_template, chat_template = choose_template(chat_template, tokenizer.chat_template)
        with explaining_failure(place):
            model: Any = read_stored(place, quantize, dtype=dtype, **arguments)
        quantization = quantized.quantization_of(model)
        if quantize not in ("none", quantization):
            raise RecipeError(
                f"model.quantize: {quantize}, but {place} is then {quantization}: it is stored that way, or has no linear layers."
            )
        base = cls(model.to(device), tokenizer, str(place), template)
        base.quantize, base.chat_template = quantize, chat_template
        return base

    @property
    def config(self) -> ModelConfig:
        """The config with which `load` gives the same base, in its dtype, and on its device unless that was `auto`."""
        dtype = next(tensor.dtype for tensor in self._frozen_weights.values() if tensor.is_floating_point())
        device = self.requested_device or str(self.device)
        return nearest_config(self.source, dtype, device, self.quantize, self.template_switches, self.chat_template)

    def release(self) -> None:
        """Free the memory of all weights, an adapter's too. The fingerprint stays known; the model can no longer be used."""
        _ = self.fingerprint
        for tensor in [*self.model.parameters(), *self._frozen_weights.values()]:
            tensor.data = tensor.data.new_empty(0)
        for share in self._shares:  # of which the library that gathers them has views
            share.untyped_storage().resize_(0)
        quantized.release(self.model)
        give_back_freed_memory()
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator is not None:
            torch.get_device_module(accelerator).empty_cache()

    def hold_shares(self, shares: Mapping[int, torch.Tensor]) -> None:
        """Know a share of some weights in place of the whole, of which the model holds no more: by the identity of each weight."""
        _ = self.fingerprint
        self._frozen_weights = {name: shares.get(id(tensor), tensor) for name, tensor in self._frozen_weights.items()}
        self._shares, self._shares_hash = tuple(t.detach() for t in shares.values()), weights_hash(self._frozen_weights)

    # Identity

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Hashes of the weights, configuration, tokenizer and template, computed on first use."""
        return fingerprint(self.model, self._frozen_weights, self._original_tokenizer, self.template_switches)

    @property
    def quantization(self) -> str:
        """`none`, `nf4`, `int8`, … : how the matrices of its blocks are stored."""
        return quantized.quantization_of(self.model)

    def check_unchanged(self) -> None:
        """Raise BaseChanged if a weight has changed since `fingerprint` was computed."""
        if weights_hash(self._frozen_weights) != (self._shares_hash or self.fingerprint["weights"]):
            raise BaseChanged(
                f"The frozen weights of {self.source} changed while they were in use, so what was trained belongs to no known "
                "base. This is a fault of the program that uses the model; load the base again and retrain."
            )

    def check_is(self, expected: Fingerprint, artifact: str) -> None:
        """Raise ArtifactError unless this is the base that an artifact was trained on, naming the parts that differ."""
        different = [part for part in expected if expected[part] != self.fingerprint.get(part)]
        if different:
            held = str(next(iter(self._frozen_weights.values())).dtype)
            held += f", quantize: {self.quantization}" if self.quantization != "none" else ""
            raise ArtifactError(
                f"{artifact} was trained on another base than {self.source} ({held}): different {', '.join(different)}. "
                "Use the base it was trained on, in the dtype it was trained in."
            )

    # Text

    @property
    def tokenizing_hash(self) -> str:
        """A hash of all that decides what tokens a text or conversation becomes, and whether they can be used."""
        return f"{tokenizing_hash(self.tokenizer, self.template_switches, self.moment)} {self._embedding_count}"

    @property
    def context_length(self) -> int | None:
        """How many tokens an example may have, if the model's configuration says so."""
        return context_length(self.model)

    @property
    def device(self) -> torch.device:
        return next(iter(self._frozen_weights.values())).device

    @property
    def has_template(self) -> bool:
        return getattr(self.tokenizer, "chat_template", None) is not None

    @property
    def template(self) -> ChatTemplate:
        """Its chat template, with its switches, at its moment. There must be one."""
        template = self.__dict__.get("_template")
        if template is None or template.tokenizer is not self.tokenizer or template.source is not self.tokenizer.chat_template:
            template = self._template = ChatTemplate(self.tokenizer, self.template_switches, frozenset(self._configured_stops))
        template.moment = self.moment
        return template

    def add_tokens(self, texts: Sequence[str]) -> None:
        """Read each of these texts as one token from now on. The model has no embeddings for them; an adapter does.

        The original tokenizer is not changed, and identifies the base as before. Raises RecipeError.
        """
        self.tokenizer = vocabulary.extend_tokenizer(self.tokenizer, self._original_tokenizer, texts, self.source)
        self.__dict__.pop("control_tokens", None)

    @property
    def added_tokens(self) -> dict[str, int]:
        """The tokens that `add_tokens` added: texts and ids."""
        return vocabulary.added_tokens(self.tokenizer, self._original_tokenizer)

    def original_ids(self, text: str) -> list[int]:
        """A text as tokens of the original tokenizer, without added ones."""
        return list(self._original_tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, texts: Sequence[str], *, special: bool = False) -> list[Encoded]:
        """Texts as tokens; with `special`, after a BOS, if the tokenizer puts one before plain texts.

        What it puts behind a text is left out, because an answer may follow.
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
        return list(map(Encoded.of, batch["input_ids"], batch["offset_mapping"], batch["special_tokens_mask"]))

    def embedding_problem(self, ids: Sequence[int]) -> str | None:
        """A message if the model has no embedding or no head row for one of these tokens."""
        if max(ids, default=0) < self._embedding_count:
            return None
        return vocabulary.embedding_problem(ids, self._embedding_count, self.tokenizer, self.added_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without the special ones."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def raw_text(self, ids: Sequence[int]) -> str:
        """The text of tokens, with the special ones."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def answer_text(self, raw: str) -> str:
        """The answer in a text of generated or target tokens: without special tokens and reasoning."""
        if self.has_template and self.template.answer_separator in raw:
            raw = raw.rpartition(self.template.answer_separator)[2]
        return re.sub("|".join(map(re.escape, self.control_tokens)) or "(?!)", "", raw).strip()

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """The texts that the tokenizer reads as special tokens, which messages must not contain."""
        ends = set(self.stop_ids)
        added = self.tokenizer.added_tokens_decoder.items()
        return tuple(sorted({token.content for i, token in added if (token.special or i in ends) and token.content.strip()}))

    @property
    def end_of_text(self) -> int | None:
        """The token that ends a plain text."""
        return self.tokenizer.eos_token_id

    @property
    def _configured_stops(self) -> set[int]:
        """Tokens that end a generation according to the tokenizer and the generation config."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        return {i for i in (self.end_of_text, *(configured if isinstance(configured, list) else [configured])) if i is not None}

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that ends a generation: the template's, the tokenizer's, and those of the generation config."""
        ends = (self.template.ending, self.template.call_ending) if self.has_template else ()
        return tuple(sorted(self._configured_stops | {end.token for end in ends if end is not None}))
