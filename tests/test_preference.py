"""What a preference objective compares with: never the wrong model, never computed twice, always said."""

import json
import math
import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from families import method_of, perturb, random_rows, tiny
from test_objectives import rows_of
from worlds import combinations, make_model, write_rows

from trimtab import api, cli
from trimtab.base import Base, ModelConfig
from trimtab.core import files
from trimtab.core.errors import NonFinite, RecipeError, WrongReference
from trimtab.data import pack_all, row_groups
from trimtab.data.mismatched import with_mismatched
from trimtab.deploy import save_adapter
from trimtab.engine import pack_divergences, pack_logprobs
from trimtab.evaluate import reference, score_loss
from trimtab.evaluate.reference import add_reference_logprobs, divergence
from trimtab.methods import Method, Sample, attach
from trimtab.methods.lora import LoRA
from trimtab.objectives import Objective
from trimtab.report import RunObserver
from trimtab.run.recipe import Recipe
from trimtab.run.script import run_recipe
from trimtab.run.start import prepare_objective

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


PAIRS, JUDGED = rows_of("pairs"), rows_of("judged")


def base_with(method="lora", *, trained=False, seed=0):
    base = Base(tiny("llama"))
    adapter = attach(base.model, method_of(method), seed=seed, sample=Sample(rows=random_rows(40, seed=5)))
    if trained:
        perturb(adapter.parameters(), 0.1)
        adapter.trained = True
    return base, adapter


def start_of(objective, base, adapter, rows):
    objective, (train, _), facts = prepare_objective(objective, base, adapter, (rows, []), 0, None)
    return score_loss(base, train, 64, objective), train, facts


def logprob(base, row):
    from trimtab.data import pack_flat

    with torch.no_grad():
        return float(pack_logprobs(base.model, pack_flat([row])))


# Where training starts (I30)


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", Method.names())
def test_every_method_starts_as_its_reference(name, trained):
    """DPO at ln 2 with margins of 0, KTO at half the weight with a divergence of 0; for an adapter that is trained on, too."""
    base, adapter = base_with(name, trained=trained)
    as_base = adapter.method.identity_at_init
    scored, rows, facts = start_of(Objective.pick("dpo"), base, adapter, PAIRS)
    assert facts["kind"] == ("start" if trained else "base")
    if trained or as_base:
        assert scored.loss == pytest.approx(math.log(2), abs=1e-6)
        assert abs(scored.measures["margin"]) < 1e-5
        assert scored.measures["accuracy"] == 0.5  # no preference yet, whatever rounding says
        assert facts["start_differs"] < 1e-4
    else:  # a prefix that is no prefix yet: the reference is the base all the same
        assert "start_differs" not in facts
        with adapter.disabled():
            assert rows[0].reference == pytest.approx(logprob(base, rows[0]), abs=1e-4)
    scored, rows, _ = start_of(Objective.pick("kto"), base, adapter, JUDGED)
    assert [row.side for row in rows][1::2] == ["mismatched"] * len(JUDGED)
    if trained or as_base:
        assert scored.measures["kl"] == pytest.approx(0.0, abs=1e-4)
        assert scored.measures["accuracy"] == 0.5
        weights = Objective.pick("kto").resolve_auto(JUDGED)
        good = sum(row.side == "good" for row in JUDGED)
        mean = (good * weights.desirable + (len(JUDGED) - good) * weights.undesirable) / len(JUDGED)
        assert scored.loss == pytest.approx(mean / 2, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "objective"),
    combinations(sorted(Method.names(), key=lambda name: name != "lora"), ["dpo", "kto", "orpo", "simpo", "cpo"]),
)
def test_every_method_learns_by_every_objective(name, objective):
    base, adapter = base_with(name)
    picked, before = Objective.pick(objective), base.fingerprint["weights"]
    rows = PAIRS if picked.data_kind == "pairs" else JUDGED
    losses = [
        step.loss for step in api.fit(base, adapter, rows, picked, epochs=30, rows_per_step=6, lr=3e-2, schedule="constant")
    ]
    assert losses[-1] < losses[0] - 0.01
    assert all(map(math.isfinite, losses))
    assert adapter.trained
    adapter.detach()
    assert Base(base.model).fingerprint["weights"] == before


