"""The comparison with peers: what it counts, what it says, and one real run of it on a tiny model."""

import json
import xml.etree.ElementTree as ET

import pytest
from families import tiny
from templates import saved_base

from trimtab import cli
from trimtab.base import Base, ModelConfig
from trimtab.bench import PEERS, Asked, compare, driver, ours, summary
from trimtab.bench.floor import least_work, multiplying_rate
from trimtab.core.errors import RecipeError
from trimtab.data.example import TokenRow
from trimtab.methods.lora import LoRA
from trimtab.objectives import Objective
from trimtab.report.comparison import comparison_chart, comparison_table


def test_the_least_work_counted_out():
    """Two rows that share ten tokens, on the tiny Llama: 2 layers, hidden 32, MLP 48, 4 heads and 2 key-value heads of 8, 97 tokens."""
    rows = [TokenRow([*range(10), 50, 51, 52], [10, 11, 12], "a"), TokenRow([*range(10), 60, 61], [10, 11], "b")]
    model = tiny("llama")
    tokens, learned = 10 + 2 + 1, 5  # a last token predicts nothing
    pairs = sum(range(1, 11)) + 11 + 12 + 11
    of_layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    adapted = 3 * 2 * ((32 + 32) + (32 + 16))  # rank 3 on q and v, in both layers
    expected = (4 * 2 * of_layer + 6 * adapted) * tokens + 4 * 97 * 32 * learned + 14 * 2 * 32 * pairs
    expected -= 2 * 32 * (32 + 2 * 16) * tokens + 4 * (tokens - learned) * (of_layer - 2 * 32 * 16)
    assert least_work(model, [rows], LoRA(rank=3, targets=["q_proj", "v_proj"])) == expected
    apart = least_work(model, [rows[:1], rows[1:]], LoRA(rank=3, targets=["q_proj", "v_proj"]))
    assert apart > expected


def test_the_rate_of_products_is_one():
    assert multiplying_rate(tiny("llama"), tokens=8, tries=1) > 1e6


def run(seconds, peak, losses):
    return {
        "seconds": seconds,
        "peak_gb": peak,
        "losses": losses,
        "tokens_per_s": 100 / seconds,
        "gemm_floor_fraction": 0.5,
        "rows_per_min": 60 / seconds,
    }


def test_a_summary_is_of_pairs():
    mine = [run(1.0, 1.0, [2.0, 1.0]), run(2.0, 1.0, [2.0, 1.0]), run(1.0, 1.0, [2.0, 1.0])]
    theirs = [run(4.0, 5.0, [2.0, 1.001]), run(4.0, 4.0, [2.0, 1.001]), run(3.0, 2.0, [2.0, 1.001])]
    said = summary("hf-peft", theirs, mine)
    assert said["pairs"] == [4.0, 2.0, 3.0]
    assert said["trimtab_is_faster"] == 3.0
    assert said["trimtab_memory"] == 0.25
    assert said["loss_distance"] == pytest.approx(1e-3, rel=1e-6)
    assert summary("hf-peft-grouped", theirs, mine)["loss_distance"] is None
    assert "losses" not in said["runs"][0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_base(tmp_path_factory.mktemp("models") / "tiny")


def test_a_real_comparison_with_the_same_losses(folder, tmp_path, capsys):
    words = ["--model", str(folder), "--data", "demo/train.jsonl", "--rows", "12", "--rows-per-step", "4", "--pairs", "1"]
    output = tmp_path / "results"
    assert cli.main(["bench", *words, "--against", "hf-peft", "--output", str(output), "--json"]) == 0
    mine, theirs = json.loads(capsys.readouterr().out)
    assert (mine["trainer"], theirs["trainer"]) == ("trimtab", "hf-peft")
    assert len(mine["losses"]) == 3
    assert mine["losses"][0] != mine["losses"][2]
    assert theirs["loss_distance"] < 1e-4
    assert min(one[key] for one in (mine, theirs) for key in ("tokens_per_s", "peak_rss_gb", "gemm_floor_fraction")) > 0
    assert json.loads((output / "results.json").read_text()) == [mine, theirs]
    drawing = ET.fromstring((output / "chart.svg").read_text())
    assert len(drawing.findall("{http://www.w3.org/2000/svg}rect")) == 1 + 2 * 2
    table = comparison_table([mine, theirs], "x")
    assert table.row_count == 2
    ET.fromstring(comparison_chart([{**mine, "trainer": "a & b"}], "rows < tokens"))


def test_more_rows_than_there_are_is_refused_rather_than_cut(folder):
    asked = Asked(data="demo/test.jsonl", model=str(folder), rows=104, against=())
    with pytest.raises(RecipeError, match=r"--rows: demo/test.jsonl has 100 rows, not 104\."):
        compare(asked, lambda *_: None)


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="--against: 'peft' is none of hf-peft, "):
        compare(Asked(against=("peft",)), lambda *_: None)
    with pytest.raises(RecipeError, match="--python: /no/python can't be run"):
        compare(Asked(python="/no/python"), lambda *_: None)
    with pytest.raises(RecipeError, match=r"--rows: 12 rows do not make whole steps of 8"):
        compare(Asked(rows=12), lambda *_: None)
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho trl peft\n")
    bare.chmod(0o755)
    with pytest.raises(RecipeError, match=r"trl needs trl, peft, which .*python does not have\. Install them"):
        compare(Asked(python=str(bare), against=("trl",)), lambda *_: None)
    assert set(PEERS) >= set(Asked().against)


@pytest.mark.usefixtures("one_thread")
def test_every_run_makes_its_own_pass_of_the_reference(folder, tmp_path, monkeypatch):
    """One that finds the numbers of the run before it would be faster than the first."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    asked = Asked(data="demo/terse/train.jsonl", model=str(folder), rows=4, rows_per_step=2, objective="dpo")
    base, objective = Base.load(ModelConfig(name=str(folder))), Objective.pick("dpo")
    rows = driver._rows(asked, base, objective)
    spec = driver._prepare(asked, base, rows, LoRA(rank=2), tmp_path) | {"objective": objective.plain()}
    computed = []
    original = ours.add_reference_logprobs

    def counted(*given):
        referred = original(*given)
        computed.append(referred.facts["computed"])
        return referred

    monkeypatch.setattr(ours, "add_reference_logprobs", counted)
    losses = [ours.run(spec)["losses"] for _ in range(2)]
    assert computed == [8, 8]
    assert losses[0] == losses[1]
