"""Trainable tokens: trains the embeddings of a few tokens, new ones among them, and nothing else.

The row that a token has in the head is trained with its embedding, as one, where the two are tied. Elsewhere a new token
has a row of its own in the head: a token without one cannot be generated. PEFT calls this TRAINABLE_TOKENS; there is no paper.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, field_serializer, model_validator
from torch import Tensor, nn

from trimtab.core.config import as_tuple
from trimtab.core.errors import RecipeError
from trimtab.methods import AdapterLayer, Method, Sample, base_modules, shortest_names, to_peft_names
from trimtab.methods._matrices import embedding_and_head_shapes
from trimtab.methods._token_embeddings import (
    InputEmbeddings,
    OutputEmbeddings,
    TokenEmbeddings,
    embedding_and_head,
    initialize_new,
    single_token_id,
    tie_head,
)

Id = Annotated[int, Field(ge=0)]


def _sort_texts(raw: Any) -> Any:
    """Sort, because a mapping has no order once it is JSON."""
    texts = (raw,) if isinstance(raw, str) else raw
    if not isinstance(texts, dict | list | tuple) or {*map(type, texts)} - {str}:
        return raw
    return dict(sorted((texts if isinstance(texts, dict) else dict.fromkeys(texts)).items()))


class Tokens(Method):
    """Trains the embeddings of some tokens, including new ones."""

    peft_type: ClassVar[str | None] = "TRAINABLE_TOKENS"
    peft_names: ClassVar[dict[str, str]] = {"rows": "trainable_tokens_delta"}
    auto_lr: ClassVar[str] = "3e-2"

    tokens: Annotated[tuple[str | Id, ...], BeforeValidator(as_tuple)] = ()
    """Tokens that the tokenizer has: each a text that is one token (`<|im_start|>`), or an id."""
    new: Annotated[dict[Annotated[str, Field(min_length=1)], Id | None], BeforeValidator(_sort_texts)] = Field(default={})
    """Texts that become tokens: [<think>, </think>]. Each starts as the mean of the tokens that it was encoded as before."""
    head: bool = False
    """Whether the rows of `tokens` in the head are trained too where it is not tied to the embeddings; those of `new` always are."""

    @model_validator(mode="after")
    def _check_not_empty(self) -> Self:
        if not self.ids:
            raise ValueError("nothing to train: name tokens, or new ones.")
        return self

    @field_serializer("new")
    def _texts_or_ids(self, new: dict[str, int | None]) -> Any:
        return list(new) if None in new.values() else new

    @property
    def ids(self) -> tuple[Any, ...]:
        """Of all tokens, once `resolve_tokens` has been called."""
        return (*self.tokens, *self.new.values())

    @property
    def new_tokens(self) -> tuple[str, ...]:
        return tuple(self.new)

    def resolve_tokens(self, encode: Callable[[str], list[int]] | None) -> Self:
        tokens = tuple(single_token_id(t, encode, "put it under new") if isinstance(t, str) else t for t in self.tokens)
        new = {text: single_token_id(text, encode, "call base.add_tokens before examples are tokenized") for text in self.new}
        resolved = self.model_copy(update={"tokens": tokens, "new": new})
        if repeated := [token for n, token in enumerate(resolved.ids) if token in resolved.ids[:n]]:
            raise RecipeError(f"tokens: names token {repeated[0]} more than once.")
        return resolved

    def sites(self, model: nn.Module) -> list[str]:
        embeddings, head, tied = embedding_and_head(model)
        return [embeddings, head] if tied or self.head or self.new else [embeddings]

    def layer(self, base: nn.Module, path: str) -> TokenEmbeddings:
        new = self.ids[len(self.tokens) :]
        if isinstance(base, nn.Embedding):
            return InputEmbeddings(base, self.ids, new)
        return OutputEmbeddings(base, self.ids if self.head else new, new)

    def tie_parameters(self, layers: dict[str, AdapterLayer]) -> None:
        tie_head(layers)

    def initialize(self, model: nn.Module, layers: dict[str, AdapterLayer], sample: Sample) -> None:
        initialize_new(self.new, layers, sample)

    def parameter_count(self, model: nn.Module) -> int:
        """hidden size · (tokens + those that also have a row of their own in the head)."""
        embeddings, _, tied = embedding_and_head(model)
        in_head = 0 if tied else len(self.ids) if self.head else len(self.new)
        return embedding_and_head_shapes(model)[embeddings][1] * (len(self.ids) + in_head)

    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        embeddings, head, tied = embedding_and_head(model)
        vocabulary, own = embedding_and_head_shapes(model)[embeddings][0], base_modules(model)
        paths = [path for path in (embeddings, head) if f"{path}.rows" in tensors]
        same = all(len(tensors[f"{path}.rows"]) == len(self.ids) for path in paths)
        config = self.peft_config()
        if max(self.ids) >= vocabulary or not same or (own[head].bias is not None and (tied or head in paths)):
            # PEFT has no rows beyond the model's, has one list of tokens for embeddings and head, and drops the bias.
            config = self.trimtab_only_config()
        if tied:  # PEFT writes what is shared under both names, and misses the second if it is not there
            tensors = {**tensors, f"{head}.rows": tensors[f"{embeddings}.rows"].clone()}
        # embeddings alone as PEFT writes them, which it then reads without a warning
        targets = shortest_names(model, paths) if head in paths else embeddings
        config |= {"target_modules": targets, "token_indices": list(self.ids)}
        return config, to_peft_names(tensors, self.peft_names)

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        renamed, paths = cls.read_peft(config, tensors, honoured={"token_indices"}, ignored={"init_weights"})
        return cls.parse({"tokens": config.get("token_indices"), "head": len(paths) > 1}), renamed