def test_the_base_as_the_reference_of_an_adapter_that_was_trained_is_caught():
    """LLaMA-Factory #8459: the base instead of what training starts from."""
    base, adapter = base_with(trained=True)
    adapter.trained = False  # the fault
    with pytest.raises(WrongReference, match="row:0: the model that training starts from"):
        start_of(Objective.pick("dpo"), base, adapter, PAIRS)


def test_a_reference_that_was_spoilt_in_the_cache_is_caught(home):
    base, adapter = base_with()
    start_of(Objective.pick("dpo"), base, adapter, PAIRS)
    (path,) = (home / "reference").glob("*.json")
    known = {key: value - 0.5 for key, value in json.loads(path.read_text())["logprobs"].items()}
    reference._write(path, known)  # whole, and wrong
    with pytest.raises(WrongReference, match="name the right one with objective"):
        start_of(Objective.pick("dpo"), base, adapter, PAIRS)


def test_dropout_is_refused_where_answers_are_compared():
    base = Base(tiny("llama"))
    adapter = attach(base.model, LoRA(rank=2, dropout=0.1))
    for name, rows in (("dpo", PAIRS), ("kto", JUDGED)):
        with pytest.raises(RecipeError, match=f"{name} compares with a reference model, and dropout"):
            prepare_objective(Objective.pick(name), base, adapter, (rows, []), 0, None)
    prepare_objective(Objective.pick("simpo"), base, adapter, (PAIRS, []), 0, None)


# Computed once


def test_what_the_reference_makes_of_a_row_is_computed_once(home, monkeypatch):
    base, adapter = base_with()
    first = add_reference_logprobs(base, adapter, "auto", PAIRS, 64)
    assert first.facts["computed"] == len(PAIRS)
    for row in first.rows:
        assert row.reference == pytest.approx(logprob(base, row), abs=1e-4)
    monkeypatch.setattr(reference, "pack_logprobs", lambda *_: pytest.fail("computed again"))
    again = add_reference_logprobs(base, adapter, "auto", PAIRS[::-1], 20)
    assert again.rows == first.rows[::-1]
    assert again.facts["computed"] == 0
    monkeypatch.undo()


@pytest.mark.usefixtures("home")
def test_rows_that_are_new_are_all_that_is_computed(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    base, adapter = base_with()
    add_reference_logprobs(base, adapter, "base", PAIRS[:6], 64)
    assert add_reference_logprobs(base, adapter, "base", PAIRS, 64).facts["computed"] == len(PAIRS) - 6


def test_another_model_or_adapter_is_another_reference(home):
    base, adapter = base_with(trained=True)
    identities = {add_reference_logprobs(base, adapter, kind, PAIRS, 64).facts["identity"] for kind in ("base", "start")}
    perturb(adapter.parameters(), 0.1, seed=3)
    identities.add(add_reference_logprobs(base, adapter, "start", PAIRS, 64).facts["identity"])
    other = Base(tiny("llama", seed=1))
    identities.add(add_reference_logprobs(other, attach(other.model, LoRA(rank=2)), "base", PAIRS, 64).facts["identity"])
    assert len(identities) == 4
    assert len(list((home / "reference").glob("*.json"))) == 4


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "list"])
def test_a_damaged_cache_is_made_anew(home, damage):
    base, adapter = base_with()
    first = add_reference_logprobs(base, adapter, "base", PAIRS, 64)
    (path,) = (home / "reference").glob("*.json")
    text = path.read_text()
    place = text.index(": -") + 4
    digit = "1" if text[place] != "1" else "2"
    path.write_text({"flip": text[:place] + digit + text[place + 1 :], "cut": text[:-9], "empty": "", "list": "[]"}[damage])
    again = add_reference_logprobs(base, adapter, "base", PAIRS, 64)
    assert again.facts["computed"] == len(PAIRS)
    assert again.rows == first.rows


