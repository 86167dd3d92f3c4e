"""docs/scale.md: its tables are what the code computes, and the code computes what the project's own measures say of small models."""

import random

import pytest
import scale
import torch
import transformers
from accelerators import cuda_backend
from at_scale import costs, shares, speed, tables
from at_scale.costs import Shape
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from trimtab.data import TokenRow
from trimtab.data.pack import pack_all
from trimtab.engine.forward import describe_layers, pack_logprobs, prepare, states_at
from trimtab.engine.memory_plan import LEVELS
from trimtab.engine.memory_probe import Meter, random_pack, training_conditions
from trimtab.engine.recompute import recomputing
from trimtab.methods import Method, attach

SIZES = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2}
BILLIONS = {"Qwen2.5-1.5B": (1.54, 1.31), "Qwen2.5-7B": (7.61, 6.53), "Qwen2.5-72B": (72.7, 70.0)}
"""Parameters, and those that are not embeddings, as the models' cards say."""


def test_the_page_is_current():
    assert scale.page() == scale.PAGE.read_text(encoding="utf-8"), "run: python benchmarks/scale.py tables"


def test_a_table_that_differs_is_noticed():
    text = scale.PAGE.read_text(encoding="utf-8")
    for name in tables.tables():
        assert scale.filled(text, name, "another\n") != text, name
    with pytest.raises(SystemExit, match="no marks for nothing"):
        scale.filled(text, "nothing", "")


@pytest.mark.parametrize("name", costs.CONFIGS)
def test_shapes_are_those_of_the_models(name):
    shape, (total, inside) = costs.shape_of(name), BILLIONS[name]
    assert shape.total / 1e9 == pytest.approx(total, rel=3e-3)
    embeddings = shape.vocabulary * shape.hidden * (1 if costs.CONFIGS[name]["tie_word_embeddings"] else 2)
    assert (shape.total - embeddings) / 1e9 == pytest.approx(inside, rel=5e-3)
    assert shape.ends == embeddings + shape.hidden
    assert shape.layer == shape.matrices + shape.queries + 2 * shape.keys + 2 * shape.hidden  # biases, norms
    sides = 2 * (shape.hidden + shape.queries) + 2 * (shape.hidden + shape.keys) + 3 * (shape.hidden + shape.inner)
    assert shape.adapter == costs.RANK * shape.layers * sides


def small(layers):
    """A model of few layers on `meta`, whose layers are computed by hand, and its shape."""
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_hidden_layers=layers)).to(torch.bfloat16)
    model.requires_grad_(False)
    adapter = attach(model, Method.member("lora")(rank=costs.RANK))
    prepare(model)
    assert all("mlp by hand" in kind for kind in describe_layers(model))
    trained = sum(parameter.numel() for parameter in adapter.parameters().values())
    return model.to("meta"), Shape(layers, 256, 704, 4, 256, 128, 512, 0, 0, trained)


def passed(model, tokens, level, meter, head=False):
    """Both passes of one row, of which every token is predicted, on `meta`, within a meter; what it says between them."""
    device = torch.device("meta")
    pack = random_pack(model, [tokens], 1.0).to(device)
    with training_conditions(model, device), recomputing(level), meter:
        total = (pack_logprobs(model, pack, recompute=level) if head else states_at(model, pack, pack.predicts)).sum()
        between = getattr(meter, "now", None)
        total.backward()
    return between


@pytest.mark.parametrize("level", LEVELS)
def test_what_a_layer_keeps_is_what_is_counted(level):
    with cuda_backend():
        (two, shape), (three, _) = small(2), small(3)
        a_layer = [passed(three, tokens, level, Meter()) - passed(two, tokens, level, Meter()) for tokens in (64, 128)]
    assert costs.kept_by_a_layer(shape, level) == (a_layer[1] - a_layer[0]) / 64
    others = {costs.kept_by_a_layer(shape, other) for other in LEVELS if other != level}
    assert costs.kept_by_a_layer(shape, level) not in others


class Products(TorchDispatchMode):
    """Counts the FLOP of products of matrices but attention's: torch's own counter leaves out `addmm_`."""

    def __init__(self):
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = [argument for argument in args if isinstance(argument, torch.Tensor)][-2:]
            self.flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        else:
            assert not any(word in name for word in ("mm", "matmul", "dot", "conv", "einsum")), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("level", LEVELS)
