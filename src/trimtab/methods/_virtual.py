"""What the methods that put virtual tokens before every row have in common: prefixes and prompts.

P virtual tokens stand at positions 0 to P-1 and a row begins at position P, as if it had P tokens more. They are joined to
the row inside attention, as keys and values, and nowhere else: so they act in any forward pass, packed or padded, with
activation recomputation and on a quantized base, and in decoding from Trimtab's cache and from Transformers' alike. A layer with a
sliding window sees them as it sees any token, while they are near enough.

Shapes: P virtual tokens, L attention layers, G key-value heads, K head size, d hidden size.
"""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from trimtab.core.attention_hook import Layout, Rules, Virtual, attend, causal, laid_out, refuse_reentrant
from trimtab.core.errors import ArtifactError, RecipeError, UnsupportedModel
from trimtab.core.wrapping import modules, unwrap
from trimtab.methods._base import AdapterLayer, Method, Sample
from trimtab.methods._peft import only_known
from trimtab.methods._switch import Routing, only

KeysValues = Sequence[tuple[Tensor, Tensor]]
"""Of each attention layer: keys and values, each G P K."""

_SIZES = {"token_dim", "num_attention_heads", "num_layers"}
"""Keys of PEFT's configurations that are sizes of the base, which the saved table's shape says again."""
_ONE_ROW = "Two adapters with virtual tokens cannot act on one row: switch one of them off."


