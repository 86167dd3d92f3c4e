"""Every key of a recipe changes something: a run with another value for it has another result. A new key fails here until it has."""

import json
from typing import get_args

import pytest
import torch
import transformers
from families import method_of
from pydantic import BaseModel
from templates import CHATML, base_of, bytes_tokenizer
from worlds import dataset_card

from trimtab.base import Base, ModelConfig
from trimtab.core.errors import ArtifactError, DataError, RecipeError
from trimtab.data import Conversation, Source
from trimtab.deploy import load_adapter, load_model, merge
from trimtab.distributed import Engine
from trimtab.evaluate import EvalConfig, score
from trimtab.methods import Method
from trimtab.objectives import Objective
from trimtab.run import script, validation
from trimtab.run.recipe import Recipe
from trimtab.run.script import run_recipe
from trimtab.train import UpdateRule


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two tiny models, and data that each key can act on."""
    work = tmp_path_factory.mktemp("work")
    for seed, name in enumerate(("tiny", "other")):
        torch.manual_seed(seed)
        base = base_of(
            bytes_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>")), CHATML, layers=2, eos_token="<|im_end|>"
        )
        base.model.save_pretrained(work / name)
        base.tokenizer.save_pretrained(work / name)
    template = base.tokenizer.chat_template
    base.tokenizer.chat_template = template.replace(
        "'<|im_end|>'", "('!' if loud else '') + strftime_now('%Y')[:0] + '<|im_end|>'"
    )
    base.model.save_pretrained(work / "switched")
    base.tokenizer.save_pretrained(work / "switched")
    rows = [{"prompt": f"Say {n}", "completion": f"{n} " * (1 + n % 4)} for n in range(24)]
    files = {
        "rows": rows,
        "other_rows": rows[::-1],
        "renamed": [{"question": row["prompt"], "completion": row["completion"]} for row in rows],
        "odd": [{**row, "images": ["x.png"]} for row in rows],
        "long": [*rows, {"prompt": "Say a lot", "completion": "word " * 60}],
        "bad": [*rows, {"prompt": "Say nothing", "completion": ""}],
        "held": [{**row, "completion": "no"} for row in rows[:3]],
        "pairs": [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no, no"} for row in rows],
        "judged": [row | {"label": n % 3 == 0} for n, row in enumerate(rows)],
    }
    for name, content in files.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (work / "texts").mkdir()
    for n in range(6):
        (work / "texts" / f"{n}.txt").write_text(f"Once upon {n} times. " * (16 if n == 3 else 2))
    (work / "parts").mkdir()
    for n, part in enumerate(("first", "second", "first_test")):
        content = "".join(json.dumps({"prompt": f"{part} {k}", "completion": f"{n}"}) + "\n" for k in range(9))
        (work / "parts" / f"{part}.jsonl").write_text(content)
    (work / "parts" / "README.md").write_text(dataset_card("first", "second"))
    return work


def plain_recipe(work, **changes):
    raw = {
        "model": {"name": str(work / "tiny")},
        "data": {"train": str(work / "rows.jsonl"), "eval": 4},
        "method": {"name": "lora", "rank": 2},
        "train": {"lr": 1e-2, "rows_per_step": 4, "epochs": 1},
        "output": str(work / "runs" / "plain"),
        "certify": False,
    }
    for key, value in changes.items():
        section, _, leaf = key.partition(".")
        if leaf:
            raw[section][leaf] = value
            if value is None:
                del raw[section][leaf]
        else:
            raw[section] = value
    return Recipe.parse(raw)


def outcome(work, name, **changes):
    """What a run leaves behind, but for times: the adapter's bytes, the metrics, the account of the data."""
    folder = work / "runs" / name
    run_recipe(plain_recipe(work, **{"output": str(folder), **changes}))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in metrics:
        line.pop("seconds", None)
        line.pop("took", None)
    return _weights(folder / "adapter"), metrics, (folder / "data.json").read_text()


