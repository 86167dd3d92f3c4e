"""Metrics have the values of the libraries that define them, refuse what they can't measure, and compare models by pairs."""

import collections
import json
import re
import string
import sys

import chat_templates
import numpy as np
import pytest
import sacrebleu
import sklearn.metrics
from rouge_score.rouge_scorer import RougeScorer
from templates import CHATML, base_of, bytes_tokenizer

from trimtab.core.config import Config
from trimtab.core.errors import DataError, RecipeError
from trimtab.data import Conversation
from trimtab.evaluate import EvalConfig, Exam, UserFunction
from trimtab.evaluate.answers import questions
from trimtab.evaluate.function import FunctionFailed
from trimtab.evaluate.intervals import Measured, differences
from trimtab.evaluate.metrics import Metric, ScoredAnswer
from trimtab.evaluate.metrics._calls import Call, find_calls

ENGLISH = [
    ("The cat sat on the mat.", "The cat sat on a mat."),
    ("There are 3 ships in the harbour, and a boat!", "In the harbour, there are three ships and one boat."),
    ("yes", "no"),
    ("", "An answer was expected"),
    ("exactly the same", "exactly the same"),
    ("It's the state-of-the-art method.", "the method is state of the art"),
]
CHINESE = [("我很喜欢这只猫。", "我喜欢这只猫。"), ("今天天气不错", "明天会下雨"), ("好的,谢谢你", "好的,谢谢你")]
WITH = {"regex": {"pattern": r"#### (\\S+)"}}


def answered(answer, expected, where="x:1", **more):
    example = Conversation(({"role": "user", "content": "?"}, {"role": "assistant", "content": expected} | more), where)
    return ScoredAnswer("?", expected, answer, 3, "stopped", example, answer, expected)


def all_of(pairs):
    return [answered(said, expected, f"x:{n}") for n, (said, expected) in enumerate(pairs, 1)]


def metric(name, **keys):
    return Metric.member(name)(**keys)


def total(name, pairs, **keys):
    return metric(name, **keys).measure(all_of(pairs)).total


# The libraries' own values


def test_rouge_is_that_of_rouge_score():
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    own = [scorer.score(expected, said) for said, expected in ENGLISH]
    for kind, value in total("rouge", ENGLISH).items():
        assert value == pytest.approx(np.mean([one[kind].fmeasure for one in own]), abs=1e-9)
        assert 0 < value < 1


def test_rouge_counts_words_of_every_script():
    """The package's own words are a-z and digits: Chinese would get 0 whatever it says."""
    assert RougeScorer(["rouge1"]).score("我喜欢猫", "我喜欢猫")["rouge1"].fmeasure == 0
    assert total("rouge", [("我喜欢猫", "我喜欢狗")])["rouge1"] == 0.75
    assert total("rouge", [("café noir", "café")])["rouge1"] == pytest.approx(2 / 3)
    assert total("rouge", [("हिन्दी भाषा", "हिन्दी")])["rouge1"] == pytest.approx(2 / 3)
    assert total("rouge", [("私は猫です", "私は犬です")])["rouge1"] == pytest.approx(0.8)


@pytest.mark.parametrize(("pairs", "tokenizer"), [(ENGLISH, "13a"), (CHINESE, "zh"), ([("私は猫です", "私は犬です")], "char")])
def test_bleu_is_that_of_sacrebleu(pairs, tokenizer):
    said, expected = map(list, zip(*pairs, strict=True))
    whole = sacrebleu.corpus_bleu(said, [expected], tokenize=tokenizer).score
    measured = metric("bleu").measure(all_of(pairs))
    assert measured.total["bleu"] == pytest.approx(whole, abs=1e-9)
    assert measured.each["bleu"] == pytest.approx([sacrebleu.sentence_bleu(a, [b], tokenize=tokenizer).score for a, b in pairs])
    assert total("bleu", pairs, tokenizer="none")["bleu"] != pytest.approx(whole, abs=1e-3)