def test_the_oldest_reference_goes_first(home, monkeypatch):
    monkeypatch.setattr(reference, "MAX_CACHED", 2)
    base, adapter = base_with(trained=True)
    for seed in range(4):
        perturb(adapter.parameters(), 0.1, seed=seed)
        add_reference_logprobs(base, adapter, "start", PAIRS[:2], 64)
    assert len(list((home / "reference").glob("*.json"))) == 2


def test_a_broken_reference_is_refused():
    base, adapter = base_with()
    with torch.no_grad():
        base.model.model.norm.weight[0] = float("nan")
    with pytest.raises(NonFinite, match="the reference model gives it"):
        add_reference_logprobs(base, adapter, "base", PAIRS, 64)


def test_the_reference_can_be_a_saved_adapter(tmp_path):
    base, saved = base_with(trained=True)
    save_adapter(base, saved, tmp_path / "saved")
    expected = [logprob(base, row) for row in PAIRS]
    saved.detach()
    adapter = attach(base.model, LoRA(rank=2))
    perturb(adapter.parameters(), 0.2, seed=9)
    before = logprob(base, PAIRS[0])
    rows = add_reference_logprobs(base, adapter, str(tmp_path / "saved"), PAIRS, 64).rows
    assert [row.reference for row in rows] == pytest.approx(expected, abs=1e-4)
    assert logprob(base, PAIRS[0]) == before  # what is trained acts again, alone
    assert all(p.requires_grad for p in adapter.parameters().values())


# How far the model is from it


def own_divergence(base, other, rows):
    """KL(p ‖ q) before each learned token, from whole logits in float64, one row at a time."""
    found = []
    for row in rows:
        p, q = (model(torch.tensor([row.ids]), use_cache=False).logits[0].double().log_softmax(-1) for model in (base, other))
        found += [(p[t - 1].exp() * (p[t - 1] - q[t - 1])).sum() for t in row.target_indices]
    return float(torch.stack(found).mean())


def switched(model, inside):
    """A model as it is within a block."""

    def call(*args, **kwargs):
        with inside():
            return model(*args, **kwargs)

    return call


@pytest.mark.parametrize(
    "method",
    [
        LoRA(rank=2),
        LoRA(rank=2, targets=("q_proj", "lm_head")),
        *map(method_of, ("prefix", "bottleneck", "ia3", "prompt", "full")),
    ],
    ids=lambda one: one.name,
)
@torch.no_grad()
def test_the_divergence_is_that_of_whole_distributions(method):
    base = Base(tiny("llama"))
    adapter = attach(base.model, method, sample=Sample(rows=random_rows(40, seed=5)))
    perturb(adapter.parameters(), 0.3)
    expected = own_divergence(base.model, switched(base.model, adapter.disabled), PAIRS)
    assert expected > 1e-3
    for tokens in (16, 200):
        assert divergence(base, adapter, "base", PAIRS, tokens) == pytest.approx(expected, rel=1e-4)
    with adapter.disabled():
        assert divergence(base, adapter, "base", PAIRS, 64) == 0.0


@torch.no_grad()
def test_the_divergence_from_a_saved_adapter(tmp_path):
    base, saved = base_with("bottleneck", trained=True)
    save_adapter(base, saved, tmp_path / "saved")
    saved.detach()
    adapter = attach(base.model, LoRA(rank=2))
    perturb(adapter.parameters(), 0.3)
    twin, _ = base_with("bottleneck", trained=True)
    expected = own_divergence(base.model, twin.model, PAIRS)
    assert divergence(base, adapter, str(tmp_path / "saved"), PAIRS, 64) == pytest.approx(expected, rel=1e-4)
    assert float(own_divergence(base.model, twin.model, PAIRS)) == pytest.approx(expected)  # the adapter acts again, alone