def _weights(folder):
    (file,) = folder.glob("*.safetensors")
    return file.read_bytes()


@pytest.fixture(scope="module")
def plain(work):
    return outcome(work, "plain")


CHANGES = {
    "model.name": lambda work: {"model.name": str(work / "other")},
    "model.dtype": lambda work: {"model.dtype": "bfloat16"},
    "model.quantize": lambda work: {"model.quantize": "nf4"},
    "data.train": lambda work: {"data.train": str(work / "other_rows.jsonl")},
    "data.eval": lambda work: {"data.eval": str(work / "held.jsonl")},
    "data.seed": lambda work: {"data.seed": 1},
    "train.epochs": lambda work: {"train.epochs": 2},
    "train.max_steps": lambda work: {"train.max_steps": 3},
    "train.rows_per_step": lambda work: {"train.rows_per_step": 3},
    "train.tokens_per_step": lambda work: {"train.rows_per_step": None, "train.tokens_per_step": 100},
    "train.lr": lambda work: {"train.lr": 1e-3},
    "train.schedule": lambda work: {"train.schedule": "linear"},
    "train.warmup": lambda work: {"train.warmup": 0.5},
    "train.optimizer": lambda work: {"train.optimizer": "adafactor"},
    "train.floor": lambda work: {"train.floor": 0.5},
    "train.weight_decay": lambda work: {"train.weight_decay": 0.5},
    "train.clip": lambda work: {"train.clip": 1e-4},
    "eval.samples": lambda work: {"eval": {"samples": 2}},
    "train.neftune": lambda work: {"train.neftune": 5.0},
    "train.evaluate_every": lambda work: {"train.evaluate_every": 1},
    "train.patience": lambda work: {"train.evaluate_every": 1, "train.patience": 1, "train.lr": 0.5, "train.warmup": 0},
    "train.seed": lambda work: {"train.seed": 1},
}


OTHER = {
    "ranks": {"q_proj": 3},
    "alphas": {"q_proj": 3.0},
    "targets": ["q_proj", "v_proj"],
    "dropout": 0.5,
    "width": 5,
    "reduction": 5,
    "rank": 3,
    "text": "Something else",
    "freeze": ["embed_tokens"],
    "layers": "1",
    "outputs": ["v_proj"],
    "inputs": ["up_proj"],
    "block_size": 8,
    "layernorm.targets": ["input_layernorm"],
    "tokens.tokens": [18, 220],
    "new": ["<say>"],
}
"""Values for the methods' keys where a small step off the default will not do."""


def another(method, key):
    """A value for a method's key that is not its default, and what else must be said for it to count."""
    kind = Method.member(method)
    field = kind.model_fields[key]
    default = field.get_default(call_default_factory=True)
    choices = [one for one in get_args(field.annotation) if isinstance(one, str) and one != default]
    if (named := OTHER.get(f"{method}.{key}", OTHER.get(key))) is not None:
        return named
    if choices:
        return choices[0]
    return not default if isinstance(default, bool) else default + 1 if isinstance(default, int) else default * 2


def small(name):
    """A method as it is by default, but that the ranks fit the tiny model."""
    return method_of(name).plain() | ({"rank": 4} if "rank" in Method.member(name).model_fields else {})


METHOD_KEYS = [(name, key) for name in Method.names() for key in Method.member(name).model_fields]


@pytest.fixture(scope="module")
def as_it_is(work):
    """What each method leaves behind with every key at its default."""
    known = {}

    def find(name):
        if name not in known:
            known[name] = outcome(work, f"method-{name}", method=small(name))
        return known[name]

    return find


@pytest.mark.parametrize(("name", "key"), METHOD_KEYS, ids=str)
def test_another_value_of_a_methods_key_gives_another_result(name, key, work, as_it_is):
    changed = small(name) | {key: another(name, key)}
    assert outcome(work, f"method-{name}-{key}", method=changed) != as_it_is(name)


OBJECTIVE_KEYS = [(name, key) for name in Objective.names() for key in Objective.member(name).model_fields]