def test_work_is_what_is_counted(level):
    def products(model, head=False):
        passed(model, 64, level, counter := Products(), head)
        return counter.flop

    def attention(model):
        passed(model, 64, level, counter := FlopCounterMode(display=False))
        return sum(count for op, count in counter.get_flop_counts()["Global"].items() if "attention" in str(op))

    def expected(one, learned, row):
        return 64 * costs.work(one, level, learned, row)

    with cuda_backend():
        (two, shape), (three, more) = small(2), small(3)
        assert products(three) - products(two) == expected(more, 0.0, 0.0) - expected(shape, 0.0, 0.0)
        assert products(two, head=True) - products(two) == expected(shape, 1.0, 0.0) - expected(shape, 0.0, 0.0)
        half = attention(two) / 2  # all pairs are counted, and a causal mask leaves half of them
        assert half == expected(shape, 0.0, 64.0) - expected(shape, 0.0, 0.0)
        assert half > 0


@pytest.mark.parametrize("processes", [2, 3, 8, 16])
def test_what_a_sum_sends_is_what_a_ring_sends(processes):
    """Chunks go around a ring, added up, and then around again, whole."""
    size, sent = 48 * processes, [0] * processes
    values = [[float(rank * size + n) for n in range(size)] for rank in range(processes)]
    wanted = [sum(column) for column in zip(*values, strict=True)]
    chunk = size // processes
    for turn in range(2 * (processes - 1)):
        moved = []
        for rank in range(processes):
            part = (rank - turn) % processes if turn < processes - 1 else (rank + 1 - (turn - processes + 1)) % processes
            moved.append((rank, slice(part * chunk, (part + 1) * chunk)))
        for rank, part, data in [(rank, part, values[rank][part]) for rank, part in moved]:
            to = values[(rank + 1) % processes]
            to[part] = [a + b for a, b in zip(to[part], data, strict=True)] if turn < processes - 1 else data
            sent[rank] += len(data)
    assert all(one == wanted for one in values)
    on = costs.H100._replace(delay=0.0, between=1.0, within=1.0)
    assert {costs.all_reduce(size, processes, on)} == set(sent)
    assert costs.gather(size, processes, on) == sent[0] / 2  # the second time around
    assert costs.all_reduce(size, 1) == 0.0


def test_memory_is_the_sum_of_its_parts():
    """Worked by hand for the 7B model."""
    shape = costs.shape_of("Qwen2.5-7B")
    weights, adapter = 15.231, 0.6459  # GB: 7.616 G of 2 bytes, 40.37 M of 16
    kept, passing = 28 * 106_866e-9, (8 * 18_944 + 8 * 3_584 + 3 * 3_584) * 1e-9  # MB a token
    expected = weights + adapter + 4096 * (kept + passing) + 2.5
    assert costs.memory(shape, "ddp", 8, 4096, "none", 0.5) / 1e9 == pytest.approx(expected, rel=1e-3)
    smaller = costs.memory(shape, "fsdp", 8, 4096, "none", 0.5) / 1e9
    assert expected - smaller == pytest.approx(13.051 * 7 / 8 - 2 * 0.4661, rel=1e-3)  # layers, but for two that are whole
    assert costs.memory(shape, "fsdp", 64, 4096, "none", 0.5) / 1e9 == smaller  # within a node
    ddp, zero2 = (costs.memory(shape, engine, 4, 4096, "none", 0.5) for engine in ("ddp", "zero2"))
    assert ddp - zero2 == pytest.approx(40.37e6 * (16 - 8 - 12 / 4), rel=1e-3)
    four_bits = costs.memory(shape, "nf4", 8, 4096, "none", 0.5) / 1e9
    assert expected - four_bits == pytest.approx(28 * 0.23304 * (2 - 4.127 / 8) - 2 * 3584 * 18_944 / 1e9, rel=2e-3)


def test_memory_of_full_fine_tuning_in_shares():
    """Worked by hand for the 7B model on 8 GPUs: 6.525 G of its 7.616 G parameters are matrices of layers."""
    shape = costs.shape_of("Qwen2.5-7B")
    divided, whole, layer = 18 / 8 * 6.5251, (2 + 8 + 8 / 8) * (7.6156 - 6.5251), 14 * 0.23306
    assert costs.full_bytes(shape, "fsdp", 8) / 1e9 == pytest.approx(divided + whole + layer, rel=1e-3)
    assert costs.full_bytes(shape, "fsdp", 64) == costs.full_bytes(shape, "fsdp", 8)  # within a node
    assert costs.full_bytes(shape, "ddp", 8) == 18 * shape.total