@pytest.mark.parametrize("word_order", [0, 2])
@pytest.mark.parametrize("pairs", [ENGLISH, CHINESE])
def test_chrf_is_that_of_sacrebleu(pairs, word_order):
    said, expected = map(list, zip(*pairs, strict=True))
    whole = sacrebleu.corpus_chrf(said, [expected], word_order=word_order).score
    assert total("chrf", pairs, word_order=word_order)["chrf"] == pytest.approx(whole, abs=1e-9)
    assert (total("chrf", ENGLISH, word_order=1) == total("chrf", pairs, word_order=word_order)) is False


def squads_f1(said, expected):
    """As the evaluation script of SQuAD 2.0 says it."""

    def tokens(text):
        plain = "".join(c for c in text.lower() if c not in string.punctuation)
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split()).split()

    one, other = tokens(said), tokens(expected)
    same = sum((collections.Counter(one) & collections.Counter(other)).values())
    if not one or not other:
        return float(one == other)
    if not same:
        return 0.0
    precision, recall = same / len(one), same / len(other)
    return 2 * precision * recall / (precision + recall)


def test_f1_is_that_of_squad():
    assert total("f1", ENGLISH)["f1"] == pytest.approx(np.mean([squads_f1(a, b) for a, b in ENGLISH]), abs=1e-12)
    assert total("f1", [("喜欢猫", "喜欢狗")])["f1"] == pytest.approx(2 / 3)  # SQuAD's script takes all of it for one word