def by_preference(work, name, **settings):
    """What a run by an objective leaves behind; two epochs, because in the first step a reference is what is trained."""
    data = str(work / ("judged.jsonl" if Objective.member(name).data_kind == "judged" else "pairs.jsonl"))
    words = "-".join(f"{key}-{value}" for key, value in settings.items()).replace("/", "_")
    return outcome(
        work, f"objective-{name}-{words}", **{"data.train": data, "train.epochs": 2}, objective={"name": name, **settings}
    )


@pytest.fixture(scope="module")
def by_default(work):
    return {name: by_preference(work, name) for name in Objective.names() if name != "sft"}


@pytest.mark.parametrize(("name", "key"), OBJECTIVE_KEYS, ids=str)
def test_another_value_of_an_objectives_key_gives_another_result(name, key, work, by_default):
    values = {"reference": str(work / "other"), "loss_type": "ipo", "label_smoothing": 0.3, "sft": 0.5}
    assert by_preference(work, name, **{key: values.get(key, 0.7)}) != by_default[name]


OPTIMIZER_KEYS = [(name, key) for name in UpdateRule.names() for key in UpdateRule.member(name).model_fields]


@pytest.fixture(scope="module")
def by_optimizer(work):
    """What each optimizer leaves behind with every key at its default; some are vectors, which not all treat as they do matrices."""
    return {name: with_optimizer(work, name) for name in UpdateRule.names()}


def with_optimizer(work, name, **settings):
    words = "-".join([name, *settings])
    return outcome(work, f"optimizer-{words}", method="dora", **{"train.optimizer": {"name": name, **settings}})


def test_every_optimizer_gives_another_result(by_optimizer):
    weights = [adapter for adapter, *_ in by_optimizer.values()]
    assert len(set(weights)) == len(weights)


@pytest.mark.parametrize(("name", "key"), OPTIMIZER_KEYS, ids=str)
def test_another_value_of_an_optimizers_key_gives_another_result(name, key, work, by_optimizer):
    if key == "paged":  # by the same numbers, in other memory
        with pytest.raises(RecipeError, match=r"train\.optimizer\.paged: only CUDA has paged memory"):
            with_optimizer(work, name, paged=True)
        return
    assert with_optimizer(work, name, **{key: {"betas": [0.5, 0.9], "eps": 1e-3, "momentum": 0.5}[key]}) != by_optimizer[name]


def test_start_trains_an_earlier_adapter_on(work, plain):
    changed = outcome(work, "started", start=str(work / "runs" / "plain"))
    assert changed != plain
    assert changed[1][0]["loss"] < plain[1][0]["loss"]


def test_decay_and_min_improvement_change_what_their_keys_do(work):
    """They are read with another key, whose result without them is what theirs is compared with."""
    wsd = {"train.schedule": "wsd"}
    assert outcome(work, "decay", **wsd, **{"train.decay": 4}) != outcome(work, "wsd", **wsd)
    patient = {"train.patience": 1, "train.evaluate_every": 1, "train.epochs": 2}
    late, early = (outcome(work, f"least-{least}", **patient, **{"train.min_improvement": least}) for least in (0.0, 9.0))
    assert len(early[1]) < len(late[1])


def test_save_every_and_keep_change_what_can_be_gone_back_to_and_nothing_else(work, plain):
    found = {}
    for name, settings in {"saved": {"train.save_every": 1}, "kept": {"train.save_every": 1, "train.keep": 9}}.items():
        assert outcome(work, name, **settings) == plain
        found[name] = sorted(int(path.name[5:]) for path in (work / "runs" / name / "checkpoints").iterdir())
    assert found == {"saved": [4, 5], "kept": [1, 2, 3, 4, 5]}
    assert sorted(path.name for path in (work / "runs" / "plain" / "checkpoints").iterdir()) == ["step-000004", "step-000005"]


@pytest.mark.parametrize("key", CHANGES)
def test_another_value_gives_another_result(key, work, plain):
    assert outcome(work, key, **CHANGES[key](work)) != plain