def rows_of(lengths):
    draw = random.Random(1)
    return [TokenRow([draw.randrange(50_000) for _ in range(n + 1)], [n], f"row {number}") for number, n in enumerate(lengths)]


@pytest.mark.parametrize("processes", [2, 5])
@pytest.mark.parametrize("tokens", [600, 1024, 3000])
def test_packs_are_those_of_the_data(tokens, processes):
    lengths = shares.made_up_lengths(64, 5)
    ours = sorted(sorted(pack) for pack in shares.packs_of(lengths, tokens, processes))
    made = pack_all(rows_of(lengths), tokens, share=False, processes=processes)
    theirs = sorted(sorted(len(row.ids) - 1 for row in pack.rows) for pack in made)
    assert ours == theirs


def test_made_up_lengths_are_what_the_page_says():
    lengths = [length for seed in range(20) for length in shares.made_up_lengths(1000, seed)]
    assert sum(lengths) / len(lengths) == pytest.approx(tables.MEAN, abs=2)
    assert sum(length**2 for length in lengths) / sum(lengths) == pytest.approx(tables.ROW, rel=0.02)
    assert sorted(lengths)[len(lengths) // 2] == pytest.approx(134, abs=2)


def test_shares_are_those_of_the_busiest():
    assert shares.share_out([5, 4, 3, 3], 2) == [8, 7]
    assert shares.shares_of([100] * 8, 4, 200, float) == shares.Shares(1.0, 4, 0)
    assert shares.shares_of([300, 100, 100], 2, 300, float) == shares.Shares(pytest.approx(250 / 300), 2, 0)
    assert shares.shares_of([100] * 2, 4, 100, float) == shares.Shares(0.5, 2, 2)
    assert shares.shares_of([100] * 12, 2, 400, float) == shares.Shares(1.0, 4, 0)
    assert shares.shares_of([100] * 12, 2, 400, float, even=False) == shares.Shares(0.75, 3, 0)
    assert shares.mean_shares([[100] * 12, [100]], 2, 400, float) == shares.Shares(1300 / 1400, 2.5, 0.5)


def test_what_the_page_says_in_short():
    shape, on = costs.shape_of("Qwen2.5-7B"), costs.H100
    step = tables.TOKENS * costs.work(shape, "none", tables.LEARNED, tables.ROW) / on.flops
    assert costs.all_reduce(4 * shape.adapter, 64) / step == pytest.approx(0.001, rel=0.1)  # "0.1 % of its time"
    assert costs.hiding_tokens(8) == pytest.approx(1100, rel=0.02)
    assert tables.reading_tokens() == pytest.approx(150, rel=0.02)
    assert 8 * shape.adapter == pytest.approx(0.3e9, rel=0.1)  # what zero1 and zero2 save at most
    large = costs.shape_of("Qwen2.5-72B")
    fits = {n: costs.level_that_fits(large, "fsdp", n, tables.PACK, tables.LEARNED) for n in (2, 4)}
    assert fits == {2: None, 4: "full"}  # "from 4 GPUs on"
    assert costs.level_that_fits(large, "nf4", 1, tables.PACK, tables.LEARNED) is not None
    assert costs.gather(2.0 * large.layers * large.layer, 16, costs.ONE_CARD) > 1  # zero3: "seconds a pack"
    short = {n: tables._shares(64, n, tables.LARGEST, 10).busy for n in (8, 64)}
    assert short == {8: pytest.approx(0.95, abs=0.01), 64: pytest.approx(0.2, abs=0.02)}


def test_runs_are_compared_by_the_same_steps():
    alone = {"lines": [{"tokens": 100, "took": 4.0, "loss": 2.0}, {"tokens": 300, "took": 4.0, "loss": 1.0}]}
    halved = [{**line, "took": line["took"] / 2, "waited": 0.3, "loss": line["loss"] * (1 + 1e-6)} for line in alone["lines"]]
    found = speed.compared(alone, {"lines": halved}, 0.1)
    assert (found["alone"], found["together"], found["ratio"]) == (50.0, 100.0, 2.0)
    assert found["sending"] == pytest.approx(0.2 / 4)
    assert found["waiting"] == pytest.approx((0.6 - 0.2) / 4)
    assert found["losses_apart"] == pytest.approx(1e-6, rel=1e-3)
    with pytest.raises(SystemExit, match="not trained on the same examples"):
        speed.compared(alone, {"lines": [*reversed(halved)]}, 0.1)