def test_labels_are_measured_as_by_scikit_learn():
    draw = np.random.RandomState(0)
    expected = draw.choice(["good", "bad", "mixed"], 60, p=[0.6, 0.3, 0.1]).tolist()
    said = [e if draw.random_sample() < 0.6 else draw.choice(["good", "bad", "no idea"]) for e in expected]
    found = total("label", list(zip(said, expected, strict=True)))
    labels = sorted(set(expected))
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(expected, said))
    macro = sklearn.metrics.f1_score(expected, said, labels=labels, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(macro, abs=1e-12)
    assert found["macro_f1"] != pytest.approx(sklearn.metrics.f1_score(expected, said, labels=labels, average="micro"))
    with pytest.raises(DataError, match="each of the 30 expected answers is another one, so they are no labels"):
        total("label", [(str(n), str(n)) for n in range(30)])


# Metrics of our own


@pytest.mark.parametrize(
    ("said", "valid", "fields"),
    [
        ('{"a": 1, "b": {"c": [1, 2]}, "d": "x"}', 1, 1),
        (' {"d": "x", "b": {"c": [1.0, 2]}, "a": 1}\n', 1, 1),
        ('{"a": true, "b": {"c": [1, 3]}, "d": "x", "e": 0}', 1, 0.5),
        ('{"a": "1"}', 1, 0),
        ("[]", 1, 0),
        ('```json\n{"a": 1}\n```', 0, 0),
        ('{"a": 1', 0, 0),
        ('{"a": 1, "a": 1}', 0, 0),
        ("", 0, 0),
    ],
)
def test_json_is_valid_or_not_and_has_so_many_fields_right(said, valid, fields):
    found = total("json", [(said, '{"a": 1, "b": {"c": [1, 2]}, "d": "x"}')])
    assert found == {"json_valid": valid, "json_fields": fields}


def test_expected_answers_that_are_no_json_are_refused():
    with pytest.raises(
        DataError, match=r"eval\.metrics: json can't measure these examples:\n  x:2: the expected answer is not valid JSON: "
    ):
        total("json", [("{}", "{}"), ("{}", "nothing")])


@pytest.mark.parametrize(
    ("said", "right", "found"),
    [
        ("3 + 4 = 7\n#### 1,007", 1, 1),
        ("#### 1007.0", 1, 1),
        ("#### 1008", 0, 1),
        ("1007", 0, 0),
        ("#### 1007\n#### 3", 1, 1),
    ],
)
def test_a_regular_expression_finds_what_counts(said, right, found):
    pairs = [(said, "It is so.\n#### 1007")]
    assert total("regex", pairs, pattern=r"#### (\S+)") == {"regex": right, "regex_found": found}
    last = total("regex", pairs, pattern=r"#### (\S+)", match="last")
    assert (last["regex"] == right) == (not said.endswith("3"))


def test_a_pattern_that_finds_nothing_in_an_expected_answer_or_is_none_is_refused():
    with pytest.raises(DataError, match=re.escape("x:1: the expected answer has no match for #### (\\S+)")):
        total("regex", [("#### 1", "1")], pattern=r"#### (\S+)")
    for pattern, problem in (("(", "is not a regular expression"), ("(a)(b)", "has 2 groups")):
        with pytest.raises(RecipeError, match=f"pattern: {problem}"):
            metric("regex", pattern=pattern)
    with pytest.raises(RecipeError, match=r"metrics\.0\.pattern: missing|pattern: missing"):
        EvalConfig(metrics=["regex"])


# Tool calls


CALLS = [
    {
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": 'Oslo "x" }', "days": 2, "opts": {"a": [1, True]}}},
    },
    {"type": "function", "function": {"name": "weather", "arguments": {"city": "2"}}},
]
WITH_CALLS = [
    "diffusion_gemma", "gemma4", "gemma4_v5", "glm4moe", "gptoss", "lfm2_2_5", "llama3_1", "muse_glimmer", "nemotron_3_nano",
    "qwen2_5", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_8", "qwen3_vl",
]  # fmt: skip
ONE_CALL = ("llama3_1", "gptoss")


@pytest.mark.parametrize("name", WITH_CALLS)
def test_calls_are_read_in_the_notation_of_each_template_of_trl(name):
    calls = CALLS[1:] if name in ONE_CALL else CALLS
    messages = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": calls})
    base = chat_templates.base(name)
    (asked,) = questions(base, [Conversation(messages, "x:1", tools=tuple(chat_templates.TOOLS))])
    tool_calls = metric("tool_calls")
    assert tool_calls.measure([asked.perfect]).total == {"tool_calls": 1, "tool_names": 1}
    said = asked.perfect.raw
    for wrong, names in (
        (said.replace("Oslo" if calls is CALLS else "2", "Rome"), 1),
        (said.replace("weather", "wether"), 0),
        ("", 0),
    ):
        other = ScoredAnswer(*{**vars(asked.perfect), "raw": wrong}.values())
        assert tool_calls.measure([other]).total == {"tool_calls": 0, "tool_names": names}, wrong


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}]</s>', [Call("f", {"x": 1})]),
        ('[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[ARGS]{}', [Call("f", {"x": 1}), Call("g", {})]),
        ('<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"x": 1}<｜tool▁call▁end｜>', [Call("f", {"x": 1})]),
        ('functions.f:0<|tool_call_argument_begin|>{"x": {"y": "}"}}<|tool_call_end|>', [Call("f", {"x": {"y": "}"}})]),
        ('Look: {"x": 1} and f(x).', []),
        ('<tool_call>\n{"name": "f", "arguments": {"x": ', []),
        ("[f(x=1), g(y=__import__('os').system('true'))]", []),
    ],
)
def test_other_notations_and_what_is_no_call(text, calls):
    assert find_calls(text) == calls


def test_calls_may_come_in_any_order_and_types_count():
    one, two = Call("f", {"x": 1}), Call("g", {"y": True})
    expected = {"tool_calls": [{"function": {"name": c.name, "arguments": c.arguments}} for c in (one, two)]}

    def said(*calls):
        raw = "".join(f"<tool_call>{json.dumps({'name': c.name, 'arguments': c.arguments})}</tool_call>" for c in calls)
        return metric("tool_calls").measure([answered(raw, "", **expected)]).total["tool_calls"]

    assert said(two, one) == 1
    for wrong in ((one,), (one, two, two), (one, Call("g", {"y": 1})), (Call("f", {"x": "1"}), two)):
        assert said(*wrong) == 0
    with pytest.raises(DataError, match="none of the expected answers has tool_calls"):
        total("tool_calls", [("a", "a")])