def test_the_same_values_give_the_same_result_to_the_last_bit(work, plain):
    assert outcome(work, "again") == plain


def test_pack_tokens_changes_how_packs_are_cut_and_not_what_is_learned(work, monkeypatch):
    from trimtab.train import loop

    sizes = []
    whole = loop.pack_logprobs

    def counting(model, pack, **others):
        sizes.append(len(pack.ids))
        return whole(model, pack, **others)

    monkeypatch.setattr(loop, "pack_logprobs", counting)
    results = []
    for tokens in (1024, 32):
        sizes.clear()
        _, metrics, _ = outcome(work, f"pack-{tokens}", **{"train.pack_tokens": tokens})
        results.append((len(sizes), [line["loss"] for line in metrics]))
    assert results[1][0] > results[0][0]
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-4)


def test_recompute_says_whether_layers_are_computed_again_and_changes_nothing_that_is_learned(work, monkeypatch):
    from trimtab.train import loop

    asked = set()
    whole = loop.pack_logprobs

    def watching(model, pack, **others):
        asked.update({others["recompute"]} if "recompute" in others else ())
        return whole(model, pack, **others)

    monkeypatch.setattr(loop, "pack_logprobs", watching)
    found = []
    for recompute in ("none", "mlp", "full", "auto"):
        asked.clear()
        _, metrics, _ = outcome(work, f"recompute-{recompute}", **{"train.recompute": recompute})
        found.append((set(asked), [line["loss"] for line in metrics]))
    assert [several for several, _ in found] == [{"none"}, {"mlp"}, {"full"}, {"none"}]
    assert all(losses == found[0][1] for _, losses in found)


def test_deterministic_refuses_what_depends_on_the_moment_and_changes_nothing_else(work, monkeypatch):
    """On a CPU every operation is deterministic already. What is left is memory: sizes of packs, and outputs kept from other packs."""
    from trimtab.train import loop

    modes, kept, whole = [], [], loop.pack_logprobs

    def watching(model, pack, frozen_cache, **others):
        modes.append(torch.get_deterministic_debug_mode())
        kept.append(frozen_cache is not None)
        return whole(model, pack, frozen_cache=frozen_cache, **others)

    monkeypatch.setattr(loop, "pack_logprobs", watching)
    given, found = {"train.pack_tokens": 1024, "train.recompute": "none", "train.epochs": 2}, []
    for deterministic in (False, True):
        modes.clear()
        kept.clear()
        result = outcome(work, f"deterministic-{deterministic}", **given, **{"train.deterministic": deterministic})
        found.append((set(modes), set(kept), result))
        assert torch.get_deterministic_debug_mode() == 0
    assert found == [({0}, {True}, found[0][2]), ({2}, {False}, found[0][2])]
    with pytest.raises(RecipeError, match="pack_tokens and recompute must be given"):
        plain_recipe(work, **{"train.deterministic": True})


def test_deterministic_names_the_operation_that_is_not(work, monkeypatch):
    from trimtab.train import loop

    whole = loop.pack_logprobs

    def unordered(model, pack, **others):
        pooled = torch.nn.functional.max_pool1d(torch.ones(1, 1, 8), 2, return_indices=True)
        torch.nn.functional.max_unpool1d(*pooled, 2)
        return whole(model, pack, **others)

    monkeypatch.setattr(loop, "pack_logprobs", unordered)
    changes = {"train.pack_tokens": 1024, "train.recompute": "none", "train.deterministic": True}
    with pytest.raises(
        RecipeError, match=r"train\.deterministic: max_unpooling2d_forward_out has no deterministic algorithm here"
    ):
        outcome(work, "unordered", **changes)
    assert torch.get_deterministic_debug_mode() == 0
    outcome(work, "ordered", **changes | {"train.deterministic": False})