class VirtualTokens(Method):
    """The part of the hyperparameters that prefixes and prompts share."""

    mergeable: ClassVar[bool] = False
    identity_at_init: ClassVar[bool] = False

    table_name: ClassVar[str]
    """What the only parameter is called, once folded: a row of numbers for each virtual token."""
    as_folded: ClassVar[dict[str, Any]] = {}
    """Hyperparameters of what has been folded."""
    of_peft: ClassVar[dict[str, Any]] = {}
    """What PEFT's configuration says of how the table is made. It does not change what an adapter that was saved computes."""

    tokens: Annotated[int, Field(ge=1)] = 20
    """How many virtual tokens stand before every row. Each takes one of the model's positions."""
    init: Literal["text", "random", "zero"] = "text"
    """What they start as: real text (by far the best), random numbers, or zeros."""
    text: Annotated[str, Field(min_length=1)] | None = None
    """The text that they start as, repeated or cut to fit; the beginning of the training rows unless given."""

    @property
    def positions(self) -> int:
        return self.tokens

    def sites(self, model: Any) -> list[str]:
        trunk = unwrap(model.base_model)
        return [path for path, module in modules(model).items() if module is trunk and path]

    def text_ids(self, sample: Sample) -> list[int]:
        """The tokens of real text that the virtual tokens start as: P. Raises RecipeError if there is none."""
        if self.text is not None:
            if sample.encode is None:
                raise RecipeError("text: needs a tokenizer to become tokens: attach(…, sample=Sample(encode=…)).")
            found = sample.encode(self.text)
        else:
            found = [token for row in sample.rows for token in row][: self.tokens]
        if not found:
            raise RecipeError(
                f"{self.name} starts from real text, and there is none: give attach(…, sample=Sample(rows=…)) or text, or init: random."
            )
        return (found * -(-self.tokens // len(found)))[: self.tokens]

    def folded(self, layers: dict[str, AdapterLayer]) -> tuple[Method, dict[str, Tensor]]:
        ((path, layer),) = layers.items()
        assert isinstance(layer, VirtualLayer)
        return self.model_copy(update=self.as_folded), {f"{path}.{self.table_name}": layer.table()}

    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        (table,) = tensors.values()
        config = {"peft_type": self.peft_type, "task_type": "CAUSAL_LM", "inference_mode": True}
        sizes = {"num_virtual_tokens": self.tokens, "num_transformer_submodules": 1}  # PEFT knows the others by the base
        return {**config, **sizes, **self.of_peft}, {"prompt_embeddings": table}

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        only_known(
            config,
            honoured={"num_virtual_tokens"},
            neutral={"num_transformer_submodules": (1,)},
            ignored=_SIZES | cls.of_peft.keys(),
        )
        if list(tensors) != ["prompt_embeddings"]:
            raise ArtifactError(
                f"adapter_model.safetensors holds {', '.join(tensors) or 'nothing'}, where virtual tokens are prompt_embeddings alone."
            )
        return cls.parse({"tokens": config.get("num_virtual_tokens"), **cls.as_folded}), {
            cls.table_name: tensors["prompt_embeddings"]
        }


class Shape(NamedTuple):
    """The size of what attention sees of a token, equal in every layer."""

    layers: int
    heads: int
    """Key-value heads, G."""
    size: int
    """Of a head, K."""

    @property
    def numbers(self) -> int:
        """In all keys and values of one token: L · 2 · G · K."""
        return self.layers * 2 * self.heads * self.size


def attention_shape(model: Any) -> Shape:
    """By the model's configuration. Raises UnsupportedModel if its layers differ."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if isinstance(groups, list | tuple):
        raise UnsupportedModel(f"{type(model).__name__} has layers of different sizes, which one prefix does not fit.")
    return Shape(config.num_hidden_layers, groups, size)


def number_type(base: nn.Module) -> torch.dtype:
    """Of what is trained: the base's, but at least float32."""
    trunk: Any = unwrap(base)
    return torch.promote_types(trunk.dtype, torch.float32)


class VirtualLayer(AdapterLayer):
    """The model's trunk with virtual tokens before every row."""

    count: int
    """P."""

    @abstractmethod
    def table(self) -> Tensor:
        """The numbers that are trained, or what is made of them, a row for each virtual token."""

    @abstractmethod
    def start_as(self, table: Tensor) -> None:
        """Make `table` return this."""

    @abstractmethod
    def keys_values(self) -> KeysValues:
        """What attention sees of the virtual tokens."""

    def adapt(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return self._run(None, input_ids, **kwargs)

    def route(self, routing: Routing, input_ids: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        owned = [owner is self.switch for owner in routing.owners]
        return self._run(owned, input_ids, **kwargs) if any(owned) else self.base(input_ids, **kwargs)

    def _run(
        self,
        owned: list[bool] | None,
        input_ids: Tensor | None,
        *,
        position_ids: Tensor | None = None,
        layout: Layout | None = None,
        virtual: tuple[Virtual, ...] = (),
        **kwargs: Any,
    ) -> Any:
        if layout is not None:
            kwargs["layout"] = layout
            if layout.continues:
                return self.base(input_ids, position_ids=position_ids, **kwargs)
        if virtual and owned is None:
            raise RecipeError(_ONE_ROW)
        if position_ids is None:
            position_ids = _positions(input_ids if input_ids is not None else kwargs["inputs_embeds"], kwargs)
        shift = self.count if owned is None else self.count * torch.tensor(owned, device=position_ids.device)
        with only(self.switch) if owned is not None else nullcontext():
            mine = Virtual(self.keys_values(), acts_on=owned.__getitem__ if owned is not None else None)
        out = self.base(input_ids, position_ids=position_ids + shift, virtual=(*virtual, mine), **kwargs)
        mine.check_reached(type(self.base).__name__)
        return out

    def attended(self, ids: Tensor | None = None, embeddings: Tensor | None = None) -> KeysValues:
        """What the layers of the base attend to of tokens (P) or embeddings (P d) at positions 0 to P-1, differentiably."""
        keeping = _Keeping()
        base: Any = unwrap(self.base)
        given = {"input_ids": ids[None]} if embeddings is None else {"inputs_embeds": embeddings[None].to(base.dtype)}  # type: ignore[index]
        positions = torch.arange(self.count, device=next(self.base.parameters()).device)[None]
        with laid_out():
            self.base(**given, position_ids=positions, layout=keeping, use_cache=False)
        if not keeping.reached:
            raise UnsupportedModel(
                f"{type(self.base).__name__} does not hand keywords of forward on to attention, so virtual tokens cannot reach it."
            )
        kept = [(key[0], value[0]) for _, (key, value) in sorted(keeping.kept.items())]
        if embeddings is not None and embeddings.requires_grad and torch.is_grad_enabled() and not kept[0][0].requires_grad:
            refuse_reentrant()
        return kept

    def __getattr__(self, name: str) -> Any:
        """What the model asks its trunk for besides calling it (`embed_tokens`, `get_input_embeddings`, …), the base answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


def _positions(tokens: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Where these tokens stand in their rows, if nobody says: padding is not counted, and what a cache has stands before them."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    past = cache.get_seq_length() if cache is not None else 0
    return torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]


class _Keeping:
    """The layout of one run of tokens, whose keys and values are kept."""

    continues = False

    def __init__(self) -> None:
        self.reached = False
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, rules: Rules, virtual: Sequence[Virtual]
    ) -> Tensor:
        if virtual:
            raise RecipeError(_ONE_ROW)
        self.reached = True
        self.kept[int(layer.layer_idx)] = (key, value)  # type: ignore[arg-type]
        seen = causal(query.shape[2], key.shape[2], rules.window, query.device)
        return attend(query, key, value, seen, rules).transpose(1, 2)
