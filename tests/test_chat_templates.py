"""What real chat templates teach, against what each family's models write and read."""

import re
from datetime import datetime

import pytest
from chat_templates import EMBEDDED, NAMES, SCENARIOS, TAUGHT, base, row

from trimtab.data import SourceReport, check_data, template_output, tokenize_answers, tokenize_examples
from trimtab.data.formats import read_examples
from trimtab.data.load import LoadedData


def learned(name, scenario_row, **switches):
    """The examples, sequences and refusals of a row."""
    report = SourceReport(("rows",))
    examples = list(read_examples([("rows:1", scenario_row)], {}, report))
    return examples, tokenize_examples(examples, base(name, **switches), report), [reason for _, reason in report.rejected]


def runs(on, sequences):
    """(what stands before, what is trained on), a pair a turn."""
    decode = on.tokenizer.decode
    for sequence in sequences:
        starts = [t for t in sequence.target_indices if t - 1 not in sequence.target_indices]
        for start in starts:
            end = next(t for t in range(start, len(sequence.ids) + 1) if t not in sequence.target_indices)
            yield decode(sequence.ids[:start]), decode(sequence.ids[start:end])


def test_every_template_is_here():
    assert set(NAMES) == set(TAUGHT)
    assert len(NAMES) > 40


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", NAMES)
def test_it_teaches_what_it_has_to_or_says_why_not(name, scenario):
    examples, sequences, refused = learned(name, row(scenario))
    expected = TAUGHT[name].runs(scenario)
    if expected[0].startswith("!"):
        assert sequences == []
        assert expected[0][1:] in refused[0]
        return
    assert refused == []
    found = list(runs(base(name), sequences))
    assert [said for _, said in found] == expected
    after_result = TAUGHT[name].after or scenario == "call, result, answer"
    assert all(before.endswith(TAUGHT[name].opens) for before, _ in (found[:1] if after_result else found))
    on = base(name)
    assert all(row.ids[row.target_indices[-1]] in on.stop_ids for row in sequences)
    prompt, answer = tokenize_answers(examples, on)[0]
    assert prompt + answer == sequences[-1].ids
    (finding,) = [one for one in check_data(LoadedData(sequences, [], [], ""), examples, on) if one.name == "rendering"]
    assert finding.status == "good"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_embedded_model_teaches_what_it_has_to(smollm2, scenario):
    report, expected = SourceReport(("rows",)), EMBEDDED.runs(scenario)
    examples = read_examples([("rows:1", row(scenario))], {}, report)
    sequences = tokenize_examples(examples, smollm2, report)
    if expected[0].startswith("!"):
        assert expected[0][1:] in report.rejected[0].reason
        return
    assert [said for _, said in runs(smollm2, sequences)] == expected


@pytest.mark.parametrize("name", NAMES)
def test_ordinary_rows_are_taken_by_all_of_them(name):
    for scenario in ("single", "several turns", "thinking in content" if "nothink" not in name else "single", "weight 0"):
        assert learned(name, row(scenario))[2] == []


@pytest.mark.parametrize("name", [name for name in NAMES if "enable_thinking" in base(name).template.switch_names])
def test_a_switch_changes_the_prompt_and_what_is_trained_on_follows(name):
    found = {}
    for switch in (True, False):
        _, sequences, refused = learned(name, row("single"), enable_thinking=switch)
        assert refused == []
        ((found[switch]),) = runs(base(name), sequences)
    assert found[True] != found[False]
    assert found[False][1].endswith(TAUGHT[name].answer.format(A="First.").rpartition("First.")[2])


@pytest.mark.parametrize(
    "name", ["qwen3", "deepseek_r1_distill", "gptoss", "llama3", "nemotron_3_nano", "glm4moe", "gemma4_v5"]
)
def test_an_answer_is_read_back_without_its_reasoning(name):
    on = base(name)
    for scenario, answer in (("single", "First."), ("reasoning_content", "First."), ("several turns", "Second.")):
        examples, _, refused = learned(name, row(scenario))
        if not refused:
            assert on.answer_text(on.raw_text(tokenize_answers(examples, on)[0][1])) == answer


def test_without_a_text_of_the_message_nothing_is_taught():
    """The negative control of what is compared: a template that cuts, moves or adds."""
    on = base("qwen2_5")
    template = on.template
    message = {"role": "assistant", "content": "It is 4."}
    for said, writes, reason in (
        ("It is<|im_end|>", "{}<|im_end|>", "does not write its content unchanged"),
        ("It is 4.<|im_end|>", "<|im_end|>", "leaves out its content: 'It is 4.'"),
        ("It is 4.<|im_end|> and more", "{}<|im_end|>", "ends this turn"),
        ("Well. It is 4.<|im_end|>", "{}<|im_end|>", "does not write its content unchanged"),
        (
            "Well. It is 4.<|im_end|>",
            "So: {}<|im_end|>",
            "begins this turn as 'Well. It is 4.<|im_end|>', and others as 'So: '",
        ),
    ):
        template.frames.clear()
        with pytest.raises(template_output.InvalidExample, match=re.escape(reason)):
            template_output.check_answer(message, said, lambda other, writes=writes: writes.format(other["content"]), template)
    template.frames.clear()
    template_output.check_answer(message, "It is 4.<|im_end|>", lambda other: other["content"] + "<|im_end|>", template)
    assert template.frames == {("", "<|im_end|>")}


def test_templates_that_write_the_date_write_that_of_the_run():
    for name, form in (("llama3_2", "%d %b %Y"), ("gptoss", "%Y-%m-%d")):
        on = base(name)
        now = on.moment
        try:
            assert now.strftime(form) in on.template.render([{"role": "user", "content": "x"}])
            on.moment = datetime(2031, 7, 9)
            assert datetime(2031, 7, 9).strftime(form) in on.template.render([{"role": "user", "content": "x"}])
        finally:
            on.moment = now