def test_the_adapter_handed_over_is_the_best_one_and_both_it_and_the_last_are_kept(work, monkeypatch):
    from trimtab.evaluate import Loss

    losses = iter([9.0, 3.0, 1.0, 2.0, 1.5, 2.5])  # the base's, then one a step

    def score(base, rows, *_):
        loss, places = next(losses), list(range(len(rows)))
        return Loss(
            loss, (loss, loss), 1, 1, sums=[loss for _ in rows], counts=[1.0 for _ in rows], places=places, logprobs=[-1.0] * 9
        )

    monkeypatch.setattr(validation, "score_loss", score)
    folder = work / "runs" / "best"
    run_recipe(plain_recipe(work, output=str(folder), **{"train.evaluate_every": 1}))
    trained = json.loads((folder / "adapter" / "trimtab.json").read_text())["trained"]
    assert (trained["step"], trained["eval_loss"]) == (2, 1.0)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-000002", "step-000004", "step-000005"]
    best, last = ((folder / "checkpoints" / f"step-00000{n}" / "adapter_model.safetensors").read_bytes() for n in (2, 5))
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == best != last


def test_a_base_that_changes_while_it_trains_fails_the_run(work, monkeypatch):
    from trimtab.core.errors import BaseChanged

    whole = script.train

    def meddling(base, *arguments):
        yield from whole(base, *arguments)
        base.model.get_input_embeddings().weight.data[3] += 1

    monkeypatch.setattr(script, "train", meddling)
    folder = work / "runs" / "changed"
    with pytest.raises(BaseChanged):
        run_recipe(plain_recipe(work, output=str(folder)))
    state = json.loads((folder / "run.json").read_text())
    assert state["status"] == "failed"
    assert "changed while they were in use" in state["error"]
    assert not (folder / "adapter").exists()


def test_clip_can_be_switched_off(work, plain):
    recipe = Recipe.parse({"data": {"train": "x"}, "train": {"clip": None}})
    assert recipe.train.clip is None


def test_lr_auto_is_the_methods_formula(work):
    folder = work / "runs" / "auto"
    run_recipe(plain_recipe(work, **{"train.lr": "auto", "output": str(folder)}))
    state = json.loads((folder / "run.json").read_text())
    assert state["peak_lr"] == 2e-3  # 5e-4 · (2000/32)^0.781 is more
    assert state["lr_formula"] == "5e-4·(2000/32)^0.781, at most 2e-3"


def test_columns_names_what_the_file_calls_otherwise(work, plain):
    renamed = {"data.train": str(work / "renamed.jsonl")}
    with pytest.raises(DataError, match="column 'prompt' is missing"):
        run_recipe(plain_recipe(work, output=str(work / "runs" / "never"), **renamed))
    adapter, metrics, _ = outcome(work, "columns", **renamed, **{"data.columns": {"prompt": "question"}})
    assert (adapter, metrics) == plain[:2]


def test_prompt_and_completion_are_written_from_columns(work, plain):
    columns = {"data.train": str(work / "renamed.jsonl"), "data.prompt": "{question}", "data.completion": "{completion}"}
    assert outcome(work, "templates", **columns)[:2] == plain[:2]
    assert outcome(work, "prompted", **columns | {"data.prompt": "Please: {question}"})[0] != plain[0]
    assert outcome(work, "completed", **columns | {"data.completion": "{completion}!"})[0] != plain[0]


def test_system_messages_are_set_and_dropped(work, plain):
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    file = work / "with_system.jsonl"
    file.write_text("".join(json.dumps({**row, "system": "Be kind."}) + "\n" for row in rows))
    own = {"data.train": str(file)}
    kind = outcome(work, "system-own", **own)[0]
    assert outcome(work, "system-set", **{"data.system": "Be kind."})[0] == kind != plain[0]
    assert outcome(work, "system-kept", **own, **{"data.system": "Be brief."})[0] == kind
    assert outcome(work, "system-dropped", **own, **{"data.drop_system": True})[0] == plain[0]
    assert outcome(work, "system-replaced", **own, **{"data.drop_system": True, "data.system": "Be brief."})[0] not in (
        kind,
        plain[0],
    )


