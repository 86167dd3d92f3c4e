"""Attention over trees by each way that accelerators have: all give what a softmax over all keys gives."""

import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerators import cuda_backend
from families import exact_norms, method_of, perturb, tiny
from test_fused_layers import SAMPLE, assert_equal, both, counted, learned, rows
from test_tree_attention import CASES, FLAT, Case, differences, drawn, ours
from torch.utils._python_dispatch import TorchDispatchMode
from varlen import VarlenOperations

from trimtab.core.attention import AttentionCall, Rules, Virtual
from trimtab.data import pack_tree
from trimtab.data.prefix_tree import Segment, lay_out
from trimtab.engine import tree_attention
from trimtab.engine.backends import AttentionInputs, AttentionPlan, Heads, flash, paths, probing, segments, ways
from trimtab.engine.layouts import PackLayout
from trimtab.engine.operations import join_columns
from trimtab.methods import Sample, attach
from trimtab.methods.lora import LoRA

SMALL = [
    "a row alone", "a tree", "virtual tokens and a window", "neighbours rotated", "sinks, virtual tokens and a window",
    "chunks and virtual tokens",
]  # fmt: skip
FLASH, EFFICIENT = (next(way for way in ways.WAYS if way.name == kernel.name) for kernel in (flash.FLASH, flash.EFFICIENT))


@pytest.fixture
def recomputing(monkeypatch):
    monkeypatch.setattr(segments, "_way", lambda *_: segments._RECOMPUTING)


@pytest.fixture
def by(monkeypatch):
    """Attention by one way, as if it were made for every device and number type, with stand-ins for PyTorch's kernels."""

    def choose(way, **mistakes):
        monkeypatch.setattr(flash, "_aten", VarlenOperations(**mistakes))
        monkeypatch.setattr(ways, "WAYS", (way._replace(takes=lambda q, plan, sinks: plan.softcap is None), ways.WAYS[-1]))
        monkeypatch.setattr(probing, "_probes", {})
        monkeypatch.setattr(probing, "_said", set())
        monkeypatch.setattr(flash, "calls_of", paths.calls_of.__wrapped__)
        return flash._aten

    with cuda_backend():
        yield choose


@pytest.mark.parametrize("name", SMALL)
def test_a_loop_of_calls(recomputing, name):
    with cuda_backend():
        assert max(differences(CASES[name])) < 1e-13


@pytest.mark.parametrize("case", [CASES["a row alone"], CASES["virtual tokens and a window"]])
def test_capped_scores(case):
    capped = case._replace(softcap=1.5)
    with cuda_backend():
        assert max(differences(capped)) < 1e-13
        for wrong in (None, 1.501):
            assert max(differences(capped, computed=case._replace(softcap=wrong))) > 1e-5


def test_layers_with_capped_scores_by_hand(monkeypatch):
    exact_norms(monkeypatch)
    for within, attentions in ((nullcontext, 0), (cuda_backend, 2)):  # CPUs run the model's own code
        model = tiny("gemma2", torch.float64)
        adapter = attach(model, LoRA(rank=3, alpha=6.0))
        perturb(adapter.parameters())
        with within(), monkeypatch.context() as patch:
            learned(model)
            calls = counted(patch)
            ours, reference = both(model, adapter, pack_tree(rows()))
        assert calls["attend"] == attentions
        assert_equal(ours, reference)


def test_a_loop_of_calls_that_sees_a_later_key_is_noticed(recomputing, monkeypatch):
    right = segments.is_seen
    monkeypatch.setattr(segments, "is_seen", lambda q, k, rules: right(q + 1, k, rules))
    with cuda_backend():
        assert max(differences(CASES["a tree"])) > 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.002)], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["a tree", "virtual tokens and a window", "sinks"])
def test_in_few_bits(by, name, dtype, tolerance, monkeypatch):
    for way in (segments._KEEPING, segments._RECOMPUTING):
        with monkeypatch.context() as patch:
            patch.setattr(segments, "_way", lambda *_, way=way: way)
            assert max(differences(CASES[name], dtype)) < tolerance
    by(FLASH)
    assert max(differences(CASES[name], dtype)) < tolerance


@pytest.mark.parametrize("name", SMALL)
def test_one_call_of_flash_attention(by, name):
    operations = by(FLASH)
    assert max(differences(CASES[name])) < 1e-13
    assert operations.calls == 4  # forward and backward, and the same for the probe


@pytest.mark.parametrize("name", ["a tree", "virtual tokens and a window"])
def test_one_call_of_memory_efficient_attention(by, name):
    assert by(EFFICIENT).calls == 0
    assert max(differences(CASES[name])) < 1e-13


