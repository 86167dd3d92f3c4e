"""Methods with virtual tokens before every example: prompts, whose input embeddings are trained, and prefixes, whose keys and values are.

Shapes: P virtual tokens, d embedding size, L attention layers, G key-value heads, K head size (V of values). The table that is
saved, as PEFT saves it, is P × d of prompts and P × (L · 2 · G · K) of prefixes; where layers differ, P × Σ G · (K + V).
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from trimtab.core.errors import ArtifactError, RecipeError, UnsupportedModel
from trimtab.core.stateful import carries_state
from trimtab.methods import AdapterLayer, Method, Sample, base_modules, check_peft_config, trainable_dtype, unwrap
from trimtab.methods._attention_shape import attention_shape, called_trunk
from trimtab.methods._virtual_layer import KeysValues, VirtualLayer

_SIZE_KEYS = {"token_dim", "num_attention_heads", "num_layers"}
"""Keys of PEFT's configurations that are sizes of the base, which the saved table's shape says again."""


class VirtualTokens(Method):
    """The hyperparameters that prompts and prefixes share."""

    mergeable: ClassVar[bool] = False
    identity_at_init: ClassVar[bool] = False

    table_name: ClassVar[str]
    """The name of the only tensor that is saved: the numbers of each virtual token."""
    inference_settings: ClassVar[dict[str, Any]] = {}
    """Hyperparameters of a saved adapter, whose table is no longer made by a network."""
    peft_table_settings: ClassVar[dict[str, Any]] = {}
    """What PEFT's configuration says of how the table is made. It does not change what a saved adapter computes."""

    tokens: Annotated[int, Field(ge=1)] = 20
    """How many virtual tokens stand before every example. Each takes one of the model's positions."""
    init: Literal["text", "random", "zero"] = "text"
    """Their initial values: real text (by far the best), random numbers, or zeros."""
    text: Annotated[str, Field(min_length=1)] | None = None
    """The text that they start as, repeated or cut to fit; by default the beginning of the training examples."""

    @property
    def virtual_token_count(self) -> int:
        return self.tokens

    def sites(self, model: Any) -> list[str]:
        trunk = called_trunk(model)
        return [path for path, module in base_modules(model).items() if module is trunk and path]

    def text_ids(self, sample: Sample) -> list[int]:
        """The tokens of real text that the virtual tokens start as: P. Raises RecipeError if there is none."""
        if self.text is not None:
            if sample.encode is None:
                raise RecipeError("text: needs a tokenizer to become tokens: attach(…, sample=Sample(encode=…)).")
            ids = sample.encode(self.text)
        else:
            ids = [token for row in sample.rows for token in row][: self.tokens]
        if not ids:
            raise RecipeError(
                f"{self.name} starts from real text, and there is none: give attach(…, sample=Sample(rows=…)) or text, or init: random."
            )
        return (ids * -(-self.tokens // len(ids)))[: self.tokens]

    def to_inference_form(self, layers: dict[str, AdapterLayer]) -> tuple[Method, dict[str, Tensor]]:
        ((path, layer),) = layers.items()
        assert isinstance(layer, VirtualLayer)
        return self.model_copy(update=self.inference_settings), {f"{path}.{self.table_name}": layer.table()}

    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        (table,) = tensors.values()
        sizes = {"num_virtual_tokens": self.tokens, "num_transformer_submodules": 1}  # PEFT knows the others by the base
        return self.peft_config(**sizes, **self.peft_table_settings), {"prompt_embeddings": table}

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        check_peft_config(
            config,
            {"num_virtual_tokens"},
            {"num_transformer_submodules": (1,)},
            ignored=_SIZE_KEYS | cls.peft_table_settings.keys(),
        )
        if list(tensors) != ["prompt_embeddings"]:
            raise ArtifactError(
                f"adapter_model.safetensors holds {', '.join(tensors) or 'nothing'}, where virtual tokens are prompt_embeddings alone."
            )
        method = cls.parse({"tokens": config.get("num_virtual_tokens"), **cls.inference_settings})
        return method, {cls.table_name: tensors["prompt_embeddings"]}


class Prompts(VirtualTokens):
    """The part that prompt tuning and P-tuning share."""

    table_name: ClassVar[str] = "embeddings"

    def sites(self, model: Any) -> list[str]:
        """Raises UnsupportedModel for a model with layers that carry state."""
        if carries_state(model):
            raise UnsupportedModel(
                f"{type(model).__name__} has layers that carry state, which the tokens of a prompt would have to set. Use a prefix, which "
                "is defined by attention alone, or a method that changes weights, such as lora."
            )
        return super().sites(model)

    init: Literal["text", "random"] = "text"
    """Their initial values: real text (by far the best), or tokens drawn at random."""

    def initialize(self, model: Any, layers: dict[str, AdapterLayer], sample: Sample) -> None:
        (layer,) = layers.values()
        assert isinstance(layer, PromptLayer)
        embed = model.get_input_embeddings()
        vocabulary = unwrap(embed).num_embeddings
        ids = self.text_ids(sample) if self.init == "text" else torch.randint(vocabulary, (self.tokens,)).tolist()  # type: ignore[call-overload]
        layer.set_table(embed(torch.tensor(ids, device=next(embed.parameters()).device)))


class PromptLayer(VirtualLayer):
    """A trunk that runs on virtual embeddings before every row; subclasses say what makes these, P × d."""

    def __init__(self, base: nn.Module, count: int) -> None:
        super().__init__(base, count, embedding_size(base))

    def keys_values(self) -> KeysValues:
        return self.compute_keys_values(embeddings=self.table())


class DirectPrompt(PromptLayer):
    """Embeddings that are trained themselves."""

    def __init__(self, base: nn.Module, count: int) -> None:
        super().__init__(base, count)
        self.embeddings = nn.Parameter(torch.zeros(count, self.numbers, dtype=trainable_dtype(base)))

    def table(self) -> Tensor:
        return self.embeddings


class Prefixes(VirtualTokens):
    """The part that prefix tuning and P-tuning v2 share."""

    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    table_name: ClassVar[str] = "keys_and_values"
    peft_table_settings: ClassVar[dict[str, Any]] = {
        "prefix_projection": False,
        "encoder_hidden_size": None,
        "init_weights": None,
    }

    def numbers(self, model: nn.Module) -> int:
        """Of the table, for each virtual token."""
        return attention_shape(called_trunk(model)).numbers

    def to_peft(self, model: Any, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT has prefixes for models whose layers are all alike."""
        config, renamed = super().to_peft(model, tensors)
        alike = attention_shape(called_trunk(model)).is_uniform(model.config.get_text_config().num_hidden_layers)
        return config if alike else self.trimtab_only_config() | {"num_virtual_tokens": self.tokens}, renamed

    def initialize(self, model: nn.Module, layers: dict[str, AdapterLayer], sample: Sample) -> None:
        (layer,) = layers.values()
        assert isinstance(layer, PrefixLayer)
        if self.init == "text":
            ids = torch.tensor(self.text_ids(sample), device=next(layer.base.parameters()).device)
            parts = [t.transpose(0, 1).flatten(1) for pair in layer.compute_keys_values(ids).values() for t in pair]
            layer.set_table(torch.cat(parts, dim=1))
        elif self.init == "zero":
            layer.set_table(torch.zeros(layer.count, layer.numbers))


class PrefixLayer(VirtualLayer):
    """A trunk with keys and values before every row; subclasses say what makes their table, P × Σ G · (K + V)."""

    def __init__(self, base: nn.Module, count: int) -> None:
        shape = attention_shape(base)
        super().__init__(base, count, shape.numbers)
        self.shape = shape

    def keys_values(self) -> KeysValues:
        parts = iter(self.table().split(self.shape.widths, dim=1))

        def heads(count: int) -> Tensor:
            return next(parts).unflatten(1, (count, -1)).transpose(0, 1)  # G P K

        return {number: (heads(layer.heads), heads(layer.heads)) for number, layer in self.shape.layers.items()}


class DirectPrefix(PrefixLayer):
    """Keys and values that are trained themselves."""

    def __init__(self, base: nn.Module, count: int) -> None:
        super().__init__(base, count)
        self.keys_and_values = nn.Parameter(0.02 * torch.randn(count, self.numbers, dtype=trainable_dtype(base)))

    def table(self) -> Tensor:
        return self.keys_and_values


class NetworkTable(VirtualLayer):
    """table = start + f(E W₁ᵀ + b₁) W₂ᵀ + b₂, made by a network. Where it starts as real text, W₂ and b₂ are zero at first."""

    start: Tensor

    def add_network(self, width: int, f: Callable[[Tensor], Tensor], *, lstm: bool = False) -> None:
        """Draw the network's parameters: hidden layers of this width; with an LSTM over the virtual tokens before them."""
        dtype, self.activation = trainable_dtype(self.base), f
        self.embedded = nn.Parameter(torch.randn(self.count, width, dtype=dtype))
        self.lstm = nn.LSTM(width, width, bidirectional=True, dtype=dtype) if lstm else None
        self.hidden = nn.Linear(2 * width if lstm else width, width, dtype=dtype)
        self.out = nn.Linear(width, self.numbers, dtype=dtype)
        self.register_buffer("start", torch.zeros(self.count, self.numbers, dtype=dtype))

    def table(self) -> Tensor:
        return self.start + self.out(self.activation(self.hidden(self.read())))

    def read(self) -> Tensor:
        """E: the embeddings, or an LSTM's output for them."""
        if self.lstm is None:
            return self.embedded
        with torch.backends.cudnn.flags(
            enabled=False
        ):  # cuDNN's LSTM has gradients in training mode alone, not always the same
            return self.lstm(self.embedded)[0]

    def set_table(self, table: Tensor) -> None:
        self.start.copy_(table)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)


def embedding_size(model: Any) -> int:
    """d."""
    return int(unwrap(model.get_input_embeddings()).embedding_dim)  # type: ignore[arg-type]