def test_max_length_overlong_and_bad_rows_decide_about_rows(work):
    long = {"data.train": str(work / "long.jsonl"), "data.max_length": 60}
    with pytest.raises(DataError, match="more than max_length 60"):
        run_recipe(plain_recipe(work, output=str(work / "runs" / "never"), **long))
    *_, data = outcome(work, "truncate", **long, **{"data.overlong": "truncate"})
    assert json.loads(data)["sources"][0]["used"] == 25
    *_, data = outcome(work, "drop", **long, **{"data.overlong": "drop"})
    (account,) = json.loads(data)["sources"]
    assert (account["rows"], account["used"], account["dropped"]) == (25, 24, [f"{work}/long.jsonl:25"])
    *_, data = outcome(work, "split", **{"data.train": str(work / "texts"), "data.max_length": 60, "data.overlong": "split"})
    (account,) = json.loads(data)["sources"]
    assert (account["used"], account["split"], account["blocks"]) == (6, 1, 5)
    blocks = {"data.train": str(work / "texts"), "data.max_length": 60, "data.eval": 1}
    assert outcome(work, "corpus", **blocks, **{"data.corpus": True}) != outcome(
        work, "no-corpus", **blocks, **{"data.overlong": "split"}
    )
    bad = {"data.train": str(work / "bad.jsonl")}
    with pytest.raises(DataError, match="completion is empty"):
        run_recipe(plain_recipe(work, output=str(work / "runs" / "never"), **bad))
    *_, data = outcome(work, "skip", **bad, **{"data.bad_rows": "skip"})
    (account,) = json.loads(data)["sources"]
    assert (account["rows"], account["used"], len(account["refused"])) == (25, 24, 1)
    assert not (work / "runs" / "never").exists()


def test_what_is_trained_on_can_be_chosen(work, plain):
    outcomes = [plain[0]]
    for train_on in (["user"], ["assistant", "user"], "everything"):
        outcomes.append(outcome(work, f"train-on-{'-'.join(train_on)}", **{"data.train_on": train_on})[0])
    assert len(set(outcomes)) == 4
    talk = [{"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant")]
    (work / "talks.jsonl").write_text("".join(json.dumps({"messages": talk[: 2 + 2 * (n % 2)]}) + "\n" for n in range(9)))
    talks = {"data.train": str(work / "talks.jsonl"), "data.eval": str(work / "held.jsonl")}
    assert outcome(work, "train-on-last", **talks, **{"data.train_on": "last"})[0] != outcome(work, "train-on-all", **talks)[0]


def test_duplicates_are_removed_on_request(work, plain):
    twice = {"data.train": [str(work / "rows.jsonl"), str(work / "other_rows.jsonl")], "data.eval": str(work / "held.jsonl")}
    accounts = [
        json.loads(outcome(work, f"duplicates-{how}", **twice, **{"data.duplicates": how})[2]) for how in ("keep", "remove")
    ]
    assert [account["sources"][0]["used"] for account in accounts] == [48, 24]
    assert len(accounts[1]["sources"][0]["duplicates"]) == 24


SOURCE_KEYS = {
    "path": lambda work: {"path": str(work / "other_rows.jsonl")},
    "subset": lambda work: {"path": str(work / "parts"), "subset": "second"},
    "split": lambda work: {"path": str(work / "parts"), "subset": "first", "split": "test"},
    "revision": lambda work: {"path": "org/name", "revision": "v2"},
    "weight": lambda work: {"weight": 3.0},
    "limit": lambda work: {"limit": 12},
    "columns": lambda work: {"path": str(work / "renamed.jsonl"), "columns": {"prompt": "question"}},
    "prompt": lambda work: {"prompt": "Please: {question}"},
    "completion": lambda work: {"completion": "{completion}!"},
}
"""Of each key of a source, another value."""