def test_random_trees(by):
    by(FLASH)
    rng = random.Random(0)
    for _ in range(12):
        head = [rng.randrange(4) for _ in range(40)]
        rows = [
            head[: rng.randrange(1, 40)] + [rng.randrange(4) for _ in range(rng.randrange(1, 30))]
            for _ in range(rng.randrange(1, 7))
        ]
        heads = Heads(*rng.choice([(1, 3, 8), (2, 2, 8), (3, 1, 16)]))
        virtual, window, chunk = rng.choice([0, 5]), rng.choice([None, 7, 30]), rng.choice([None, None, 11])
        case = Case(lay_out(rows).segments, heads, virtual, window, chunk, sinks=rng.random() < 0.3)
        assert max(differences(case)) < 1e-12, case


@pytest.mark.parametrize(("family", "method"), [("gemma3", "lora"), ("qwen3", "prefix")])
def test_layers_by_flash_attention_are_the_models_own(by, monkeypatch, family, method):
    exact_norms(monkeypatch)
    model = tiny(family, torch.float64)
    adapter = attach(model, method_of(method), sample=Sample(SAMPLE))
    perturb(adapter.parameters(), 0.05)
    operations = by(FLASH)
    learned(model)
    operations.calls = 0
    assert_equal(*both(model, adapter, pack_tree(rows())))
    assert operations.calls == 4  # of two layers, forward and backward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["by flash attention", "by segments"])
def test_how_many_kernels_are_launched(dtype):
    """One call a layer, however many segments there are."""
    counts = []
    for segments_of in (3, 40):
        plan = AttentionPlan(
            tuple(Segment(9 * n, 9 * n + 9, 0 if n else -1) for n in range(segments_of)), Heads(2, 2, 16), 0.25
        )
        q, k, v = (torch.empty(9 * segments_of, n, dtype=dtype, device="meta", requires_grad=True) for n in (64, 32, 32))
        angles = q.new_empty(len(q), 16)
        with cuda_backend(), OperationCounter() as counter:
            out = tree_attention.attend(AttentionInputs(q, k, v, angles, angles), plan)
            torch.autograd.grad(out, [q, k, v], torch.empty_like(out))
        counts.append(counter.count)
    assert (counts[0] == counts[1]) == (dtype == torch.bfloat16)


def test_sinks_go_another_way_where_flash_attention_gives_no_sums_by_token(monkeypatch):
    q, plan = torch.empty(9, 64, dtype=torch.bfloat16, device="meta"), AttentionPlan(FLAT, Heads(2, 2, 16), 1.0)
    for given in (True, False):
        monkeypatch.setattr(flash, "gives_sums_by_token", lambda given=given: given)
        assert ways.way_of(q, plan, sinks=False).name == flash.FLASH.name
        assert (ways.way_of(q, plan, sinks=True).name == flash.FLASH.name) == given


class OperationCounter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.count += 1
        return function(*arguments, **(named or {}))


class TestNewerFlashAttention:
    """FlashAttention-3 and 4 take the place of PyTorch's own where they are installed, and where they are right."""

    PLAN = AttentionPlan(CASES["a tree"].segments, Heads(2, 3, 64), 1.0)
    QUERIES = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16)

    @pytest.fixture
    def installed(self, monkeypatch):
        """Activates those of these names."""
        names, active = {"FA3"}, [""]

        def activate(name):
            if name not in names:
                raise ModuleNotFoundError(name)
            active[0] = name

        monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate, raising=False)
        monkeypatch.setattr(
            torch.nn.attention, "restore_flash_attention_impl", lambda: active.__setitem__(0, ""), raising=False
        )
        monkeypatch.setattr(ways, "_newer", {})
        monkeypatch.setattr(ways, "_capability", lambda device: (9, 0))
        monkeypatch.setattr(probing, "_probes", {})
        monkeypatch.setattr(probing, "_said", set())
        return active

    def test_one_that_is_right_is_used(self, installed, monkeypatch):
        monkeypatch.setattr(ways, "_problem", lambda *_: None)
        assert ways._is_proved(FLASH, self.QUERIES, self.PLAN, False)
        assert installed == ["FA3"]
        assert [probe.what for probe in probing.probes()] == ["flash attention by FA3"]

    def test_one_that_is_wrong_is_taken_back(self, installed, monkeypatch):
        monkeypatch.setattr(ways, "_problem", lambda *_: "wrong" if installed[0] else None)
        with pytest.warns(RuntimeWarning, match="flash attention by FA3: not used here"):
            assert ways._is_proved(FLASH, self.QUERIES, self.PLAN, False)
        assert installed == [""]
        assert [probe.what for probe in probing.probes()] == ["flash attention by FA3", "flash attention"]
        assert ways._is_proved(FLASH, self.QUERIES, self.PLAN, True)  # and not tried again
        assert installed == [""]

    def test_none_is_tried_on_cards_that_it_is_not_made_for(self, installed, monkeypatch):
        monkeypatch.setattr(ways, "_capability", lambda device: (8, 0))
        monkeypatch.setattr(ways, "_problem", lambda *_: None)
        assert ways._is_proved(FLASH, self.QUERIES, self.PLAN, False)
        assert installed == [""]


