"""What training an adapter costs a device, from first principles: memory, work, and bytes sent. Nothing here was measured on a GPU.

Units: bytes, seconds, floating-point operations (FLOP; a multiplication and an addition are two). P is the parameters of the layers' matrices.
"""

from functools import cache
from typing import Literal, NamedTuple

import torch
import transformers

from trimtab.engine.memory_plan import LEVELS
from trimtab.engine.recompute import Level
from trimtab.methods import Method

Engine = Literal["ddp", "zero1", "zero2", "zero3", "fsdp", "nf4"]
"""Those of `distributed.engine`; nf4 is ddp with a base quantized to 4 bits."""
RANK = 16
CONFIGS = {  # from the config.json of each
    "Qwen2.5-1.5B": {
        "num_hidden_layers": 28, "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "Qwen2.5-7B": {
        "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "Qwen2.5-72B": {
        "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False,
    },
}  # fmt: skip


class Machine(NamedTuple):
    """Devices, and what connects them: 8 H100 SXM a node, 8 network cards of 400 Gb/s."""

    memory: float = 80e9
    planned: float = 0.92
    """Of the memory, what a plan may take (`engine/memory_plan.py`)."""
    besides: float = 2.5e9
    """CUDA's context, buffers of NCCL and cuBLAS, what the allocator loses."""
    flops: float = 0.45 * 989e12
    """Dense bfloat16, and what of it large matrix products reach from end to end."""
    reads: float = 0.9 * 3.35e12
    """From the device's own memory."""
    node: int = 8
    within: float = 0.8 * 450e9
    """Between the devices of a node, in each direction."""
    between: float = 0.8 * 400e9
    """From node to node, all network cards together."""
    delay: float = 30e-6
    """Until a collective begins to send, within a node; as much again between nodes."""


H100 = Machine()
ONE_CARD = H100._replace(between=0.8 * 50e9)
"""With a single network card a node."""


class Shape(NamedTuple):
    """Sizes of a model."""

    layers: int
    hidden: int
    inner: int
    """Of an MLP."""
    heads: int
    queries: int
    """All heads together."""
    keys: int
    vocabulary: int
    total: int
    """Parameters."""
    layer: int
    """Parameters of a layer."""
    adapter: int
    """Parameters of LoRA on all linear layers."""

    @property
    def matrices(self) -> int:
        """Numbers in the matrices of a layer."""
        return 2 * self.hidden * (self.queries + self.keys) + 3 * self.hidden * self.inner

    @property
    def ends(self) -> int:
        """Parameters outside the layers: embedding, head, final norm."""
        return self.total - self.layers * self.layer


@cache
def shape_of(name: str) -> Shape:
    """Counted on the `meta` device: the model's parameters by Transformers, the adapter's by the method's own formula."""
    config = transformers.Qwen2Config(**CONFIGS[name])
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config)
    size = config.hidden_size // config.num_attention_heads
    return Shape(
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        size * config.num_attention_heads,
        size * config.num_key_value_heads,
        config.vocab_size,
        sum(parameter.numel() for parameter in model.parameters()),
        sum(parameter.numel() for parameter in model.model.layers[0].parameters()),
        Method.member("lora")(rank=RANK).parameter_count(model),
    )


def kept_by_a_layer(shape: Shape, level: Level) -> float:
    """Bytes a token that a layer keeps for its backward pass, in 16 bits: what is counted there (tests/test_scale_tables.py).

    The layer's input, queries, keys, values, attention's result, the sum after it, gate and up; LoRA's factors of seven matrices; and,
    in float32, the factors of two norms and of each head's softmax.
    """
    if level == "full":
        return 2 * shape.hidden
    gate_and_up = 2 * shape.inner if level == "none" else 0
    numbers = 2 * shape.hidden + 2 * shape.queries + 2 * shape.keys + gate_and_up
    return 2 * (numbers + 7 * RANK) + 4 * (2 + shape.heads)


def activations(shape: Shape, tokens: int, level: Level, learned: float) -> float:
    """Bytes at the moment at which a pack takes most: a layer's backward pass, with all that other layers still keep."""
    kept = shape.layers * kept_by_a_layer(shape, level)
    layer = kept_by_a_layer(shape, "none") if level == "full" else 0
    passing = 2 * (4 * shape.inner + 4 * shape.hidden)  # gradients of product, gate and up, the product again; of hidden states
    head = learned * (2 + 4) * shape.hidden  # hidden states of tokens that predict, and their gradient, in float32
    return tokens * (kept + layer + passing + head)


