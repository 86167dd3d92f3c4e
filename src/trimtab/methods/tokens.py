"""Trainable tokens: the embeddings of a few tokens are trained, those of new tokens among them, and nothing else.

The row that a token has in the head is trained with its embedding, as one, where the two are tied. Elsewhere a new token
has a row of its own in the head: what has none can't be said. PEFT calls this TRAINABLE_TOKENS; there is no paper.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, field_serializer, model_validator
from torch import Tensor, nn

from trimtab.core.config import as_tuple
from trimtab.core.errors import RecipeError
from trimtab.core.wrapping import modules
from trimtab.methods._base import AdapterLayer, LearningRateContext, Method, Sample
from trimtab.methods._peft import SELECTING, from_names, not_pefts, only_known, shortest_names, to_names
from trimtab.methods._targets import end_matrices
from trimtab.methods._token_rows import EmbeddedRows, ScoredRows, TokenRows, ends, one_token, start_new, tie

NAMES = {"rows": "trainable_tokens_delta"}
Id = Annotated[int, Field(ge=0)]


def _by_text(raw: Any) -> Any:
    """Sorted, because the order of a mapping says nothing once it is JSON."""
    texts = (raw,) if isinstance(raw, str) else raw
    if not isinstance(texts, dict | list | tuple) or {*map(type, texts)} - {str}:
        return raw
    return dict(sorted((texts if isinstance(texts, dict) else dict.fromkeys(texts)).items()))


class Tokens(Method):
    """Trains the embeddings of some tokens, new ones too."""

    peft_type: ClassVar[str | None] = "TRAINABLE_TOKENS"

    tokens: Annotated[tuple[str | Id, ...], BeforeValidator(as_tuple)] = ()
    """Tokens that the tokenizer has: each a text that is one token (`<|im_start|>`), or an id."""
    new: Annotated[dict[Annotated[str, Field(min_length=1)], Id | None], BeforeValidator(_by_text)] = Field(default={})
    """Texts that become tokens: [<think>, </think>]. Each starts as the mean of the tokens that it was before."""
    head: bool = False
    """Whether the rows of `tokens` in the head are trained too where it is not tied to the embeddings; those of `new` always are."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.ids:
            raise ValueError("nothing to train: name tokens, or new ones.")
        return self

    @field_serializer("new")
    def _texts_or_ids(self, new: dict[str, int | None]) -> Any:
        return list(new) if None in new.values() else new

    @property
    def ids(self) -> tuple[Any, ...]:
        """Of all tokens, once it is bound."""
        return (*self.tokens, *self.new.values())

    @property
    def new_tokens(self) -> tuple[str, ...]:
        return tuple(self.new)

    def bound(self, encode: Callable[[str], list[int]] | None) -> Self:
        tokens = tuple(one_token(t, encode, "put it under new") if isinstance(t, str) else t for t in self.tokens)
        new = {text: one_token(text, encode, "call base.add_tokens before rows are encoded") for text in self.new}
        bound = self.model_copy(update={"tokens": tokens, "new": new})
        if repeated := [token for n, token in enumerate(bound.ids) if token in bound.ids[:n]]:
            raise RecipeError(f"tokens: names token {repeated[0]} more than once.")
        return bound

    def sites(self, model: nn.Module) -> list[str]:
        embeddings, head, tied = ends(model)
        return [embeddings, head] if tied or self.head or self.new else [embeddings]

    def layer(self, base: nn.Module, path: str) -> TokenRows:
        new = self.ids[len(self.tokens) :]
        if isinstance(base, nn.Embedding):
            return EmbeddedRows(base, self.ids, new)
        return ScoredRows(base, self.ids if self.head else new, new)

    def join(self, layers: dict[str, AdapterLayer]) -> None:
        tie(layers)

    def initialize(self, model: nn.Module, layers: dict[str, AdapterLayer], sample: Sample) -> None:
        start_new(self.new, layers, sample)

    def parameter_count(self, model: nn.Module) -> int:
        """hidden size · (tokens, and again those that have a row of their own in the head)."""
        embeddings, _, tied = ends(model)
        again = 0 if tied else len(self.ids) if self.head else len(self.new)
        return end_matrices(model)[embeddings][1] * (len(self.ids) + again)

    def learning_rate(self, at: LearningRateContext) -> tuple[float, str]:
        """3e-2, by a small search: see docs/methods.md."""
        return 3e-2, "3e-2"

    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        embeddings, head, tied = ends(model)
        vocabulary, everything = end_matrices(model)[embeddings][0], modules(model)
        own = [path for path in (embeddings, head) if f"{path}.rows" in tensors]
        same = all(len(tensors[f"{path}.rows"]) == len(self.ids) for path in own)
        config: dict[str, Any] = {"peft_type": self.peft_type, "task_type": "CAUSAL_LM", "inference_mode": True}
        if max(self.ids) >= vocabulary or not same or (everything[head].bias is not None and (tied or head in own)):
            # It has no rows beyond the model's, has one list of tokens for both ends, and drops the bias.
            config = not_pefts(self.name)
        if tied:  # PEFT writes what is shared under both names, and misses the second if it is not there
            tensors = {**tensors, f"{head}.rows": tensors[f"{embeddings}.rows"].clone()}
        targets = (
            shortest_names(own, list(everything)) if head in own else embeddings
        )  # as PEFT writes it, and then doesn't warn
        config |= {"target_modules": targets, "token_indices": list(self.ids)}
        return config, to_names(tensors, NAMES)

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        only_known(config, honoured={"token_indices"}, neutral={}, ignored={"init_weights", *SELECTING})
        renamed, paths = from_names(tensors, NAMES, "trainable tokens'")
        return cls.parse({"tokens": config.get("token_indices"), "head": len(paths) > 1}), renamed