@pytest.mark.parametrize("name", ["a tree", "virtual tokens and a window"])
def test_gradients_of_queries_keys_and_values_lie_side_by_side(by, name):
    """As the gradient of one matrix, without a copy."""
    by(FLASH)
    leaves, cos, sin, first, dout = drawn(CASES[name])
    gradients = torch.autograd.grad(ours(CASES[name], *leaves, cos, sin, first), leaves[:3], dout)
    assert join_columns(gradients).data_ptr() == gradients[0].data_ptr()


class TestMistakes:
    """Negative controls."""

    @pytest.mark.parametrize(
        ("mistakes", "name"), [({"later": 1}, "a tree"), ({"wider": 1}, "a window")], ids=["a later key", "a wider window"]
    )
    @pytest.mark.parametrize("way", [FLASH, EFFICIENT], ids=lambda way: way.name)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_of_a_kernel_are_found_by_the_probe(self, by, way, mistakes, name, dtype):
        operations = by(way, **mistakes)
        with pytest.warns(RuntimeWarning, match=f"{way.name}: not used here, .*the result is off by"):
            assert max(differences(CASES[name], dtype)) < 0.02
        assert operations.calls == 2  # of the probe

    def test_a_kernel_that_is_not_there(self, by, monkeypatch):
        by(FLASH)
        monkeypatch.setattr(flash, "_aten", torch.ops.aten)
        with pytest.warns(
            RuntimeWarning, match="flash attention: not used here, PyTorch's operations are: NotImplementedError"
        ):
            assert max(differences(CASES["a tree"])) < 1e-13

    @pytest.mark.parametrize(
        "change",
        [
            lambda call: call._replace(rows=call.rows.roll(1)),
            lambda call: call._replace(starts=torch.cat([call.starts[:9], call.starts[9:10] - 1, call.starts[10:]])),
            lambda call: call._replace(users=call.users.flip(0)),
        ],
        ids=["keys of another place", "a user left out", "users of another key"],
    )
    def test_of_the_gathered_keys_are_noticed(self, by, monkeypatch, change):
        by(FLASH)
        monkeypatch.setattr(ways, "_is_proved", lambda *_: True)
        right = flash.calls_of
        monkeypatch.setattr(flash, "calls_of", lambda *given: tuple(map(change, right(*given))))
        assert max(differences(CASES["a tree"])) > 1e-3


class TestWhatKernelsCanCount:
    PLAN = AttentionPlan(CASES["a tree"].segments, Heads(2, 3, 20), 1.0)

    @pytest.mark.parametrize("room", [420, 500, 700, 900])
    def test_too_large_a_pack_is_cut_into_calls(self, by, monkeypatch, room):
        by(FLASH)
        monkeypatch.setattr(ways, "_is_proved", lambda *_: True)
        calls = paths.calls_of(self.PLAN, torch.device("cpu"), room * 120)
        assert len(calls) > 1
        assert [call.start for call in calls[1:]] == [call.end for call in calls[:-1]]
        assert max(call.end - call.start + 128 * (len(call.cu_q) - 1) for call in calls) <= room
        assert max(int(call.cu_k[-1]) for call in calls) <= room
        monkeypatch.setattr(flash, "calls_of", lambda plan, device: paths.calls_of(plan, device, room * 120))
        assert max(differences(CASES["a tree"])) < 1e-13

    def test_too_long_a_row_goes_another_way(self, by, monkeypatch):
        assert paths.fits(self.PLAN, 372 * 120)
        assert not paths.fits(self.PLAN, 372 * 120 - 1)
        operations = by(FLASH)
        monkeypatch.setattr(ways, "fits", lambda plan: False)
        assert max(differences(CASES["a tree"])) < 1e-13
        assert not operations.calls


def test_rows_side_by_side_need_nothing_gathered():
    plan = AttentionPlan(CASES["rows side by side"].segments, Heads(1, 1, 8), 1.0)
    (call,) = paths.calls_of(plan, torch.device("cpu"))
    assert call.rows is call.starts is call.users is None
    assert call.cu_q.tolist() == call.cu_k.tolist() == [0, 30, 31, 180]
    (call,) = paths.calls_of(plan._replace(virtual=1), torch.device("cpu"))
    assert call.rows is not None