@torch.no_grad()
def test_the_divergence_from_another_model_whose_vocabulary_is_padded(world):
    base = Base.load(ModelConfig(name=str(world / "tiny")))
    adapter = attach(base.model, LoRA(rank=2))
    other = Base.load(ModelConfig(name=str(world / "other")))
    rows = [replace(row, ids=[n % len(base.tokenizer) for n in row.ids]) for row in PAIRS]
    expected = own_divergence(base.model, other.model, rows)
    assert expected > 1e-4
    assert divergence(base, adapter, str(world / "other"), rows, 64) == pytest.approx(expected, rel=1e-4)
    back = own_divergence(other.model, base.model, rows)
    size = len(other.model.get_output_embeddings().weight)
    other.model.resize_token_embeddings(size + 5)
    other.model.get_output_embeddings().weight[size:] = 50.0  # were they counted, nothing else would be likely

    def found(one, two):
        nats = sum(float(pack_divergences(one, two, nullcontext, pack).sum()) for pack in pack_all(rows, 64))
        return nats / sum(len(row.target_indices) for row in rows)

    assert found(base.model, other.model) == pytest.approx(expected, rel=1e-4)
    assert found(other.model, base.model) == pytest.approx(back, rel=1e-4)


def test_other_code_makes_the_numbers_of_the_reference_anew(monkeypatch):
    base, adapter = base_with()
    add_reference_logprobs(base, adapter, "base", PAIRS, 64)
    assert add_reference_logprobs(base, adapter, "base", PAIRS, 64).facts["computed"] == 0
    first = add_reference_logprobs(base, adapter, "base", PAIRS, 64).facts["identity"]
    monkeypatch.setattr(reference, "_code_version", lambda: "other")
    again = add_reference_logprobs(base, adapter, "base", PAIRS, 64).facts
    assert again["computed"] == len(PAIRS)
    assert again["identity"] == first  # the model is the same: a run of before can still be evaluated


# Whole runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = tmp_path_factory.mktemp("world")
    make_model(world / "tiny", 0)
    make_model(world / "other", 1)
    write_rows(world / "sft.jsonl", [{"prompt": f"Is {n} a number?", "completion": "yes"} for n in range(24)])
    write_rows(world / "pairs.jsonl", [{"prompt": f"Is {n} a number?", "chosen": "yes", "rejected": "no"} for n in range(24)])
    write_rows(
        world / "judged.jsonl",
        [{"prompt": f"Is {n} a number?", "completion": ("yes", "no")[n % 2], "label": n % 2 == 0} for n in range(24)],
    )
    return world


def recipe(world, tmp_path, **keys):
    raw = {
        "model": str(world / "tiny"),
        "output": str(tmp_path / "run"),
        "train": {"epochs": 3, "rows_per_step": 8, "lr": 1e-2},
        "certify": False,
        **keys,
    }
    return Recipe.parse(raw)


