"""The loss head against the plain formula in float64, and what it must not do."""

import pytest
import torch
from accelerators import cuda_backend
from families import perturb, random_rows, tiny

from trimtab.core.errors import UnsupportedModel
from trimtab.data import TokenRow, pack_tree
from trimtab.engine import forward, pack_logprobs, sums
from trimtab.engine import head as head_module
from trimtab.engine.head import Head, Targets, head_of
from trimtab.methods import attach
from trimtab.methods.lora import LoRA


def sequence_logprobs(hidden, at, head, token, row, rows):
    return head_module.sequence_logprobs(hidden, head, Targets(at, token, row, rows))


def reference(hidden, row, head, token, sequence, count):
    logits = hidden[row] @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    chosen = logits.log_softmax(-1)[torch.arange(len(token)), token]
    return torch.zeros(count, dtype=hidden.dtype).index_add(0, sequence, chosen)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_it_equals_the_plain_formula_with_its_gradient(scale, softcap, bias, monkeypatch):
    monkeypatch.setattr(head_module, "TILE", 100 * 7)  # tiles of 7 tokens, six in all
    torch.manual_seed(0)
    head = Head(torch.randn(41, 16).double(), torch.randn(41).double() if bias else None, scale, softcap)
    hidden = torch.randn(100, 16).double().requires_grad_()
    row = torch.cat([torch.randint(90, (50,)), torch.arange(100)])  # some predict several, one of them none but its own
    token, sequence = torch.randint(41, (150,)), torch.randint(5, (150,)).sort().values
    weights = torch.randn(5).double()
    ours, theirs = (f(hidden, row, head, token, sequence, 5) for f in (sequence_logprobs, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(out @ weights, hidden)[0] for out in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


def test_it_is_the_derivative_by_finite_differences():
    torch.manual_seed(0)
    head = Head(torch.randn(11, 4).double(), None, 1.5, 3.0)
    hidden = torch.randn(7, 4).double().requires_grad_()
    token, sequence = torch.randint(11, (7,)), torch.tensor([0, 0, 1, 1, 1, 2, 2])
    assert torch.autograd.gradcheck(
        lambda h: sequence_logprobs(h, torch.tensor([0, 1, 2, 3, 4, 5, 5]), head, token, sequence, 3),
        (hidden,),
        fast_mode=False,
    )


def test_it_never_holds_the_logits(monkeypatch):
    """Peak memory for many targets is that of one tile, not N x V; and each logit is formed once: nothing again for the gradient."""
    head = Head(torch.randn(5_000, 8), None)
    hidden, token = torch.randn(6_400, 8).requires_grad_(), torch.randint(5_000, (6_400,))
    sizes = []

    def logits(self, *given, _real=Head.logits):
        made = _real(self, *given)
        sizes.append(made.numel())
        return made

    monkeypatch.setattr(Head, "logits", logits)
    sequence_logprobs(hidden, torch.arange(6_400), head, token, torch.zeros(6_400, dtype=torch.long), 1).sum().backward()
    assert max(sizes) <= head_module.TILE
    assert sum(sizes) == 6_400 * 5_000


def test_logits_of_parts_are_those_of_the_whole():
    head = Head(torch.randn(41, 8), torch.randn(41), 0.5, 3.0)
    hidden = torch.randn(5, 8)
    parts = [head.logits(hidden, slice(start, start + 10)) for start in range(0, 41, 10)]
    torch.testing.assert_close(torch.cat(parts, dim=1), head.logits(hidden))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_many_tiles_round_no_more_than_one(softcap, monkeypatch):
    """In bfloat16, against float64 of the same numbers: with the running mean in bfloat16, 300 tiles were 1 % off."""
    torch.manual_seed(0)
    head = Head(torch.randn(3_000, 32).bfloat16(), None, 1.0, softcap)
    hidden = (0.3 * torch.randn(20, 32)).bfloat16().requires_grad_()
    token, row, sequence = torch.randint(3_000, (20,)), torch.arange(20), torch.zeros(20, dtype=torch.long)
    truth = hidden.detach().double().requires_grad_()
    exact = head._replace(weight=head.weight.double())
    (expected,) = torch.autograd.grad(reference(truth, row, exact, token, sequence, 1).sum(), truth)
    off = []
    for tiles in (1, 300):
        monkeypatch.setattr(head_module, "TILE", 20 * 3_000 // tiles)
        (found,) = torch.autograd.grad(sequence_logprobs(hidden, row, head, token, sequence, 1).sum(), hidden)
        off.append(float((found.double() - expected).norm() / expected.norm()))
    assert max(off) < 2.5e-3
    assert off[1] < 1.2 * off[0]


@pytest.mark.parametrize("adapted", [False, True])
def test_a_token_that_predicts_many_has_their_gradients_added_up_in_float32(adapted):
    """The last token of a prompt with 1,000 answers, in bfloat16, against float64 of the same numbers."""
    torch.manual_seed(0)
    module = torch.nn.Linear(32, 50, bias=False).bfloat16()
    head = Head(module.weight, None, adapted=module if adapted else None)
    hidden, token = torch.randn(2, 32).bfloat16().requires_grad_(), torch.randint(10, (1_000,))
    row, sequence = torch.zeros(1_000, dtype=torch.long), torch.zeros(1_000, dtype=torch.long)
    truth = hidden.detach().double().requires_grad_()
    exact = Head(module.weight.detach().double(), None)
    (expected,) = torch.autograd.grad(reference(truth, row, exact, token, sequence, 1).sum(), truth)
    (found,) = torch.autograd.grad(sequence_logprobs(hidden, row, head, token, sequence, 1).sum(), hidden)
    assert float((found.double() - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapted", [False, True])
def test_no_digit_of_a_log_p_near_0_is_lost(adapted, dtype):
    """It is the difference of two numbers of the size of a logit, and must not be rounded as those are."""
    weight = torch.tensor([[100.0], [87.0]], dtype=dtype)
    module = torch.nn.Linear(1, 2, bias=False)
    module.weight.data = weight
    head = Head(weight, None, adapted=module if adapted else None)
    out = sequence_logprobs(torch.ones(1, 1, dtype=dtype), torch.tensor([0]), head, torch.tensor([0]), torch.tensor([0]), 1)
    assert float(out.detach()) == pytest.approx(-torch.tensor(-13.0).exp().log1p().item(), rel=0.05)


def test_tokens_that_only_other_adapters_know_stay_impossible_under_a_cap():
    class Knows(torch.nn.Module):
        def forward(self, hidden):
            logits = hidden @ weight.T
            return logits.index_fill(-1, torch.tensor([3, 7]), float("-inf"))

    weight = torch.randn(9, 4)
    hidden, head = torch.randn(5, 4), Head(weight, None, 1.0, 2.0)
    plain = head.logits(hidden)
    torch.testing.assert_close(plain, 2.0 * torch.tanh(hidden @ weight.T / 2.0))
    adapted = head._replace(adapted=Knows()).logits(hidden)
    assert (adapted[:, [3, 7]] == float("-inf")).all()
    others = [token for token in range(9) if token not in (3, 7)]
    assert torch.equal(adapted[:, others], plain[:, others])


def test_an_adapted_head_forms_a_tile_of_logits_at_a_time(monkeypatch):
    """As many rows as fit a tile, but never fewer than 64."""
    torch.manual_seed(0)
    adapted = torch.nn.Linear(8, 41).double()
    head = Head(adapted.weight, adapted.bias, adapted=adapted)
    hidden, token = torch.randn(300, 8).double().requires_grad_(), torch.randint(41, (300,))
    row, sequence, sizes = torch.arange(300), torch.zeros(300, dtype=torch.long), []

    def logits(self, *given, _real=Head.logits):
        made = _real(self, *given)
        sizes.append(len(made))
        return made

    monkeypatch.setattr(Head, "logits", logits)
    for tile, most in ((41 * 70 + 40, 70), (41 * 63, 64)):
        monkeypatch.setattr(head_module, "TILE", tile)
        sizes.clear()
        ours = sequence_logprobs(hidden, row, head, token, sequence, 1)
        assert sizes == [most] * (300 // most) + [300 % most]
        theirs = reference(hidden, row, Head(adapted.weight, adapted.bias), token, sequence, 1)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            *(torch.autograd.grad(out.sum(), [hidden, *adapted.parameters()]) for out in (ours, theirs)), rtol=1e-11, atol=1e-12
        )


def test_a_token_beyond_the_head_is_refused():
    head = Head(torch.randn(11, 4), None)
    with pytest.raises(IndexError, match="token 11 is beyond the head's 11"):
        sequence_logprobs(torch.randn(2, 4), torch.arange(2), head, torch.tensor([3, 11]), torch.tensor([0, 0]), 1)


def test_without_a_gradient_it_forms_none():
    head = Head(torch.randn(11, 4), None)
    with torch.no_grad():
        out = sequence_logprobs(torch.randn(3, 4), torch.arange(3), head, torch.tensor([1, 2, 3]), torch.tensor([0, 0, 1]), 2)
    assert out.grad_fn is None


def test_large_logits_do_not_overflow():
    head = Head(torch.tensor([[300.0], [-300.0]]), None)
    hidden = torch.tensor([[1.0], [1.0]]).requires_grad_()
    out = sequence_logprobs(hidden, torch.arange(2), head, torch.tensor([0, 1]), torch.tensor([0, 1]), 2)
    assert out.tolist() == [0.0, -600.0]
    out.sum().backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize(
    ("family", "scale", "softcap"), [("granite", 0.25, None), ("cohere", 0.25, None), ("gemma2", 1.0, 3.0)]
)
def test_it_reads_scale_and_softcap_off_the_model(family, scale, softcap):
    head = head_of(tiny(family))
    assert (head.scale, head.softcap) == (scale, softcap)


def test_a_trained_head_is_refused():
    model = tiny("llama").requires_grad_(True)
    with pytest.raises(UnsupportedModel, match="head is trained"):
        head_of(model)
    assert head_of(model.requires_grad_(False)).weight is model.lm_head.weight


def test_a_head_that_is_no_matrix_is_refused():
    model = tiny("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(UnsupportedModel, match="The head of LlamaForCausalLM is a Sequential, not a matrix"):
        head_of(model)


# Rows by the whole vocabulary, as on accelerators


@pytest.fixture
def few_rows(monkeypatch):
    """So that several times some rows are taken."""
    monkeypatch.setattr(head_module, "ROWS", 3)
    monkeypatch.setattr(head_module, "SPLIT_ROWS", 8)


def drawn(head, dtype=torch.float64):
    """Hidden states, some of which predict many targets, and their sums' weights."""
    hidden = (0.3 * torch.randn(30, head.weight.shape[1])).to(dtype).requires_grad_()
    row = torch.cat([torch.arange(30), torch.randint(5, (40,)), torch.full((9,), 17)])[torch.randperm(79)]
    token, sequence = torch.randint(len(head.weight), (79,)), torch.randint(4, (79,)).sort().values
    return hidden, row, head, token, sequence, 6  # two rows have no target


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("shaped", [False, True])
def test_rows_by_the_whole_vocabulary_equal_parts_of_it(shaped, softcap, few_rows, monkeypatch):
    """In float64, values and gradients."""
    monkeypatch.setattr(head_module, "TILE", 30 * 7)
    torch.manual_seed(0)
    head = Head(torch.randn(41, 16).double(), torch.randn(41).double() if shaped else None, 0.3 if shaped else 1.0, softcap)
    given, weights = drawn(head), torch.randn(6).double()
    shapes, real = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **more: shapes.append((len(a), b.shape[1])) or real(a, b, **more))
    parts = sequence_logprobs(*given)
    assert set(shapes) == {(30, 7), (30, 6)}
    shapes.clear()
    with cuda_backend():
        rows = sequence_logprobs(*given)
        of_rows = torch.autograd.grad(rows @ weights, given[0])[0]
    assert shapes == [(8, 41)] * 3 + [(6, 41)]
    torch.testing.assert_close(rows, parts, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(of_rows, torch.autograd.grad(parts @ weights, given[0])[0], rtol=1e-10, atol=1e-12)
    with cuda_backend(), pytest.raises(AssertionError):  # the control
        torch.testing.assert_close(sequence_logprobs(*given[:3], given[3].roll(1), *given[4:]), parts, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama-tied", "gemma2", "granite"])
@pytest.mark.parametrize("adapted", [False, True])
def test_so_do_those_of_models(family, adapted, few_rows):
    """Tied, with a cap, and scaled; and adapted, where rows are fewer."""
    model = tiny(family, torch.float64)
    adapter = attach(model, LoRA(rank=2, targets=(".*q_proj", "lm_head") if adapted else (".*q_proj",)))
    perturb(adapter.parameters())
    prompt, *answers = random_rows(9, 5, 6, 7)
    pack = pack_tree([TokenRow([*prompt, *ids], list(range(4, 9 + len(ids))), "row") for ids in answers])

    def both():
        logprobs = pack_logprobs(model, pack)
        return [logprobs, *torch.autograd.grad(logprobs @ torch.arange(1.0, 4.0).double(), list(adapter.parameters().values()))]

    parts = both()
    assert (forward.head_of(model).adapted is not None) == adapted
    with cuda_backend():
        torch.testing.assert_close(both(), parts, rtol=1e-10, atol=1e-10)


def test_in_few_bits_rows_round_no_more_than_logits_in_one_piece(few_rows, monkeypatch):
    """Values and gradients in bfloat16, against float64 of the same numbers; by products that leave in float32, as on CUDA."""
    monkeypatch.setattr(head_module, "has_float32_results", lambda device_type: True)
    monkeypatch.setattr(head_module, "sums_of_products", lambda a, b: a.float() @ b.float())
    torch.manual_seed(0)
    head = Head(torch.randn(3_000, 32).bfloat16(), None)
    given = drawn(head, torch.bfloat16)
    truth = given[0].detach().double().requires_grad_()
    exact = reference(truth, given[1], head._replace(weight=head.weight.double()), *given[3:])
    (gradient,), exact = torch.autograd.grad(exact.sum(), truth), exact.detach()

    def off(value, found):
        (of_it,) = torch.autograd.grad(value.sum(), given[0])
        return [float((a.double() - b).norm() / b.norm()) for a, b in ((value.detach(), exact), (of_it, gradient))]

    logprobs = (given[0] @ head.weight.T).float().log_softmax(-1)[given[1], given[3]]
    one_piece = off(torch.zeros(6).index_add(0, given[4], logprobs), gradient)
    with cuda_backend():
        rows = off(sequence_logprobs(*given), gradient)
    assert rows[0] <= 1.01 * one_piece[0]
    assert rows[1] <= 1.01 * one_piece[1]


def test_sums_are_added_in_an_order_of_their_own():
    """Not in that of their members, which on a device have none; and they are the sums."""
    torch.manual_seed(0)
    group = torch.cat([torch.zeros(1_000), torch.randint(3, 40, (500,)), torch.tensor([50])]).long()[torch.randperm(1_501)]
    values = torch.randn(1_501, 3).double()
    order = sums.sum_order(group.numpy(), values.device)
    found = sums.add_sums_(torch.ones(60, 3).double(), values.clone(), order)
    torch.testing.assert_close(found, torch.ones(60, 3).double().index_add(0, group, values), rtol=1e-13, atol=1e-13)
    for to, added in zip(order.to.split(order.rounds), order.added.split(order.rounds), strict=True):
        places = torch.cat([to, added])
        assert len(places.unique()) == len(places)  # so no two of them meet
    assert len(order.rounds) == 10
    assert len(order.groups.unique()) == len(order.groups)
    nothing = sums.sum_order(group[:0].numpy(), values.device)
    assert sums.add_sums_(torch.ones(2), torch.zeros(0), nothing).tolist() == [1.0, 1.0]
