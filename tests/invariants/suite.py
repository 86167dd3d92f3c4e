"""The invariants that every adapter method must satisfy: I01 to I35 of the reliability catalogue, as code.

Each is a function of a `Case` that returns nothing or raises AssertionError; `skip(reason)` says why one does not apply.
`test_invariants.py` runs every one on every method and family, and `test_controls.py` breaks the code for each and sees it fail.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from families import method_of, perturb, random_rows, tiny
from torch import Tensor, nn
from worlds import combinations

from trimtab.base import Base
from trimtab.base.fingerprint import own_weights, weights_hash
from trimtab.core.errors import ArtifactError, NotMergeable, RecipeError, TrimtabError
from trimtab.data import Pack, Segment, lay_out, pack_all, pack_flat, pack_tree, row_groups
from trimtab.data.example import TokenRow
from trimtab.data.mismatched import with_mismatched
from trimtab.deploy import load_adapter, merge, save_adapter
from trimtab.engine import generate, pack_logprobs
from trimtab.engine.forward import hidden_states
from trimtab.engine.head import head_of
from trimtab.engine.layouts import Cache, DecodeLayout, PackLayout, PrefillLayout
from trimtab.methods import Attached, Method, Routing, Sample, active, adapters, attach, combine, routed, switch_of
from trimtab.objectives import Objective, score_packs
from trimtab.objectives.sft import SFT
from trimtab.train import TrainConfig, train

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "gpt2")
"""Gemma 3 stands for the Gemmas: sliding and full layers, two rotary bases, norms after attention and MLP."""

SAMPLE = Sample(rows=random_rows(40, seed=5))
ROWS = [
    TokenRow(ids, list(range(start, len(ids))), f"row:{n}", len(ids))
    for n, (ids, start) in enumerate(zip(random_rows(9, 14, 3, 11, 6, 8, 12, 5), (7, 2, 2, 1, 5, 3, 11, 4), strict=True))
]
_SHARED = random_rows(10, seed=6)[0]
FORKED = [
    TokenRow(_SHARED + rest, list(range(start, 10 + len(rest))), f"forked:{n}", 10 + len(rest))
    for n, (rest, start) in enumerate(zip(
        [ROWS[1].ids, ROWS[1].ids[:9] + ROWS[3].ids, ROWS[4].ids, ROWS[1].ids[:9], ROWS[4].ids], (12, 9, 2, 11, 13), strict=True
    ))
] + ROWS[:2]  # fmt: skip
"""Five rows that begin alike, two of them further, one the beginning of another, two the same; and two others."""
_PROMPTS = random_rows(3, 5, 2, 5, 4, 6, 3, 2, seed=8)
_BETTER, _OTHERS = random_rows(4, 6, 3, 9, 5, 2, 7, 4, seed=9), random_rows(5, 2, 6, 4, 3, 7, 3, 6, seed=10)


def _compared(number: int, side: Any, reference: float) -> TokenRow:
    answer = _BETTER[number] if side in ("chosen", "good") else _BETTER[number][:2] + _OTHERS[number]
    ids = _PROMPTS[number] + answer
    return TokenRow(ids, list(range(len(_PROMPTS[number]), len(ids))), f"row:{number}", len(ids), side, reference)


PAIRS = [_compared(n, side, -4.0 * n - 9) for n in range(8) for side in ("chosen", "rejected")]
"""Eight rows of two answers that begin alike."""
JUDGED = with_mismatched([_compared(n, "good" if n % 3 else "bad", -4.0 * n - 12) for n in range(8)], seed=0)
JUDGED = [
    TokenRow(r.ids, r.target_indices, r.where, r.full_length, r.side, r.reference or -6.0 * len(r.target_indices))
    for r in JUDGED
]
"""Eight good or bad answers, each followed by one to another prompt."""
FLAT = TrainConfig(schedule="constant", warmup=0.0, clip=None)

INVARIANTS: dict[str, Callable[["Case"], None]] = {}


def invariant(function: Callable[["Case"], None]) -> Callable[["Case"], None]:
    INVARIANTS[function.__name__] = function
    return function


def skip(reason: str) -> None:
    pytest.skip(reason)


def learned_and_pooled(model: nn.Module, objective: Objective, packs: list[Pack]) -> tuple[list[Pack], float]:
    """The packs that have a loss, and what the objective estimates on the others."""
    learned, kl = score_packs(model, objective, packs)
    return [pack for pack, _ in learned], kl


@dataclass
class Case:
    """A method on a family."""

    method: Method
    family: str
    folder: Path
    objective: Objective = field(default_factory=SFT)

    @property
    def rows(self) -> list[TokenRow]:
        """Eight rows to learn from by the objective."""
        return {"answers": ROWS, "pairs": PAIRS, "judged": JUDGED}[self.objective.data_kind]

    def first(self, count: int) -> list[TokenRow]:
        """The sequences of the first rows."""
        return [self.rows[n] for unit in row_groups(self.rows)[:count] for n in unit]

    def gradients(
        self,
        model: nn.Module,
        adapter: Attached,
        rows: list[TokenRow],
        cut: list[int],
        pack: Callable[[list[TokenRow]], Pack] = pack_flat,
    ) -> dict[str, Tensor]:
        """Of the loss over all rows, cut into packs of these numbers of rows."""
        for parameter in adapter.parameters().values():
            parameter.grad = None
        packs, kl = learned_and_pooled(model, self.objective, self.packed(rows, cut, pack))
        items = sum(map(self.objective.items, packs))
        for one in packs:
            (self.objective.loss(pack_logprobs(model, one), one, kl) / items).backward()
        return {name: p.grad.clone() for name, p in adapter.parameters().items() if p.grad is not None}

    def loss(self, model: nn.Module, rows: list[TokenRow]) -> Callable[[], float]:
        """The loss as a function of what the adapter is, at the divergence that it has now, which counts as constant."""
        packs, kl = learned_and_pooled(model, self.objective, self.packed(rows, [len(row_groups(rows))]))
        items = sum(map(self.objective.items, packs))
        return lambda: sum(float(self.objective.loss(pack_logprobs(model, one), one, kl)) for one in packs) / items

    def packed(self, rows: list[TokenRow], cut: list[int], pack: Callable[[list[TokenRow]], Pack] = pack_flat) -> list[Pack]:
        """Packs of these numbers of rows each; mismatched answers have packs of their own."""
        numbers, packs = iter(row_groups(rows)), []
        for size in cut:
            several = [rows[n] for unit in islice(numbers, size) for n in unit]
            apart = [row for row in several if row.side == "mismatched"]
            packs += [pack(some) for some in (apart, [row for row in several if row.side != "mismatched"]) if some]
        return packs

    def learn(self, base: Base, adapter: Attached, steps: int, rate: float = 1e-2) -> list[float]:
        return [step.loss for step in train(base, adapter, self.objective, [pack_all(self.rows, 64)] * steps, FLAT, rate)]

    def fresh(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        return tiny(self.family, dtype, seed)

    def attached(self, model: nn.Module | None = None, *, moved: bool = True, name: str = "default", seed: int = 0) -> Attached:
        """The method on a model, moved off its first values unless told not to."""
        adapter = attach(model if model is not None else self.fresh(), self.method, seed, name=name, sample=SAMPLE)
        if moved:
            perturb(adapter.parameters(), 0.1, seed=seed)
        return adapter

    def based(self, dtype: torch.dtype = torch.float32, *, moved: bool = True) -> tuple[Base, Attached]:
        base = Base(self.fresh(dtype))
        return base, self.attached(base.model, moved=moved)


@torch.no_grad()
def logits(model: Any, rows: list[list[int]] | None = None) -> Tensor:
    """Of rows packed side by side."""
    rows = rows or [row.ids for row in ROWS[:3]]
    ends = torch.tensor([len(row) for row in rows]).cumsum(0).tolist()
    segments = tuple(Segment(end - len(row), end, -1) for end, row in zip(ends, rows, strict=True))
    ids, positions = torch.tensor([i for row in rows for i in row]), torch.cat([torch.arange(len(row)) for row in rows])
    return head_of(model).logits(hidden_states(model, ids, positions, PackLayout(segments)))


@torch.no_grad()
def forced(model: Any, rows: list[list[int]], given: int, owners: list[str] | None = None) -> list[Tensor]:
    """Logits of each row's tokens from `given` on, decoded from a cache with the row's own tokens put in: teacher forcing.

    owners: the adapter that answers each row, if each has its own.
    """
    routing = Routing([switch_of(model, owner) for owner in owners]) if owners else None
    prompts = [row[:given] for row in rows]
    tree, cache = lay_out(prompts, share=owners is None), Cache()
    ids, positions = torch.tensor(tree.ids), torch.tensor(tree.positions)
    with routed(routing.select([n for n in range(len(rows)) for _ in range(given)]) if routing else None):
        hidden = hidden_states(model, ids, positions, PrefillLayout(tree, cache, ids.device))
    hidden = hidden[[tree.segments[leaf].end - 1 for leaf in tree.leaves]]
    steps = []
    for step in range(given, min(map(len, rows))):
        decode = DecodeLayout(cache)
        with routed(routing):
            steps.append(head_of(model).logits(hidden))
            hidden = hidden_states(model, torch.tensor([row[step] for row in rows]), cache.lengths, decode)
        decode.advance()
    return [torch.stack([step[n] for step in steps]) for n in range(len(rows))]


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


# Attaching and detaching


@invariant
def I01_starts_as_the_base_or_says_that_it_does_not(case: Case) -> None:
    model = case.fresh()
    before = logits(model)
    case.attached(model, moved=False)
    again = case.fresh()
    case.attached(again, moved=False)
    assert torch.equal(logits(model), before) == case.method.identity_at_init
    assert torch.equal(logits(model), logits(again)), "the first values are not decided by model, method, seed and sample"


@invariant
def I02_acts_in_forward_and_in_cached_generation(case: Case) -> None:
    model = case.fresh()
    row = [random_rows(16, seed=4)[0]]
    before, decoded = logits(model, row), forced(model, row, 4)[0]
    case.attached(model)
    assert float((logits(model, row) - before).abs().max()) > 1e-3
    assert float((forced(model, row, 4)[0] - decoded).abs().max()) > 1e-3


@invariant
def I03_the_base_never_changes(case: Case) -> None:
    base, adapter = case.based()
    weights = own_weights(case.fresh())
    before = weights_hash(weights)
    case.learn(base, adapter, 2)
    save_adapter(base, adapter, case.folder / "saved")
    generate(base.model, [[5, 6, 7]], [], max_new_tokens=3)
    if case.method.mergeable:
        _merged_or_refused(base, adapter, case.folder / "merged")
    base.check_unchanged()
    adapter.detach()
    assert weights_hash(own_weights(base.model)) == before


@invariant
def I04_disabled_is_the_base_nested_after_an_exception_and_in_threads(case: Case) -> None:
    model = case.fresh()
    before = logits(model)
    adapter = case.attached(model)
    with adapter.disabled():
        with adapter.disabled():
            assert torch.equal(logits(model), before)
        assert torch.equal(logits(model), before)
    with pytest.raises(ZeroDivisionError), adapter.disabled():
        _ = 1 / 0
    adapted = logits(model)
    assert not torch.equal(adapted, before)
    seen: list[bool] = []
    with adapter.disabled():
        thread = threading.Thread(target=lambda: seen.append(torch.equal(logits(model), adapted)))
        thread.start()
        thread.join()
        assert torch.equal(logits(model), before)
    assert seen == [True], "a block in one thread reached into another"


@invariant
def I05_detached_the_model_is_what_it_was(case: Case) -> None:
    model = case.fresh()
    before, keys, tree, digest = logits(model), list(model.state_dict()), str(model), weights_hash(own_weights(model))
    case.attached(model).detach()
    assert torch.equal(logits(model), before)
    assert (list(model.state_dict()), str(model), weights_hash(own_weights(model))) == (keys, tree, digest)


@invariant
def I06_what_trains_is_the_adapter_and_nothing_else(case: Case) -> None:
    base, adapter = case.based()
    own = {id(p) for p in adapter.parameters().values()}
    assert {id(p) for p in base.model.parameters() if p.requires_grad} == own
    case.gradients(base.model, adapter, case.rows, [8])
    assert {id(p) for p in base.model.parameters() if p.grad is not None} == own


@invariant
def I07_every_tensor_moves_by_the_third_step(case: Case) -> None:
    base, adapter = case.based(moved=False)
    before = adapter.state()
    case.learn(base, adapter, 3)
    still = [name for name, tensor in adapter.state().items() if torch.equal(tensor, before[name])]
    assert still == []


# Mathematics


@invariant
def I08_gradients_are_the_slopes_of_the_loss(case: Case) -> None:
    """Along a random direction in each tensor, by central differences in float64."""
    if not case.method.exact_gradient:
        skip("the method takes a factor as constant in its backward pass, as its paper does")
    base, adapter = case.based(torch.float64)
    # Norms and rotations are computed in float32 even in a float64 model, but for GPT-2.
    size, bound = (1e-5, 1e-6) if case.family == "gpt2" else (2e-3, 2e-2)
    rows = case.first(4)
    found, loss = case.gradients(base.model, adapter, rows, [4]), case.loss(base.model, rows)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapter.parameters().items():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction = (found[name] / found[name].norm().clamp_min(1e-12) + 0.3 * direction / direction.norm()).detach()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * size * direction)
                values.append(loss())
                parameter.sub_(sign * size * direction)
        slope, expected = (values[0] - values[1]) / (2 * size), float((found[name] * direction).sum())
        assert abs(slope - expected) <= bound * max(abs(expected), 1e-3), f"{name}: slope {slope}, gradient {expected}"


@invariant
def I10_two_evaluations_are_equal(case: Case) -> None:
    if "dropout" in type(case.method).model_fields:
        case = Case(case.method.model_copy(update={"dropout": 0.5}), case.family, case.folder, case.objective)
    adapter = case.attached()
    assert torch.equal(logits(adapter.model), logits(adapter.model))
    adapter.train()
    adapter.train(False)
    assert torch.equal(logits(adapter.model), logits(adapter.model))


@invariant
def I15_merged_is_the_adapter(case: Case) -> None:
    if not case.method.mergeable:
        skip("not a change of weights: see I17")
    base, adapter = case.based()
    done = _merged_or_refused(base, adapter, case.folder / "merged")
    assert done.max_logit_difference <= 2e-5 * max(done.logit_scale, 1.0)
    assert done.same_top_token == 1.0


@invariant
def I16_merging_twice_gives_the_same_and_leaves_the_base_alone(case: Case) -> None:
    if not case.method.mergeable:
        skip("not a change of weights: see I17")
    base, adapter = case.based()
    before = logits(base.model)
    for name in ("one", "two"):
        _merged_or_refused(base, adapter, case.folder / name)
    assert _bytes(case.folder / "one") == _bytes(case.folder / "two") != {}
    assert torch.equal(logits(base.model), before)
    next(iter(adapter.parameters().values())).data.view(-1)[0] = float("nan")
    with pytest.raises(ArtifactError, match="NaN or Inf"):
        merge(base, adapter, case.folder / "three")
    assert not (case.folder / "three").exists()


@invariant
def I17_what_is_no_change_of_weights_is_not_merged(case: Case) -> None:
    if case.method.mergeable:
        skip("a change of weights: see I15")
    base, adapter = case.based()
    with pytest.raises(NotMergeable, match=r"cannot be merged|no change of the base's weights"):
        merge(base, adapter, case.folder / "merged")
    assert not (case.folder / "merged").exists()


@invariant
def I18_a_combination_is_exact_or_refused(case: Case) -> None:
    adapter = case.attached(name="a")
    before = logits(adapter.model)
    if case.method.name != "lora":
        with pytest.raises(RecipeError, match="only changes that LoRA made add up"):
            combine(adapter.model, {"a": 1.0}, "b")
        return
    assert combine(adapter.model, {"a": 1.0}, "b").error == 0.0
    assert torch.equal(logits(adapter.model), before)


@invariant
def I21_cached_decoding_is_the_forward_pass(case: Case) -> None:
    """64 steps, ragged and in another order (positions end at 64 in the tiny models: 40 here beside 20 virtual tokens)."""
    adapter = case.attached()
    length = 64 - case.method.virtual_token_count - 1
    rows = random_rows(length, length, length, seed=6)
    decoded = forced(adapter.model, rows, 3)
    for row, steps in zip(rows, decoded, strict=True):
        whole = logits(adapter.model, [row])[2:-1]
        assert distance(steps, whole) <= 1e-5
    for steps, other in zip(decoded, reversed(forced(adapter.model, rows[::-1], 3)), strict=True):
        assert distance(steps, other) <= 1e-5
    prompts = [rows[0][:9], rows[1][:2], rows[2][:5]]
    together = generate(adapter.model, prompts, [], max_new_tokens=8)
    assert together == [generate(adapter.model, [prompt], [], max_new_tokens=8)[0] for prompt in prompts]


@invariant
def I22_packed_is_alone_and_no_row_reaches_another(case: Case) -> None:
    base, _ = case.based(torch.float64)
    bound = 1e-10 if case.family == "gpt2" else 1e-5
    rows = case.rows
    with torch.no_grad():
        packed = pack_logprobs(base.model, pack_flat(rows))
        alone = torch.cat([pack_logprobs(base.model, pack_flat([row])) for row in rows])
        tree = pack_logprobs(base.model, pack_tree(rows))
        changed = [
            TokenRow([*row.ids[:1], 4, *row.ids[2:]], row.target_indices, row.where) if n == 1 else row
            for n, row in enumerate(rows)
        ]
        other = pack_logprobs(base.model, pack_flat(changed))
    assert distance(packed, alone) <= bound
    assert distance(tree, alone) <= bound
    same = [n for n in range(len(rows)) if n != 1]
    assert torch.equal(other[same], packed[same]), "a token of one row changed another row's loss"
    assert other[1] != packed[1]


@invariant
def I23_the_cut_into_packs_does_not_change_gradients(case: Case) -> None:
    base, adapter = case.based(torch.float64)
    whole = case.gradients(base.model, adapter, case.rows, [8])
    bound = 1e-9 if case.family == "gpt2" else 1e-4
    for cut in ([4, 4], [1] * 8, [5, 1, 2]):
        for name, gradient in case.gradients(base.model, adapter, case.rows, cut).items():
            assert distance(gradient, whole[name]) <= bound, f"{name}, cut {cut}"
    forked = FORKED if case.rows is ROWS else case.rows
    flat = case.gradients(base.model, adapter, forked, [len(row_groups(forked))])
    for name, gradient in case.gradients(base.model, adapter, forked, [len(row_groups(forked))], pack_tree).items():
        assert distance(gradient, flat[name]) <= bound, f"{name}, what rows begin with computed once"


@invariant
def I24_activation_recomputation_changes_nothing(case: Case) -> None:
    base, adapter = case.based()
    plain = case.gradients(base.model, adapter, case.rows, [8])
    recompute = getattr(base.model, "activation_checkpointing_enable", base.model.gradient_checkpointing_enable)
    recompute({"use_reentrant": False})
    for module in base.model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.training = True  # Transformers recomputes in training mode alone; the dropout inside stays off
    again = case.gradients(base.model, adapter, case.rows, [8])
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[name], plain[name]) for name in plain)


@invariant
def I25_attention_implementations_agree(case: Case) -> None:
    """Transformers' own forward pass, by sdpa and eager, and the packed one."""
    if case.method.virtual_token_count and case.family == "gemma3":
        skip("outside Trimtab's own forward pass, virtual tokens and sliding windows are refused")
    row = ROWS[1].ids
    found = []
    for own in ("sdpa", "eager"):
        model = case.fresh()
        model.set_attn_implementation(own)
        case.attached(model)
        with torch.no_grad():
            found.append(model(input_ids=torch.tensor([row]), use_cache=False).logits[0])
        found.append(logits(model, [row]))
    assert all(distance(other, found[0]) <= 1e-5 for other in found[1:])
    assert abs(float((found[1] - found[0]).mean())) <= 1e-6