@pytest.mark.parametrize("key", Source.model_fields)
def test_another_value_of_a_sources_key_gives_another_result(key, work, monkeypatch):
    import datasets

    rows = [{"prompt": f"Say {n}", "completion": f"{n}!"} for n in range(24)]
    real = datasets.load_dataset
    on_hub = {"v1": datasets.Dataset.from_list(rows), "v2": datasets.Dataset.from_list(rows[:20])}
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, *a, revision, **k: on_hub[revision] if name == "org/name" else real(name, *a, **k),
    )
    before = {
        "subset": {"path": str(work / "parts"), "subset": "first"},
        "split": {"path": str(work / "parts"), "subset": "first", "split": "train"},
        "revision": {"path": "org/name", "revision": "v1"},
        "columns": {"path": str(work / "renamed.jsonl"), "columns": {"prompt": "completion", "completion": "question"}},
        "prompt": {"path": str(work / "renamed.jsonl"), "prompt": "{question}"},
        "completion": {"path": str(work / "renamed.jsonl"), "columns": {"prompt": "question"}, "completion": "{completion}"},
    }
    first = {"path": str(work / "rows.jsonl"), "weight": 1.0, **before.get(key, {})}

    def of(value, name):
        train = {"a": first | value, "b": {"path": str(work / "held.jsonl"), "weight": 1.0}}
        return outcome(work, f"source-{key}-{name}", **{"data.train": train, "data.eval": 4})[:2]

    assert of({}, "before") == of({}, "again")
    assert of({}, "before-") != of(SOURCE_KEYS[key](work), "after")


def test_a_switch_of_the_template_decides_what_is_trained_on_and_is_kept_with_the_run(work):
    name = {"model.name": str(work / "switched")}
    quiet, loud = (outcome(work, f"loud-{loud}", **name, **{"model.template": {"loud": loud}}) for loud in (False, True))
    assert quiet[:2] == outcome(work, "quiet", **name)[:2]
    assert quiet[:2] != loud[:2]
    for kept in ("loud-True", "quiet"):
        folder = work / "runs" / kept
        target = load_model(str(folder))
        assert target.base.template_switches == ({"loud": True} if kept == "loud-True" else {})
        assert target.base.moment.isoformat() == json.loads((folder / "run.json").read_text())["moment"]
    with pytest.raises(ArtifactError, match="different template"):
        load_adapter(Base.load(ModelConfig(name=name["model.name"])), work / "runs" / "loud-True" / "adapter")
    with pytest.raises(RecipeError, match=r"model\.template\.lout: the chat template does not read it: it reads loud\."):
        run_recipe(plain_recipe(work, output=str(work / "runs" / "never"), **name, **{"model.template": {"lout": True}}))


def test_a_template_from_a_file_decides_what_is_trained_on_and_is_kept_with_the_adapter(work, plain, tmp_path):
    file, own = tmp_path / "own.jinja", (work / "tiny" / "chat_template.jinja").read_text()
    file.write_text(own)
    same = outcome(work, "template-same", **{"model.chat_template": str(file)})
    assert same[:2] == plain[:2]
    file.write_text(own.replace("<|im_end|>", "!<|im_end|>"))
    assert outcome(work, "template-other", **{"model.chat_template": str(file)})[:2] != plain[:2]
    text = file.read_text()
    file.unlink()  # the adapter brings it along
    adapter = work / "runs" / "template-other" / "adapter"
    target = load_model(str(work / "runs" / "template-other"))
    assert target.base.tokenizer.chat_template == text == (adapter / "training_template.jinja").read_text()
    assert transformers.AutoTokenizer.from_pretrained(adapter).chat_template == text
    assert not (work / "runs" / "plain" / "adapter" / "training_template.jinja").exists()
    with pytest.raises(ArtifactError, match="different template"):
        load_adapter(Base.load(str(work / "tiny")), adapter)
    merge(target.base, target.adapter, tmp_path / "merged")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == text
    (adapter / "training_template.jinja").write_text(own)
    with pytest.raises(ArtifactError, match=r"training_template\.jinja: changed since it was saved"):
        load_model(str(work / "runs" / "template-other"))
    for content, words in ((None, "cannot be read"), ("  ", "is empty"), ("{% for %}", "is not a Jinja template")):
        if content is not None:
            file.write_text(content)
        with pytest.raises(RecipeError, match=rf"model\.chat_template: .*own\.jinja {words}"):
            run_recipe(plain_recipe(work, output=str(work / "runs" / "never"), **{"model.chat_template": str(file)}))


