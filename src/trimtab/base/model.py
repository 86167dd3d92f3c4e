"""The base: a frozen Transformers causal language model with its tokenizer, template, stop tokens and fingerprint."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field

from trimtab.adapted import look_through
from trimtab.base import limits, quantized, source, vocabulary
from trimtab.base.fingerprint import Fingerprint, fingerprint, own_weights, tokenizing_hash, weights_hash
from trimtab.base.loading import device_of, read_model, read_tokenizer, refuse_partly_made
from trimtab.base.quantized import Quantize
from trimtab.base.supported import refuse_unsupported
from trimtab.config import Config
from trimtab.errors import ArtifactError, BaseChanged, DataError, RecipeError, StorageError, TrimtabError, UnsupportedModel
from trimtab.files import expanded

Message = dict[str, Any]
"""A chat message: `role`, `content`, and what else the model's template reads (`tool_calls`, …)."""


class ModelConfig(Config):
    """Which base, and how it is held in memory. In a recipe, `model: NAME` is short for `model: {name: NAME}`."""

    name: Annotated[str, Field(min_length=1)]
    """A local folder, a GGUF file, a hub name, or `smollm2-135m-instruct`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number type of the frozen weights; auto is float32 on a CPU and bfloat16 on an accelerator."""
    quantize: Quantize = "none"
    """Hold the matrices of its blocks in 4 bits a weight (nf4, as QLoRA does) or in 8 (int8): pip install 'trimtab[quantized]'."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """Where the model runs; auto is the first accelerator, or the CPU."""


class Encoded(NamedTuple):
    """A text as tokens, with the characters [start, end) that each stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    before: int = 0
    """How many of the tokens the tokenizer put before the text, such as a BOS."""


