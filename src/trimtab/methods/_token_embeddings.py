"""Trainable rows of the input and output embeddings (the head), for some tokens, new ones too.

Shapes: n tokens with rows of their own, V vocabulary of the base, d hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.attention_hook import current_layout
from trimtab.core.errors import DataError, RecipeError, UnsupportedModel
from trimtab.methods import AdapterLayer, Sample, base_modules, trainable_dtype, unwrap, with_weight
from trimtab.methods._matrices import embedding_and_head_shapes


class TokenEmbeddings(AdapterLayer):
    """Rows of a table for some tokens: in place of the base's or, for ids from V on, after them."""

    ids: Tensor
    """n."""
    rows: nn.Parameter
    """n × d."""
    size: int
    """How many tokens there are with these, at least V."""

    def __init__(self, base: Any, ids: Sequence[int], new: Sequence[int] = ()) -> None:
        """`new` are those ids that the base need not have."""
        super().__init__(base)
        self.tokens, self.vocabulary = tuple(ids), len(base.weight)
        if missing := [token for token in ids if token >= self.vocabulary and token not in new]:
            raise RecipeError(f"tokens: {missing[0]} is no token: this model has {self.vocabulary:,}, numbered from 0.")
        self.size = max(self.vocabulary, *(token + 1 for token in ids), 0)
        self.register_buffer("ids", torch.tensor(ids, dtype=torch.long, device=base.weight.device), persistent=False)
        rows = base.weight.detach()[self.ids.clamp(max=self.vocabulary - 1)].to(trainable_dtype(base.weight))
        self.rows = nn.Parameter(rows)

    @property
    def weight(self) -> Tensor:
        """The base's own rows: V × d."""
        weight = unwrap(self.base).weight
        assert isinstance(weight, Tensor)
        return weight

    @torch.no_grad()
    def table(self) -> Tensor:
        """All rows, the base's and these: at least V × d."""
        padded = F.pad(self.weight.to(self.rows.dtype), (0, 0, 0, self.size - self.vocabulary))
        return padded.index_copy(0, self.ids, self.rows)


class InputEmbeddings(TokenEmbeddings):
    """Token t's embedding is its row here if it has one, else the base's."""

    def __init__(self, base: Any, ids: Sequence[int], new: Sequence[int] = ()) -> None:
        super().__init__(base, ids, new)
        probe = torch.arange(2, device=base.weight.device)
        if not base.weight.is_meta and not torch.equal(base(probe), self._scaled(base.weight[probe])):
            raise UnsupportedModel(
                f"{type(base).__name__} does more than look embeddings up, so rows of its table do not suffice."
            )

    def forward(self, ids: Tensor) -> Tensor:
        return self._look_up(ids) if self.switch.state is False else super().forward(ids)

    def adapt(self, ids: Tensor) -> Tensor:
        same = ids[..., None] == self.ids  # … n
        has_row = same.any(-1)
        y = self._look_up(ids.masked_fill(has_row, 0))
        rows = F.embedding(same.int().argmax(-1), self.rows)
        return torch.where(has_row[..., None], self._scaled(rows.to(y.dtype)), y)

    def _scaled(self, rows: Tensor) -> Tensor:
        """Gemma 3 multiplies by √d as it looks up."""
        scale = getattr(unwrap(self.base), "embed_scale", None)
        if scale is None:
            return rows
        scale = scale if isinstance(scale, Tensor) else torch.full((), scale, device=rows.device)
        return rows * scale.to(rows.device, rows.dtype)

    def _look_up(self, ids: Tensor) -> Tensor:
        """By the base, or by another adapter below, which may have these tokens."""
        largest = getattr(current_layout(), "largest_id", None)  # known where nobody has to wait for it
        known = largest is not None and largest < self.vocabulary
        if not known and not isinstance(self.base, AdapterLayer) and bool((ids >= self.vocabulary).any()):
            raise DataError(
                f"A text holds token {int(ids.max())}, which an adapter added to the tokenizer; the base has no embedding for it, "
                "and that adapter does not act here."
            )
        return self.base(ids)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        merged: Any = with_weight(self.base, lambda _: self.table().T)
        merged.num_embeddings = self.size
        return merged