@invariant
def I26_masters_are_float32_on_a_base_of_fewer_bits(case: Case) -> None:
    base, adapter = case.based(torch.bfloat16)
    assert {p.dtype for p in adapter.parameters().values()} == {torch.float32}
    found = case.gradients(base.model, adapter, case.first(3), [3])
    assert all(bool(g.isfinite().all()) for g in found.values())
    assert bool(logits(base.model).isfinite().all())


@invariant
def I29_works_on_peculiar_models_or_refuses(case: Case) -> None:
    """Tied ends, a sliding window that rows exceed, fused matrices, and experts in one tensor."""
    if case.family != "llama":
        skip("does not depend on the family: run once")
    for family in ("llama-tied", "mistral", "phi3", "gemma2"):
        other = Case(case.method, family, case.folder, case.objective)
        base, adapter = other.based()
        _all_learn(case, base.model, adapter)
    experts = _experts()
    refusals: list[TrimtabError] = []
    try:
        adapter = attach(experts, case.method, sample=SAMPLE)
    except TrimtabError as error:
        refusals.append(error)
    if refusals:
        assert "experts" in str(refusals[0])
        return
    perturb(adapter.parameters(), 0.1)
    _all_learn(case, experts, adapter)


def _all_learn(case: Case, model: nn.Module, adapter: Attached) -> None:
    found = case.gradients(model, adapter, case.rows, [8])
    assert found.keys() == adapter.parameters().keys()
    assert all(bool(gradient.abs().sum() > 0) for gradient in found.values())