class Base:
    """A frozen model together with everything that gives its tokens meaning.

    Wraps any Transformers causal language model that you hold already, before or after adapters were attached to it: `Base(model, tokenizer)`.

    Args:
        source: The name it was loaded from, stored with adapters.

    Raises:
        UnsupportedModel: Trimtab can't train this model exactly; the message says why.
        ArtifactError: Some of its parameters were not read from its files.
    """

    quantize: Quantize = "none"
    """How it was quantized when it was loaded; one that was stored quantized, or is wrapped, says it itself."""

    def __init__(self, model: Any, tokenizer: Any = None, source: str | None = None) -> None:
        refuse_unsupported(model, tokenizer)
        self._pristine = own_weights(model)  # the tensors themselves, as adapters rename them; of none that is on it already
        refuse_partly_made(type(model).__name__, self._pristine)
        self.model = model.eval()
        for tensor in self._pristine.values():
            tensor.requires_grad_(False)
        quantized.settle(model)
        self.tokenizer = self._own_tokenizer = tokenizer
        self.source = source or getattr(model.config, "_name_or_path", "") or type(model).__name__
        ends: list[Any] = [look_through(end) for end in (model.get_input_embeddings(), model.get_output_embeddings())]
        self._embedded = min(len(end.weight) for end in ends)

    @classmethod
    def load(cls, config: ModelConfig | str) -> "Base":
        """Load a base by name. See ModelConfig for what a name can be."""
        config = ModelConfig(name=config) if isinstance(config, str) else config
        folder = source.folder_of(config.name)
        device = device_of(config.device)
        chosen = config.dtype if config.dtype != "auto" else "float32" if device.type == "cpu" else "bfloat16"
        if folder is None:
            source.check_hub(config.name)
        place = folder if folder is not None else config.name
        base = cls.load_folder(place, getattr(torch, chosen), device, quantize=config.quantize)
        # What it was asked for by, rather than the cache folder that a GGUF file was converted into.
        local = folder is not None and config.name != source.EMBEDDED
        base.source = str(expanded(config.name).absolute()) if local else config.name
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
        base = cls(model.to(device), tokenizer, str(place))
        base.quantize = quantize
        return base

    # Identity

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Hashes of the weights, configuration, tokenizer and template, as they were when first asked for."""
        return fingerprint(self.model, self._pristine, self._own_tokenizer)

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
    def tokenizing_hash(self) -> str | None:
        """A hash of all that decides what tokens a text or conversation becomes; None if more decides it than is known here.

        Some templates write today's date (Llama 3.1's does).
        """
        known = tokenizing_hash(self.tokenizer)
        return None if known is None else f"{known} {self._embedded}"

    @property
    def context_length(self) -> int | None:
        """How many tokens a row may have, if the model's configuration says so.

        Where rotary frequencies change with the length of the longest row in a batch (Phi-3's longrope), rows that are
        short enough never to change them: one long row would change what the others in its pack mean.
        """
        config = self.model.config.get_text_config()
        rotary = getattr(config, "rope_parameters", None) or {}
        if rotary.get("rope_type") in ("dynamic", "longrope"):
            first = rotary.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
            return first or config.max_position_embeddings
        return getattr(config, "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        return next(iter(self._pristine.values())).device

    @property
    def has_template(self) -> bool:
        return getattr(self.tokenizer, "chat_template", None) is not None

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, prompt: bool = False) -> str:
        """The text of a conversation by the model's own chat template; with `prompt`, up to where the model speaks.

        Raises:
            DataError: The template does not accept this conversation.
        """
        return limits.rendered(
            str(self.tokenizer.chat_template),
            lambda: self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) if tools else None, tokenize=False, add_generation_prompt=prompt
            ),
        )

    def add_tokens(self, texts: Sequence[str]) -> None:
        """Have each of these texts read as one token from now on. The model has no embeddings for them; an adapter does.

        The tokenizer that the base came with is not changed, and identifies it as before. Raises RecipeError.
        """
        self.tokenizer = vocabulary.grown(self.tokenizer, self._own_tokenizer, texts, self.source)

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
            _encoded(*one)
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

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """The texts that the tokenizer reads as special tokens, which no message may contain."""
        ends = {self.end_of_turn, self.end_of_text}
        added = self.tokenizer.added_tokens_decoder.items()
        return tuple(sorted({token.content for i, token in added if (token.special or i in ends) and token.content.strip()}))

    @cached_property
    def end_of_turn(self) -> int | None:
        """The token by which the chat template ends what the assistant says, or None if it has no such token."""
        if not self.has_template:
            return None
        user = {"role": "user", "content": "Hello"}
        try:
            texts = [self.render([user, {"role": "assistant", "content": answer}]) for answer in ("0", "1")]
        except DataError:
            return None
        encoded = self.encode(texts[:1])[0]
        closing = next((i for i in range(1, len(texts[0])) if texts[0][-i] != texts[1][-i]), len(texts[0])) - 1
        added = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.content.strip()}
        special = set(self.tokenizer.all_special_ids) | added
        starts = ((i, start) for i, (start, _) in zip(encoded.ids, encoded.offsets, strict=True))
        return next((i for i, start in starts if start >= len(texts[0]) - closing and i in special), None)

    @property
    def end_of_text(self) -> int | None:
        """The token that ends a plain text."""
        return self.tokenizer.eos_token_id

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that ends a generation: the template's, the tokenizer's, and those of the generation config."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        configured = configured if isinstance(configured, list) else [configured]
        return tuple(sorted({i for i in (self.end_of_turn, self.end_of_text, *configured) if i is not None}))


def _encoded(ids: list[int], offsets: list[tuple[int, int]], put: list[int]) -> Encoded:
    """`put` marks what the tokenizer put around the text."""
    before = next((n for n, mark in enumerate(put) if not mark), len(put))
    end = next((n + 1 for n in reversed(range(len(put))) if not put[n]), before)
    doubled = before if ids[before : 2 * before] == ids[:before] else 0  # the text says its BOS itself
    return Encoded(ids[doubled:end], offsets[doubled:end], before)