def test_every_layer_of_a_pass_asks_for_one_transfer():
    plan = AttentionPlan((Segment(0, 7, -1), Segment(7, 9, 0)), Heads(1, 1, 8), 1.0)
    first = paths.calls_of(plan, torch.device("cpu"))
    assert paths.calls_of(plan._replace(), torch.device("cpu")) is first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", SMALL)
def test_nothing_waits_for_the_device(name, dtype):
    """On `meta` there are no numbers to read."""
    leaves, cos, sin, first, dout = drawn(CASES[name], dtype)
    leaves, first = (
        [t.detach().to("meta").requires_grad_() for t in leaves],
        {n: t.detach().to("meta") for n, t in first.items()},
    )
    with cuda_backend():
        out = ours(CASES[name], *leaves, cos.to("meta"), sin.to("meta"), first)
        gradients = torch.autograd.grad(out, leaves, dout.to("meta"))
    assert [t.shape for t in gradients] == [t.shape for t in leaves]
    assert all(t.dtype == dtype for t in (out, *gradients))


RULES = {
    "plain": Rules(None),
    "a window": Rules(0.3, window=33),
    "chunks": Rules(None, chunk=40),
    "a soft-cap": Rules(None, softcap=2.0),
    "sinks": Rules(None, sinks=torch.linspace(-1, 3, 4).double()),
}


class TestModelsOwnCode:
    """Where a model's own code calls attention with a layout, on an accelerator."""

    def call(self, rules, virtual, like, sizes=(8, 8)):
        draw = torch.Generator().manual_seed(0)
        of_each = ((4, sizes[0]), (2, sizes[0]), (2, sizes[1]))
        q, k, v = (torch.randn(1, heads, 340, n, generator=draw, dtype=torch.float64).to(like) for heads, n in of_each)
        given = [t.requires_grad_() for t in (q, k, v)]
        layer = torch.nn.Linear(1, 1)
        layer.layer_idx = 0
        if virtual:
            given += [torch.randn(2, 3, n, generator=draw, dtype=torch.float64).to(like).requires_grad_() for n in 2 * sizes]
        pairs = [tuple(given[n : n + 2]) for n in (3, 5)] if virtual else []
        tokens = [Virtual({0: pair}, acts_on=virtual if callable(virtual) else None) for pair in pairs]
        return given, AttentionCall(layer, q, k, v, rules, tokens)

    @pytest.mark.parametrize("virtual", [False, True], ids=["", "virtual tokens"])
    @pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
    def test_at_once_it_is_what_it_is_by_segments(self, by, rules, virtual):
        by(FLASH)
        layout, results = PackLayout(CASES["a tree"].segments), []
        for attend in (layout.attend, layout.attend_at_once):
            given, call = self.call(rules, virtual, "cpu")
            out = attend(call)
            results.append([out, *torch.autograd.grad(out.sin().sum(), given)])
        assert out.shape == (1, 340, 4, 8)
        assert out.is_contiguous()
        assert max(float((a - b).detach().abs().max()) for a, b in zip(*results, strict=True)) < 1e-12

    @pytest.mark.parametrize("sizes", [(12, 8), (8, 10)], ids=["longer keys, as of MLA", "longer values"])
    def test_values_of_another_size_than_keys(self, by, sizes):
        by(FLASH)
        layout, results = PackLayout(CASES["a tree"].segments), []
        for attend in (layout.attend, layout.attend_at_once):
            given, call = self.call(Rules(None, window=50), True, "cpu", sizes)
            out = attend(call)
            results.append([out, *torch.autograd.grad(out.sin().sum(), given)])
        assert out.shape == (1, 340, 4, sizes[1])
        assert max(float((a - b).detach().abs().max()) for a, b in zip(*results, strict=True)) < 1e-12

    def test_accelerators_attend_at_once_where_all_rows_are_alike(self, monkeypatch):
        calls, right = [], tree_attention.attend
        monkeypatch.setattr(tree_attention, "attend", lambda *given: calls.append(given) or right(*given))
        layout = PackLayout(CASES["a tree"].segments)
        for rules, virtual, at_once in (
            (Rules(None), True, True), (Rules(None, softcap=5.0), False, True), (Rules(None), lambda at: at > 100, False),
        ):  # fmt: skip
            calls.clear()
            given, call = self.call(rules, virtual, "meta")
            with cuda_backend():
                torch.autograd.grad(layout.attend(call).sum(), given)
            assert bool(calls) == at_once
        calls.clear()
        layout.attend(self.call(Rules(None), False, "cpu")[1])
        assert not calls  # CPUs compute as they did
