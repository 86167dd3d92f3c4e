"""Tasks of lm-evaluation-harness: the packed model gives what the harness's own Hugging Face backend gives, and refuses the rest."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from together import carry_out, counted, run_together

import trimtab
from trimtab.cli import main
from trimtab.core.errors import DataError, RecipeError, StorageError
from trimtab.testing import tiny_base

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from trimtab.evaluate import answers, packed_model
from trimtab.evaluate.harness import load_tasks, quiet, run_tasks
from trimtab.evaluate.packed_model import PackedModel

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's

CHOICES = """task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1}}
"""
TEXTS = """task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
metadata: {{version: 1}}
"""
ANSWERS = """task: answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["{stop}"], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three tasks as YAML files, by the kind of their requests."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [
        {"question": f"What is {n} and {n}?", "choices": [f" {2 * n}", f" {3 * n}", " none"], "gold": n % 3} for n in range(12)
    ]
    texts = [{"text": "The sea is wide. " * (1 + 20 * n)} for n in range(4)]  # the last is longer than the context
    for name, rows in {"choices": questions, "texts": texts}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in {"choices": CHOICES, "texts": TEXTS, "answers": ANSWERS}.items():
        (folder / f"{name}.yaml").write_text(text.format(folder=folder, stop="x"))
    return {name: str(folder / f"{name}.yaml") for name in ("choices", "texts", "answers")}


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def adapted(method="lora"):
    """A base with an adapter that acts."""
    base = tiny_base()
    adapter = trimtab.attach(
        base.model, trimtab.method(method, **{"lora": {"rank": 2}, "prompt": {"init": "random", "tokens": 4}}.get(method, {}))
    )
    with torch.no_grad():
        for number, parameter in enumerate(adapter.parameters().values()):
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(number))
    return base, adapter


def responses(model, task):
    with quiet():
        results = simple_evaluate(model, **load_tasks([task]), bootstrap_iters=0)
    (name,) = results["samples"]
    return [one for sample in results["samples"][name] for group in sample["resps"] for one in group], results["results"][name]


@pytest.mark.parametrize("kind", ["choices", "texts", "answers"])
def test_it_gives_what_the_harness_gives(kind, tasks):
    base, adapter = adapted()
    theirs, their_results = responses(HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=4), tasks[kind])
    ours, our_results = responses(PackedModel(base), tasks[kind])
    assert len(ours) == len(theirs) >= 4
    if kind == "choices":
        assert [logprob for logprob, _ in ours] == pytest.approx([logprob for logprob, _ in theirs], abs=1e-4)
        assert [bool(greedy) for _, greedy in ours] == [bool(greedy) for _, greedy in theirs]
    else:
        assert ours == (pytest.approx(theirs, rel=1e-5) if kind == "texts" else theirs)
    numbers = {key: value for key, value in their_results.items() if isinstance(value, float)}
    assert {key: our_results[key] for key in numbers} == pytest.approx(numbers, rel=1e-5)
    with adapter.disabled():  # the control: without the adapter, it is another model
        assert responses(PackedModel(base), tasks[kind])[0] != ours


def test_greedy_verdicts_are_of_the_whole_continuation():
    """A continuation that the model itself would write is greedy; with another last or first token, it is not."""
    base, _ = adapted()
    prompt = base.encode(["Q:"], special=True)[0].ids
    (answer,) = trimtab.generate(base.model, [prompt], [], max_new_tokens=4)
    model = PackedModel(base)

    def greedy(tokens):
        return model._loglikelihood_tokens([(("", ""), prompt, list(tokens))])[0][1]

    assert greedy(answer)
    assert not greedy([*answer[:-1], (answer[-1] + 1) % 200])
    assert not greedy([(answer[0] + 1) % 200, *answer[1:]])


def test_choices_of_a_question_share_its_context(tasks, monkeypatch):
    """The context's tokens are computed once, not once a choice."""
    computed, requested = [], []

    def counted(model, pack):
        computed.append(len(pack.ids))
        requested.append(sum(len(row.ids) - 1 for row in pack.rows))
        return real(model, pack)

    real = packed_model.pack_target_scores
    monkeypatch.setattr(packed_model, "pack_target_scores", counted)
    responses(PackedModel(adapted()[0]), tasks["choices"])
    assert sum(computed) < 0.5 * sum(requested)


@pytest.mark.parametrize("method", ["lora", "prompt", "bottleneck"])
def test_the_base_model_is_compared_on_the_same_documents(method, tasks):
    base, adapter = adapted(method)
    models = [("base", adapter.disabled()), ("adapter", nullcontext())]
    results = run_tasks(base, models, [tasks["choices"]], limit=10)
    (task,) = results["tasks"]
    assert (task["task"], task["documents"], results["limit"]) == ("choices", 10, 10)
    metric = {m["metric"]: m for m in task["metrics"]}["acc"]
    difference = metric["values"]["adapter"] - metric["values"]["base"]
    assert metric["difference"] == pytest.approx(difference, abs=1e-9)
    assert metric["interval"][0] <= metric["difference"] <= metric["interval"][1]
    json.dumps(results)