def test_what_is_ignored_on_purpose_is_left_out(work, plain):
    odd = {"data.train": str(work / "odd.jsonl")}
    with pytest.raises(DataError, match="has images, and Trimtab trains on texts alone"):
        run_recipe(plain_recipe(work, output=str(work / "runs" / "never"), **odd))
    assert outcome(work, "ignore", **odd, **{"data.ignore": ["images"]})[:2] == plain[:2]


ANSWERING = {
    "temperature": {"temperature": 1.5},
    "top_p": {"temperature": 1.5, "top_p": 0.3},
    "top_k": {"temperature": 1.5, "top_k": 2},
    "repetition_penalty": {"repetition_penalty": 5.0},
    "seed": {"temperature": 1.5, "seed": 1},
    "stop": {"stop": ["0"]},
    "max_new_tokens": {"max_new_tokens": 2},
    "metrics": {"metrics": ["f1"]},
    "function": {},
}
"""Other values of the keys of `eval`, and what else they ask for."""


@pytest.mark.parametrize("key", sorted(EvalConfig.model_fields.keys() - {"samples"}))
def test_another_value_of_a_key_of_eval_gives_another_evaluation(key, work, tmp_path):
    base = Base.load(str(work / "tiny"))
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()[:4]]
    talks = [({"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}) for r in rows]
    examples = [Conversation(messages, f"rows:{n}") for n, messages in enumerate(talks)]
    (tmp_path / "own.py").write_text("def own(answer, expected):\n    return len(answer)\n")
    changed = ANSWERING[key] or {"function": f"{tmp_path / 'own.py'}:own"}
    plain = {name: value for name, value in changed.items() if name != key}
    assert score(base, examples, **plain) == score(base, examples, **plain)
    if key == "stop":
        said = score(base, examples)["answers"][0]["answer"]
        changed = {"stop": [said[3:5]]}
    assert score(base, examples, **changed) != score(base, examples, **plain)


def test_a_device_that_is_not_there_is_refused(work):
    with pytest.raises(RecipeError, match=r"model\.device: cuda:99 cannot be used here"):
        run_recipe(plain_recipe(work, output=str(work / "runs" / "never"), **{"model.device": "cuda:99"}))


def keys(kind, prefix=""):
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and inner not in (Method, Objective, UpdateRule, Engine):
            yield from keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_no_key_is_left_out_here():
    """`method` and `objective` are families: their members' keys are tried above, all of them."""
    elsewhere = {
        "model.device",
        "model.template",
        "model.chat_template",
        "data.columns",
        "data.prompt",
        "data.completion",
        "data.system",
        "data.drop_system",
        "data.ignore",
        "data.train_on",
        "data.max_length",
        "data.overlong",
        "data.corpus",
        "data.bad_rows",
        "data.duplicates",
        "train.decay",
        "train.save_every",
        "train.keep",
        "train.min_improvement",
        "train.pack_tokens",
        "train.recompute",
        "train.deterministic",
        *(f"eval.{key}" for key in ANSWERING),
        "track",  # tests/test_track.py
        "devices",  # tests/test_launch.py
        "distributed",  # tests/test_fsdp.py, with several processes
        "start",
        "certify",
        "resume",
        "output",
    }
    recipe = {key for key in keys(Recipe) if key not in ("method", "objective")}
    assert recipe == CHANGES.keys() | elsewhere
    assert {name for name, _ in OBJECTIVE_KEYS} == {*Objective.names()} - {"sft"}