class OutputEmbeddings(TokenEmbeddings):
    """The logit of token t is row · h, in place of the base's; of ids from V on after them, and −∞ where no token has an id between."""

    inside: Tensor
    """Which of these tokens the base has …"""
    beyond: Tensor
    """… and which it has not."""

    def __init__(self, base: Any, ids: Sequence[int], new: Sequence[int] = ()) -> None:
        super().__init__(base, ids, new)
        self.divide(self.tokens)

    def divide(self, tokens: Sequence[int]) -> None:
        """Note which of these, its tokens, the base has."""
        for name, has in (("inside", True), ("beyond", False)):
            numbers = [n for n, token in enumerate(tokens) if (token < self.vocabulary) == has]
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.long, device=self.ids.device), persistent=False)

    def adapt(self, x: Tensor) -> Tensor:
        y = self.base(x)
        known = self.ids.index_select(0, self.inside)
        # The difference from the base's row, and not the row, so that an untrained row adds exactly zero.
        change = self.rows.index_select(0, self.inside) - self.weight.index_select(0, known)
        y = y.index_add(-1, known, F.linear(x, change.to(x.dtype)).to(y.dtype))
        if self.size == self.vocabulary:
            return y
        y = F.pad(y, (0, max(0, self.size - y.shape[-1])), value=float("-inf"))
        beyond, rows = (t.index_select(0, self.beyond) for t in (self.ids, self.rows))
        return y.index_copy(-1, beyond, F.linear(x, rows.to(x.dtype)).to(y.dtype))

    @torch.no_grad()
    def merge(self) -> nn.Module:
        merged: Any = with_weight(self.base, lambda _: self.table())
        merged.out_features = self.size
        if merged.bias is not None:
            merged.bias = nn.Parameter(F.pad(merged.bias, (0, self.size - self.vocabulary)), requires_grad=False)
        return merged


def embedding_and_head(model: nn.Module) -> tuple[str, str, bool]:
    """The paths of the embeddings and of the head, and whether they are tied. Raises UnsupportedModel if they are not tables."""
    own = base_modules(model)
    paths = list(embedding_and_head_shapes(model))
    embeddings = [path for path in paths if isinstance(own[path], nn.Embedding)]
    heads = [path for path in paths if isinstance(own[path], nn.Linear)]
    if (len(embeddings), len(heads)) != (1, 1):
        raise UnsupportedModel(f"{type(model).__name__} does not have exactly one embedding table and one head matrix.")
    return embeddings[0], heads[0], own[embeddings[0]].weight is own[heads[0]].weight


def tie_head(layers: dict[str, AdapterLayer]) -> None:
    """Share the tokens and rows of the embeddings with the head, as one parameter, if the base's are tied."""
    embeddings, *heads = layers.values()
    for head in heads:
        assert isinstance(embeddings, TokenEmbeddings)
        assert isinstance(head, OutputEmbeddings)
        if head.weight is embeddings.weight:
            head.ids, head.rows, head.size = embeddings.ids, embeddings.rows, embeddings.size
            head.divide(embeddings.tokens)


def initialize_new(new: Mapping[str, int | None], layers: dict[str, AdapterLayer], sample: Sample) -> None:
    """Set the row of each new token to the mean of those of the tokens that its text was encoded as before.

    Its logit is then the mean of theirs, so by Jensen's inequality it is no more likely than they are on average: it takes
    hardly any probability from the other tokens. Raises RecipeError.
    """
    for text, token in new.items():
        if sample.pieces is None:
            raise RecipeError(f"new: {text!r} starts as the tokens that it was, and needs sample=trimtab.sample(base, rows).")
        pieces = sample.pieces(text)
        for layer in layers.values():
            assert isinstance(layer, TokenEmbeddings)
            layer.rows[layer.ids == token] = layer.weight[torch.tensor(pieces)].to(layer.rows.dtype).mean(0)


def single_token_id(text: str, encode: Callable[[str], list[int]] | None, advice: str) -> int:
    """The id of a text that is one token. Raises RecipeError, with advice, if it is not."""
    if encode is None:
        raise RecipeError(f"{text!r} needs a tokenizer to become a token: attach(…, sample=trimtab.sample(base, rows)).")
    if len(ids := encode(text)) != 1:
        raise RecipeError(f"{text!r} is {len(ids)} tokens of this tokenizer, and must be one: {advice}.")
    return ids[0]