@pytest.mark.parametrize("name", ["dpo", "kto", "orpo", "simpo", "cpo"])
def test_a_recipe_trains_by_preference(world, tmp_path, name):
    data = "judged" if name == "kto" else "pairs"
    run = run_recipe(recipe(world, tmp_path, objective=name, data={"train": str(world / f"{data}.jsonl"), "eval": 6}))
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    evals = [line for line in lines if line["kind"] == "eval"]
    assert evals[-1]["loss"] < evals[0]["loss"]
    assert evals[-1]["accuracy"] == 1.0
    assert {"accuracy", "good_reward" if name == "kto" else "margin"} <= lines[-2].keys()
    needs_reference = name in ("dpo", "kto")
    assert (run.record["reference"] is not None) == needs_reference
    if name == "dpo":
        assert evals[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert run.record["reference"]["kind"] == "base"
    if name == "kto":
        assert isinstance(run.record["objective"]["desirable"], float)
    again = run_recipe(Recipe.read(run.folder / "recipe.yaml").model_copy(update={"output": tmp_path / "again"}))
    assert again.record["best"] == run.record["best"] | {"folder": again.record["best"]["folder"]}
    assert files.sha256_file(again.folder / "adapter/adapter_model.safetensors") == files.sha256_file(
        run.folder / "adapter/adapter_model.safetensors"
    )


def test_preference_after_supervised_training_keeps_its_lineage(world, tmp_path, capsys):
    first = run_recipe(
        recipe(
            world,
            tmp_path,
            output=str(tmp_path / "sft"),
            data={"train": str(world / "sft.jsonl"), "eval": 4},
            method={"rank": 3},
        )
    )
    second = run_recipe(
        recipe(
            world, tmp_path, start=str(tmp_path / "sft"), objective="dpo", data={"train": str(world / "pairs.jsonl"), "eval": 6}
        )
    )
    assert second.record["reference"]["kind"] == "start"
    assert second.record["method"] == first.record["method"]
    assert second.record["start"]["weights"] == files.sha256_file(first.folder / "adapter/adapter_model.safetensors")
    manifest = json.loads((second.folder / "adapter/trimtab.json").read_text())["trained"]
    assert manifest["start"]["trained"]["data_digest"] == first.record["data_digest"]
    assert manifest["data_digest"] == second.record["data_digest"]
    evals = [json.loads(line) for line in (second.folder / "metrics.jsonl").read_text().splitlines() if '"eval"' in line]
    assert evals[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert evals[-1]["margin"] > 0
    # Divergence is from the adapter that training started from: without learning there is none, and the base has some.
    data, train = {"train": str(world / "pairs.jsonl"), "eval": 6}, {"epochs": 1, "rows_per_step": 16, "lr": 1e-12}
    still = run_recipe(
        recipe(
            world,
            tmp_path,
            start=str(tmp_path / "sft"),
            objective="dpo",
            data=data,
            train=train,
            output=str(tmp_path / "still"),
        )
    )
    for folder, moved in ((second.folder, True), (still.folder, False)):
        assert cli.main(["eval", str(folder), "--base", "--json"]) == 0
        scores = json.loads(capsys.readouterr().out)
        assert (scores["divergence"] > 1e-3) == moved
        assert scores["base"]["divergence"] > 1e-3
    repeated = Recipe.read(second.folder / "recipe.yaml").model_copy(update={"output": tmp_path / "again"})
    assert run_recipe(repeated).record["reference"]["identity"] == second.record["reference"]["identity"]


def test_an_adapter_trained_with_dropout_is_compared_without(world, tmp_path):
    """As in a course: SFT with dropout, then DPO on top."""
    sft = {"train": str(world / "sft.jsonl"), "eval": 4}
    run_recipe(recipe(world, tmp_path, output=str(tmp_path / "sft"), data=sft, method={"rank": 3, "dropout": 0.5}))
    pairs = {"train": str(world / "pairs.jsonl"), "eval": 6}
    told = []

    class Notices(RunObserver):
        def on_notice(self, message):
            told.append(message)

    asked = {"start": str(tmp_path / "sft"), "data": pairs, "train": {"epochs": 1, "rows_per_step": 16}}
    run = run_recipe(recipe(world, tmp_path, objective="dpo", **asked), Notices())
    assert "the adapter was trained with dropout 0.5, and is trained further without: dpo compares with a reference" in told
    assert (run.record["method"]["dropout"], run.record["start"]["dropout"]) == (0.0, 0.5)
    assert run.record["reference"]["start_differs"] < 1e-4
    repeated = Recipe.read(run.folder / "recipe.yaml").model_copy(update={"output": tmp_path / "again"})
    assert run_recipe(repeated).record["best"]["eval_loss"] == run.record["best"]["eval_loss"]
    kept = run_recipe(recipe(world, tmp_path, **asked | {"data": sft}, output=str(tmp_path / "sft again")))
    assert kept.record["method"]["dropout"] == 0.5, "other objectives keep it"
    method = {"rank": 3, "dropout": 0.5}
    with pytest.raises(RecipeError, match=r"dropout would add noise to the difference"):
        run_recipe(recipe(world, tmp_path, objective="dpo", **asked, method=method, output=str(tmp_path / "said")))


def test_a_start_that_does_not_fit_is_refused(world, tmp_path):
    data = {"train": str(world / "sft.jsonl"), "eval": 4}
    run_recipe(recipe(world, tmp_path, output=str(tmp_path / "sft"), data=data, method={"rank": 3}))
    for keys, words in (
        ({"start": str(tmp_path / "nothing")}, "is no run or adapter folder"),
        ({"start": str(tmp_path / "sft"), "method": {"rank": 4}}, "training starts from, has another"),
        ({"start": str(tmp_path / "sft"), "model": str(world / "other")}, "trained on another base"),
    ):
        with pytest.raises(Exception, match=words):
            run_recipe(recipe(world, tmp_path, data=data, **keys))
        assert not (tmp_path / "run").exists()


def test_the_reference_can_be_another_model_of_the_same_tokenizer(world, tmp_path):
    data = {"train": str(world / "pairs.jsonl"), "eval": 6}
    run = run_recipe(recipe(world, tmp_path, data=data, objective={"name": "dpo", "reference": str(world / "other")}))
    assert run.record["reference"]["kind"] == str(world / "other")
    shutil.copytree(world / "other", tmp_path / "strange")
    text = (tmp_path / "strange/tokenizer.json").read_text()
    (tmp_path / "strange/tokenizer.json").write_text(text.replace('"add_prefix_space": false', '"add_prefix_space": true', 1))
    with pytest.raises(RecipeError, match="another tokenizer"):
        run_recipe(
            recipe(
                world,
                tmp_path,
                output=str(tmp_path / "run2"),
                data=data,
                objective={"name": "dpo", "reference": str(tmp_path / "strange")},
            )
        )


def test_a_row_that_a_step_holds_is_counted_once(world, tmp_path):
    run = run_recipe(recipe(world, tmp_path, objective="kto", data={"train": str(world / "judged.jsonl"), "eval": 6}))
    steps = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert [step["items"] for step in steps] == [8] * 6 + [6]
    assert len(row_groups(with_mismatched(JUDGED, 0))) == len(JUDGED)


SAID = {"chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize("name", ["dpo", "kto", "simpo"])
def test_eval_tells_what_the_runs_objective_makes_of_its_held_out_rows(world, tmp_path, capsys, name):
    data = {"train": str(world / ("judged.jsonl" if name == "kto" else "pairs.jsonl")), "eval": 6}
    run = run_recipe(recipe(world, tmp_path, objective=name, data=data))
    last = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines() if '"eval"' in line]
    best = next(line for line in last if line["step"] == run.record["best"]["step"])
    assert cli.main(["eval", str(run.folder), "--base", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["loss"] == pytest.approx(best["loss"], abs=1e-5)
    assert told["accuracy"] == best["accuracy"]
    assert told["base"]["loss"] == pytest.approx(last[0]["loss"], abs=1e-5)
    assert told["divergence"] > 0.01
    assert told["base"]["divergence"] == 0.0
    assert cli.main(["eval", str(run.folder), "--base"]) == 0
    assert f"6 examples, {name}" in capsys.readouterr().out
    assert cli.main(["eval", str(run.folder), "--base", "--show", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    sides = {"answer", "question", *(() if name == "kto" else ("chosen", "rejected"))}
    for one in (told, told["base"]):
        assert len(one["answers"]) == 2
        assert all(sides <= answer.keys() for answer in one["answers"])
        for a in one["answers"]:
            for side in sides & {"chosen", "rejected"}:
                assert a[side]["text"] == SAID[side]
        assert {a["answer"]["tokens"] == 0 for a in one["answers"]} == {a["answer"]["text"] == "" for a in one["answers"]}
    assert cli.main(["eval", str(run.folder), "--base", "--show", "2"]) == 0
    shown = capsys.readouterr().out
    assert "tokens on average: " in shown
    assert "Is " in shown
    # Rows of answers are scored as for any other adapter.
    assert cli.main(["eval", str(run.folder), "--data", str(world / "sft.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exact_match"] is not None


def test_a_reference_that_has_changed_since_is_not_compared_with(world, tmp_path, capsys):
    sft = run_recipe(recipe(world, tmp_path, output=str(tmp_path / "sft"), data={"train": str(world / "sft.jsonl"), "eval": 4}))
    data = {"train": str(world / "pairs.jsonl"), "eval": 6}
    run = run_recipe(recipe(world, tmp_path, start=str(sft.folder), objective="dpo", data=data))
    assert cli.main(["eval", str(run.folder)]) == 0
    shutil.rmtree(sft.folder)
    run_recipe(recipe(world, tmp_path, output=str(sft.folder), data={"train": str(world / "sft.jsonl"), "eval": 8}))
    assert cli.main(["eval", str(run.folder)]) == 4
    assert "has changed since" in capsys.readouterr().err


@pytest.mark.parametrize(("method", "name"), combinations(["prefix", "lora", "ia3", "ptuning", "prompt"], ["dpo", "kto"]))
def test_a_fresh_adapter_can_be_the_reference(world, tmp_path, capsys, method, name):
    """Where one starts as its base that is the base; a fresh prefix is kept by the run, without what made its values."""
    data = {"train": str(world / ("judged.jsonl" if name == "kto" else "pairs.jsonl")), "eval": 6}
    objective, train = {"name": name, "reference": "start"}, {"epochs": 2, "rows_per_step": 8, "lr": 1e-2}
    run = run_recipe(recipe(world, tmp_path, objective=objective, data=data, method=method, train=train))
    virtual = not Method.member(method).identity_at_init
    assert run.record["reference"]["kind"] == ("start" if virtual else "base")
    assert run.record["reference"]["start_differs"] < 1e-4
    assert (run.folder / "start").is_dir() == virtual
    last = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines() if '"eval"' in line]
    best = next(line for line in last if line["step"] == run.record["best"]["step"])
    if name == "dpo":
        assert last[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    run.folder.rename(tmp_path / "elsewhere")
    assert cli.main(["eval", str(tmp_path / "elsewhere"), "--base", "--json"]) == 0, capsys.readouterr().err
    told = json.loads(capsys.readouterr().out)
    assert told["loss"] == pytest.approx(best["loss"], abs=1e-4)
    assert told["divergence"] > 1e-3
    assert (told["base"]["divergence"] > 1e-3) == virtual


def test_a_run_with_a_fresh_reference_goes_on_with_it(world, tmp_path):
    data, train = (
        {"train": str(world / "pairs.jsonl"), "eval": 6},
        {"epochs": 2, "rows_per_step": 8, "lr": 1e-2, "evaluate_every": 2},
    )
    keys = {"objective": {"name": "dpo", "reference": "start"}, "data": data, "method": "prefix", "train": train}
    whole = run_recipe(recipe(world, tmp_path, output=str(tmp_path / "whole"), **keys))

    class Interrupting(RunObserver):
        def logged(self, kind, step, values):
            if (kind, step) == ("train", 3):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(world, tmp_path, **keys), Interrupting())
    run = run_recipe(recipe(world, tmp_path, **keys))
    for name in ("start", "adapter"):
        assert files.sha256_file(run.folder / name / "adapter_model.safetensors") == files.sha256_file(
            whole.folder / name / "adapter_model.safetensors"
        )


def test_a_reference_is_found_from_wherever_the_run_is_measured(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(world)
    data = {"train": "pairs.jsonl", "eval": 6}
    run = run_recipe(recipe(world, tmp_path, data=data, objective={"name": "dpo", "reference": "other"}))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", str(run.folder), "--json"]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["divergence"] > 1e-3