def logits(shape: Shape, tokens: float) -> float:
    """Bytes of the tile of logits that is formed at a time (`engine/head.py`), at a moment of its own."""
    from trimtab.engine.head import ROWS, SPLIT_LOGITS, SPLIT_ROWS

    rows = max(ROWS, min(SPLIT_ROWS, SPLIT_LOGITS // shape.vocabulary // ROWS * ROWS))
    return min(rows, tokens) * (2 * shape.vocabulary + 4 * shape.hidden)


def adapter_bytes(engine: Engine, processes: int) -> float:
    """A trained parameter: value, gradient and AdamW's two moments in float32, whole; in zero1 and zero2, DeepSpeed divides moments and a copy
    of the value."""
    return 8 + 12 / processes if engine in ("zero1", "zero2") else 16.0


def full_bytes(shape: Shape, engine: Engine, processes: int, on: Machine = H100) -> float:
    """Weights, gradients and optimizer of `method: full`: a float32 copy of every weight is trained, beside the base in bfloat16.

    fsdp divides matrices of layers and their copies; of the rest, what the optimizer holds. Two layers are gathered in bfloat16; one has a
    gradient, and of two, gradients are added in float32.
    """
    if engine != "fsdp":
        return (2 + adapter_bytes(engine, processes)) * shape.total
    group = min(processes, on.node)
    divided = shape.layers * shape.matrices
    passing = (2 * 2 + 2 + 2 * 4) * shape.layer
    return (2 + 16) / group * divided + (2 + 8 + 8 / group) * (shape.total - divided) + passing


NF4 = 0.5 + (1 + 4 / 256) / 64
"""Bytes a weight: 4 bits, a scale of 8 bits for 64 weights, and one of 32 bits for 256 of those."""


def memory(
    shape: Shape, engine: Engine, processes: int, tokens: int, level: Level, learned: float, on: Machine = H100
) -> float:
    """Bytes a device takes at most.

    Args:
        tokens: Of a pack.
        learned: The share of them that are predicted.
    """
    group = min(processes, on.node)
    layers, ends = 2.0 * shape.layers * shape.layer, 2.0 * shape.ends
    if engine == "nf4":
        base = (
            shape.layers * (NF4 * shape.matrices + 2 * (shape.layer - shape.matrices)) + ends + 2 * shape.hidden * shape.inner
        )
    elif engine == "fsdp":
        base = layers / group + ends + (2 * 2 * shape.layer if group > 1 else 0)  # two layers whole: one computes, one arrives
    elif engine == "zero3":
        base = layers / processes + ends + 2 * 2 * shape.layer
    else:
        base = layers + ends
    at_the_head = logits(shape, learned * tokens) + tokens * shape.layers * kept_by_a_layer(shape, level)
    pack = max(activations(shape, tokens, level, learned), at_the_head)
    return base + adapter_bytes(engine, processes) * shape.adapter + pack + on.besides


def level_that_fits(
    shape: Shape, engine: Engine, processes: int, tokens: int, learned: float, on: Machine = H100
) -> Level | None:
    """The least that is computed again by which it fits; None if nothing helps."""
    fits = (one for one in LEVELS if memory(shape, engine, processes, tokens, one, learned, on) <= on.planned * on.memory)
    return next(fits, None)


def work(shape: Shape, level: Level, learned: float, row: float) -> float:
    """FLOP a token, of rows with so many tokens: forward, backward and what is computed again.

    A frozen matrix costs 2 a number forward and 2 backward, for the gradient of its input. One that is trained, 2 more. A token attends
    to half of its row on average; flash attention's backward pass has 5 products for 2. The head forms logits and their gradient in one
    sweep, for tokens that predict alone.
    """
    pairs = 2 * shape.queries * row  # 2 products, 2 FLOP, half of the row
    forward = shape.layers * (2 * shape.matrices + pairs) + 2 * shape.adapter
    backward = shape.layers * (2 * shape.matrices + 2.5 * pairs) + 4 * shape.adapter
    gate_and_up = 4 * shape.layers * (shape.hidden * shape.inner + RANK * (shape.hidden + shape.inner))
    again = {"none": 0.0, "mlp": gate_and_up, "full": forward}[level]
    return forward + backward + again + learned * 4 * shape.vocabulary * shape.hidden


def all_reduce(size: float, processes: int, on: Machine = H100) -> float:
    """Seconds until every process has the sum: 2 (n − 1) / n of it goes through each one's connection."""
    if processes == 1:
        return 0.0
    across = processes > on.node
    rate = min(on.within, on.between) if across else on.within
    return 2 * (processes - 1) / processes * size / rate + on.delay * (2 if across else 1)


def gather(size: float, processes: int, on: Machine = H100) -> float:
    """Seconds until every process has all of what each holds a part of."""
    rate = on.within if processes <= on.node else min(on.within, on.between)
    return (processes - 1) / processes * size / rate


def exposed_gathers(shape: Shape, tokens: int, processes: int, on: Machine = H100) -> float:
    """Seconds of a pack in which fsdp waits for weights: the first layer's of each pass, and of others what computing does not hide."""
    layer = gather(2 * shape.layer, min(processes, on.node), on)
    hidden = 2 * shape.matrices * tokens / on.flops
    return 2 * (layer + (shape.layers - 1) * max(0.0, layer - hidden))


def hiding_tokens(processes: int, on: Machine = H100) -> float:
    """Tokens of a pack from which computing a layer takes as long as gathering the next one."""
    group = min(processes, on.node)
    return (group - 1) / group * on.flops / on.within


def dequantizing(shape: Shape, level: Level, on: Machine = H100) -> float:
    """Seconds of a pack: each pass reads 4 bits a weight, and writes 16, which its products read."""
    passes = {"none": 2.0, "mlp": 2.6, "full": 3.0}[level]
    return passes * shape.layers * shape.matrices * (NF4 + 2) / on.reads


class StepTime(NamedTuple):
    """Seconds of a step."""

    computing: float
    """Of the mean process."""
    waiting: float
    """Of the mean process, for the one with the most work."""
    sending: float
    """The adapter's gradients, and what gathers of weights add."""

    @property
    def total(self) -> float:
        return sum(self)


def step_time(
    shape: Shape, engine: Engine, processes: int, tokens: float, pack: int, level: Level, learned: float, row: float, busy: float,
    on: Machine = H100,
) -> StepTime:  # fmt: skip
    """
    Args:
        tokens: Of a step, a process.
        pack: Tokens of a pack.
        busy: See `Shares.busy`.
    """
    computing, packs = tokens * work(shape, level, learned, row) / on.flops, tokens / pack
    sending = all_reduce(4 * shape.adapter, processes, on)
    if engine == "fsdp" and processes > 1:
        sending += packs * exposed_gathers(shape, pack, processes, on)
    if engine == "nf4":
        computing += packs * dequantizing(shape, level, on)
    return StepTime(computing, computing / busy - computing, sending)