def test_long_contexts_are_cut_on_the_left_and_counted():
    base, _ = adapted()
    model = PackedModel(base)
    request = Instance("loglikelihood", {}, ("word " * 200, " end"), 0)
    theirs = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=1, max_length=model.max_length)
    with quiet():
        assert model.loglikelihood([request])[0][0] == pytest.approx(theirs.loglikelihood([request])[0][0], abs=1e-4)
    assert model.truncated == 1
    with pytest.raises(DataError, match="continuation has"):
        model.loglikelihood([Instance("loglikelihood", {}, ("a", "word " * 200), 0)])


def test_prompts_with_the_chat_template_are_those_of_the_model(tasks):
    base, _ = adapted()
    model, talk = PackedModel(base), [{"role": "user", "content": "Hello"}]
    theirs = HFLM(pretrained=base.model, tokenizer=base.tokenizer)
    assert model.apply_chat_template(talk) == theirs.apply_chat_template(talk)
    base.tokenizer.chat_template = None
    plain = PackedModel(trimtab.Base(base.model, base.tokenizer, "plain"))
    with pytest.raises(RecipeError, match="no chat template"):
        plain.apply_chat_template(talk)


def test_what_it_cannot_do_is_refused(tasks, tmp_path):
    with pytest.raises(RecipeError, match=r"no task or group 'hellaswagg'; did you mean hellaswag"):
        load_tasks(["hellaswagg", tasks["choices"]])
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: no such file"):
        load_tasks(["nowhere.yaml"])
    gone = Path(tasks["choices"]).with_name("gone.yaml")
    gone.write_text(CHOICES.format(folder=tmp_path / "gone").replace("task: choices", "task: gone"))
    with pytest.raises(StorageError, match="could not be loaded"), quiet():
        load_tasks([str(gone)])
    model = PackedModel(adapted()[0])
    with pytest.raises(RecipeError, match="num_beams=4"):
        model.generate_until([Instance("generate_until", {}, ("a", {"until": ["x"], "max_gen_toks": 4, "num_beams": 4}), 0)])
    with pytest.raises(DataError, match="new tokens, and the context has"):
        model.generate_until([Instance("generate_until", {}, ("a", {"until": ["x"], "max_gen_toks": 4096}), 0)])


def test_the_command(tasks, tmp_path, capsys):
    base = tiny_base()
    base.model.save_pretrained(tmp_path / "model")
    base.tokenizer.save_pretrained(tmp_path / "model")
    assert main(["eval", str(tmp_path / "model"), "--harness", tasks["choices"], "--limit", "6"]) == 0
    shown = capsys.readouterr().out
    assert {"choices", "acc_norm"} <= set(shown.split())
    assert "the first 6 documents" in shown
    assert main(["eval", str(tmp_path / "model"), "--harness", tasks["choices"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"][0]["documents"] == 12
    assert main(["eval", str(tmp_path / "model"), "--harness", tasks["choices"], "--data", "x.jsonl"]) == 2
    assert "--data: does not apply to --harness" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "model"), "--limit", "6"]) == 2
    assert "--limit: of --harness" in capsys.readouterr().err


def test_two_processes_divide_what_the_harness_asks_of_one(tasks, tmp_path, monkeypatch):
    base = tiny_base()
    base.model.save_pretrained(tmp_path / "model")
    base.tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(packed_model, "PACK_TOKENS", 64)
    monkeypatch.setattr(answers, "BATCH", 4)
    command = ["eval", "model", "--json", "--harness", ",".join(tasks.values())]
    count = ["trimtab.evaluate.packed_model.pack_target_scores", "trimtab.evaluate.answers.generate"]
    calls = [counted(monkeypatch, name) for name in count]
    alone = json.loads(carry_out(command)["out"])
    first, other = run_together(
        tmp_path,
        [
            {"command": command, "count": count, "fault": "few_tasks_small_packs"},
            {"command": command, "fault": "others_part_is_wrong"},
            {"command": command, "fault": "documents_divided"},
            {"command": ["eval", "model", "--harness", f"hellaswagg,{tasks['choices']}"]},
        ],
    )
    assert [one["status"] for one in first] == ["done", "done", "ProcessesDiffer", "RecipeError"]
    assert [one["status"] for one in other] == [one["status"] for one in first]
    same, wrong = (json.loads(one["out"]) for one in first[:2])
    assert _numbers(same) == pytest.approx(_numbers(alone), rel=1e-5)
    assert {**same, "tasks": _named(same)} == {**alone, "tasks": _named(alone)}
    assert _numbers(wrong) != pytest.approx(_numbers(alone), rel=1e-5)
    passes = list(zip(first[0]["calls"], other[0]["calls"], strict=True))
    assert [sum(pair) for pair in passes] == list(map(len, calls))
    assert all(min(pair) >= sum(pair) // 3 > 0 for pair in passes), passes  # batches of answers are 3
    assert first[2]["message"].startswith("Process 1 of 2 differs from process 0 in what --harness asks: Have the same files")


def _numbers(results):
    """Every number of the metrics, in order."""
    rest = [value for task in results["tasks"] for metric in task["metrics"] for value in _flat(metric)]
    return [value for value in rest if isinstance(value, int | float)]


def _flat(value):
    if isinstance(value, dict):
        return [one for key in value for one in _flat(value[key])]
    return [one for item in value for one in _flat(item)] if isinstance(value, list) else [value]


def _named(results):
    """The tasks without the numbers of their metrics."""
    return [
        {**task, "metrics": [(m["metric"], m["filter"], *m["values"]) for m in task["metrics"]]} for task in results["tasks"]
    ]