# The contract of the family


GOOD = {
    "json": [('{"a": 1}', '{"a": 1}'), ('{"a": 2}', '{"a": 1}'), ("x", '{"a": 1}')],
    "regex": [("#### 1", "#### 1"), ("#### 2", "#### 1"), ("x", "#### 1")],
    "label": [("a", "a"), ("b", "a"), ("b", "b")],
}
CALLED = {"tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}


def some(name):
    if name == "tool_calls":
        right, wrong = (f'<tool_call>{{"name": "f", "arguments": {{"x": {n}}}}}</tool_call>' for n in (1, 2))
        return [answered(said, right, f"x:{n}", **CALLED) for n, said in enumerate((right, wrong, right))]
    return all_of(GOOD.get(name, ENGLISH))


@pytest.mark.parametrize("name", Metric.names())
def test_every_metric_is_best_for_the_expected_answer_and_worse_for_another(name):
    made = metric(name, **({"pattern": r"#### (\S+)"} if name == "regex" else {}))
    answers = some(name)
    perfect = [ScoredAnswer(*{**vars(a), "answer": a.expected, "raw": a.expected}.values()) for a in answers]
    best, found = made.measure(perfect), made.measure(answers)
    first = next(iter(best.each))
    assert made.check(perfect) is None
    assert best.total[first] == pytest.approx(made.best)
    assert found.total.keys() == best.total.keys() >= found.each.keys()
    assert 0 <= found.total[first] < made.best
    assert all(low <= found.total[key] <= high for key, (low, high) in found.intervals().items())
    assert {len(values) for values in found.each.values()} == {len(answers)}
    with pytest.raises(RecipeError, match=f"{first} of the expected answer itself is below"):
        made.check([a for a in answers if made.measure([a]).each[first][0] < made.best - 1e-6])  # the control
    assert Config.__name__  # a metric is a part of a recipe, and comes back from it
    assert EvalConfig.parse({"metrics": [made.plain()]}).metrics == (made,)


def test_a_package_that_is_missing_is_said_before_anything_is_generated(monkeypatch):
    monkeypatch.setattr("trimtab.evaluate.metrics._base.find_spec", lambda name: None)
    with pytest.raises(
        RecipeError, match=r"rouge needs the package rouge_score, which is not installed: pip install 'trimtab\[metrics\]'"
    ):
        metric("rouge").check(all_of(ENGLISH))


# Comparison by pairs


def measured(values):
    return Measured.means({"m": [float(v) for v in values]})


def test_a_difference_is_tested_by_exchanging_answers():
    draw = np.random.RandomState(0)
    theirs = draw.random_sample(80)
    better = differences(measured(theirs + 0.05 + 0.01 * draw.random_sample(80)), measured(theirs))["m"]
    assert better.distinguishable
    assert better.interval[0] < better.value < better.interval[1]
    other = differences(measured(draw.random_sample(80)), measured(theirs))["m"]
    assert not other.distinguishable
    few = differences(measured([1, 1, 1]), measured([0, 0, 0]))["m"]
    assert (few.value, few.interval) == (1, (1, 1))
    assert not few.distinguishable  # of three, all are exchanged or none by chance in a quarter of the draws
    assert few.p == pytest.approx(0.25, abs=0.05)
    assert differences(measured([1, 2]), measured([1, 2]))["m"].p == 1


def test_the_test_is_right_as_often_as_it_says():
    """Of models that do not differ, it calls about 5 % distinguishable; unpaired intervals of such models would overlap less."""
    draw = np.random.RandomState(1)
    called = sum(
        differences(measured(draw.random_sample(30)), measured(draw.random_sample(30)))["m"].distinguishable for _ in range(100)
    )
    assert called <= 11


# A function of the user's


@pytest.fixture
def own(tmp_path):
    def write(text, name="own"):
        (tmp_path / "scores.py").write_text(text)
        said = []
        return UserFunction(f"{tmp_path / 'scores.py'}:{name}", said.append), said

    return write


def test_a_function_is_said_before_it_runs_and_measures_answers(own, tmp_path):
    function, said = own("def own(answer, expected):\n    return answer == expected\n")
    assert function.measure(all_of(ENGLISH)).total == {"own": pytest.approx(1 / 6)}
    (line,) = said
    assert str(tmp_path / "scores.py") in line
    assert function.sha256 in line
    function, _ = own("def own(answer, expected, example):\n    return {'a': len(example['messages']), 'b': 1.5}\n")
    assert function.measure(all_of(ENGLISH)).total == {"a": 2, "b": 1.5}
    assert "eval_function" not in sys.modules


def test_what_is_said_is_what_is_executed(own, tmp_path, monkeypatch):
    """Even if the file changes in between."""
    (tmp_path / "scores.py").write_text("def own(a, b):\n    return 1\n")
    function = UserFunction(
        f"{tmp_path / 'scores.py'}:own", lambda _: (tmp_path / "scores.py").write_text("def own(a, b):\n    return 2\n")
    )
    assert function.measure(all_of(ENGLISH)).total == {"own": 1}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("def own(a, b):\n    return 1 / 0\n", r"own failed on x:1: ZeroDivisionError: division by zero \(scores\.py:2\)"),
        ("def own(a, b):\n    exit()\n", "own failed on x:1: SystemExit"),
        ("def own(a, b):\n    return '1'\n", "own returned '1' for x:1; expected a finite number"),
        ("def own(a, b):\n    return float('nan')\n", "own returned nan for x:1"),
        ("def own(a, b):\n    return {'x' if a else 'y': 1}\n", "own returned y for x:4, and x before"),
        ("def own(a, b):\n    return {'loss': 1}\n", "own returned a value named loss, which another one has"),
    ],
)
def test_what_a_function_gets_wrong_names_the_example(text, problem, own):
    function, _ = own(text)
    with pytest.raises(FunctionFailed, match=problem):
        function.measure(all_of(ENGLISH), taken=["loss"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("def other(a, b): pass", "has no function own"),
        ("def own(a): pass", "own of .* takes 1 arguments"),
        ("1 / 0", r"fails when it is executed: ZeroDivisionError: division by zero \(scores\.py:1\)"),
        ("def own(", "fails when it is executed: SyntaxError"),
    ],
)
def test_a_file_that_has_no_such_function_is_refused(text, problem, own):
    with pytest.raises(RecipeError, match=problem):
        own(text)


def test_a_failure_of_the_function_loses_no_answer(own):
    base = base_of(bytes_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>")), CHATML, eos_token="<|im_end|>")
    function, _ = own("def own(a, b):\n    raise KeyError('k')\n")
    examples = [answered("", "abc").example]
    found = Exam(base, examples, EvalConfig(), function).take().plain()
    assert "own failed on x:1: KeyError: 'k'" in found["function_error"]
    assert len(found["answers"]) == 1
    assert found["exact_match"] == 0


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ({"metrics": ["rogue"]}, r"metrics\.0\.name: no such choice: 'rogue'\. Did you mean 'rouge'"),
        ({"metrics": ["f1", "f1"]}, "metrics: f1 is given 2 times; give it once"),
        ({"function": "scores.py"}, "function: expected a Python file and the name of a function in it"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a number of at least 1 or 'auto', got 0"),
    ],
)
def test_keys_of_eval_that_are_wrong_are_refused(raw, problem):
    with pytest.raises(RecipeError, match=problem):
        EvalConfig.parse(raw)