@invariant
def I33_the_parameter_count_is_the_formula(case: Case) -> None:
    model = case.fresh()
    expected = case.method.parameter_count(model)
    adapter = case.attached(model)
    assert sum(p.numel() for p in adapter.parameters().values()) == expected > 0
    assert case.method.parameter_count(model) == expected


# Files


@invariant
def I12_saving_twice_gives_the_same_bytes(case: Case) -> None:
    base, adapter = case.based()
    for name in ("one", "two"):
        save_adapter(base, adapter, case.folder / name)
    assert _bytes(case.folder / "one") == _bytes(case.folder / "two") != {}


@invariant
def I13_tensors_fit_exactly_or_are_refused(case: Case) -> None:
    _, adapter = case.based()
    before = adapter.state()
    name, tensor = next(iter(before.items()))
    for change in (
        {name: None},
        {"extra": torch.zeros(1)},
        {name: torch.zeros(*tensor.shape, 2)},
        {name: tensor.to(torch.int32)},
        {name: tensor * float("nan")},
    ):
        with pytest.raises(ArtifactError):
            adapter.load_state({n: t for n, t in (before | change).items() if t is not None})
        assert all(torch.equal(t, before[n]) for n, t in adapter.state().items())


@invariant
def I14_another_base_or_an_edited_folder_is_refused(case: Case) -> None:
    base, adapter = case.based()
    save_adapter(base, adapter, case.folder / "saved")
    with pytest.raises(ArtifactError, match="different weights"):
        load_adapter(Base(case.fresh(seed=1)), case.folder / "saved")
    with pytest.raises(ArtifactError, match="different weights"):
        load_adapter(Base(case.fresh(torch.bfloat16)), case.folder / "saved")
    for path in sorted((case.folder / "saved").iterdir()):
        content = path.read_bytes()
        for at in range(7, len(content), max(1, len(content) // 5)):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with pytest.raises(ArtifactError):
                load_adapter(Base(case.fresh()), case.folder / "saved")
        path.write_bytes(content)
    load_adapter(Base(case.fresh()), case.folder / "saved")


@invariant
def I32_the_same_seed_gives_the_same_bytes(case: Case) -> None:
    folders = []
    for name in ("one", "two"):
        base, adapter = case.based(moved=False)
        case.learn(base, adapter, 2)
        save_adapter(base, adapter, case.folder / name)
        folders.append(_bytes(case.folder / name))
    assert folders[0] == folders[1] != {}


# Several adapters


@invariant
def I19_adapters_leave_each_other_alone(case: Case) -> None:
    base = Base(case.fresh())
    first, second = (case.attached(base.model, name=name, seed=n) for n, name in enumerate(("a", "aa")))
    with active(base.model, "a"):
        before = logits(base.model)
    state = first.state()
    case.learn(base, second, 1)
    second.detach()
    assert all(torch.equal(t, state[n]) for n, t in first.state().items())
    assert list(adapters(base.model)) == ["a"]
    with active(base.model, "a"):
        assert torch.equal(logits(base.model), before)


@invariant
def I20_a_row_of_a_mixed_batch_is_the_row_alone(case: Case) -> None:
    model = case.fresh()
    for n, name in enumerate(("a", "b")):
        case.attached(model, name=name, seed=n)
    owners = ["a", None, "b", "b", None, "a", None, "b"]
    with torch.no_grad():
        mixed = pack_logprobs(model, pack_flat(ROWS), owners)
        alone = []
        for row, owner in zip(ROWS, owners, strict=True):
            with active(model, *([owner] if owner else [])):
                alone.append(pack_logprobs(model, pack_flat([row])))
    assert distance(mixed, torch.cat(alone)) <= 1e-5


@invariant
def I34_threads_with_different_adapters_do_not_interfere(case: Case) -> None:
    model = case.fresh()
    for n, name in enumerate(("a", "b")):
        case.attached(model, name=name, seed=n)
    expected = {}
    for name in ("a", "b"):
        with active(model, name):
            expected[name] = logits(model)
    assert not torch.equal(expected["a"], expected["b"])
    wrong = []

    def work(name: str) -> None:
        for _ in range(4):
            with active(model, name):
                if not torch.equal(logits(model), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def _merged_or_refused(base: Base, adapter: Attached, folder: Path) -> Any:
    try:
        return merge(base, adapter, folder)
    except NotMergeable as error:
        if adapter.method.name != "bitfit":
            raise
        return skip(f"the architecture has no place for it: {error}")


def _bytes(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("adapter*.json"))
    }


def _experts() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, head_dim=8,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config).eval()


ELSEWHERE = {
    "I09": "every method's forward pass against its equation in float64: the test files of the methods, see REFERENCES",
    "I11": "one process for all: test_invariants.py, test_a_fresh_process_reads_what_was_saved",
    "I27": "no run can be continued yet (issue 6)",
    "I28": "no run can be continued yet (issue 6)",
    "I30": "where DPO and KTO start: tests/test_preference.py",
    "I31": "export to PEFT's format: tests/test_peft*.py; other targets do not exist yet",
    "I35": "one run a method: test_invariants.py, test_it_learns_rows_by_heart",
}
"""Invariants that are not a function of one case, or whose subject does not exist yet."""
LEARNING = ("I03", "I06", "I07", "I08", "I22", "I23", "I24", "I26", "I29", "I32")
"""Those in which something is learned, or packed to be: they hold for every objective."""
METHODS = sorted(Method.names(), key=lambda name: name != "lora")
CASES = combinations(METHODS, list(FAMILIES))
"""Each method on two families, and LoRA on all of them; `make whole` takes every method on every family."""


def case_of(name: str, family: str, folder: Path, objective: str = "sft") -> Case:
    return Case(method_of(name), family, folder, Objective.pick(objective).resolve_auto(JUDGED))
