"""The comparison with peers: what it counts, what it says, and one real run of it on a tiny model."""

import json
import runpy
import shlex
import signal
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from families import tiny
from peers import run_peer, run_trimtab
from peers.compare import PEERS, Settings, compare, load_rows, only, prepare, summary
from peers.floor import least_work, multiplying_rate
from peers.report import comparison_chart, comparison_table
from templates import saved_base

from trimtab import cli
from trimtab.base import Base, ModelConfig
from trimtab.commands import bench
from trimtab.core.errors import RecipeError
from trimtab.data.example import TokenRow
from trimtab.methods.lora import LoRA
from trimtab.objectives import Objective


def test_the_least_work_counted_out():
    """Two rows that share ten tokens, on the tiny Llama: 2 layers, hidden 32, MLP 48, 4 heads and 2 key-value heads of 8, 97 tokens."""
    rows = [TokenRow([*range(10), 50, 51, 52], [10, 11, 12], "a"), TokenRow([*range(10), 60, 61], [10, 11], "b")]
    model = tiny("llama")
    tokens, targets = 10 + 2 + 1, 5  # a last token predicts nothing
    pairs = sum(range(1, 11)) + 11 + 12 + 11
    of_layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    adapted = 3 * 2 * ((32 + 32) + (32 + 16))  # rank 3 on q and v, in both layers
    expected = (4 * 2 * of_layer + 6 * adapted) * tokens + 4 * 97 * 32 * targets + 14 * 2 * 32 * pairs
    expected -= 2 * 32 * (32 + 2 * 16) * tokens + 4 * (tokens - targets) * (of_layer - 2 * 32 * 16)
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


def benchmark_parser():
    return runpy.run_path(str(bench.FOLDER / "__main__.py"))["parser"]()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_base(tmp_path_factory.mktemp("models") / "tiny")


def test_a_real_comparison_with_the_same_losses(folder, tmp_path, capfd):
    words = ["--model", str(folder), "--data", "demo/train.jsonl", "--rows", "12", "--rows-per-step", "4", "--pairs", "1"]
    output = tmp_path / "results"
    assert cli.main(["bench", *words, "--against", "hf-peft", "--output", str(output), "--json"]) == 0
    mine, theirs = json.loads(capfd.readouterr().out)
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


def test_the_command_is_the_benchmark_in_another_process(tmp_path, monkeypatch, capfd):
    with pytest.raises(SystemExit) as helped:
        benchmark_parser().parse_args(["--help"])
    expected = capfd.readouterr().out
    assert helped.value.code == 0
    assert "--rows-per-step" in expected
    assert cli.main(["bench", "--help"]) == 0
    assert capfd.readouterr() == (expected, "")
    assert cli.main(["bench", "--rows", "12", "--against", "trl"]) == 2
    said = "trimtab: --rows: 12 examples do not make whole steps of 8 (--rows-per-step).\n"
    assert capfd.readouterr() == ("", said)
    assert cli.main(["bench", "--rows", "0"]) == 2
    assert capfd.readouterr().err.endswith("error: argument --rows: expected a whole number from 1 to 4294967295, got '0'\n")
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    assert cli.main(["bench", "--data", "my rows.json"]) == 2
    assert capfd.readouterr().err == (
        "trimtab: bench compares Trimtab with PEFT and TRL. It is a benchmark in Trimtab's repository and not part of the installed package: "
        "get a checkout of the repository, and run there: python benchmarks/peers --data 'my rows.json'\n"
    )


ENDS = {
    "by itself": ("sys.exit(7)", 7),
    "by an interruption of the command": (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(130)); os.kill(os.getppid(), signal.SIGINT); time.sleep(60)", 130
    ),
    "by a signal of its own": ("os.kill(os.getpid(), signal.SIGKILL)", 137),
}  # fmt: skip


@pytest.mark.parametrize(("program", "code"), ENDS.values(), ids=ENDS)
def test_the_command_ends_as_the_benchmark_does(program, code, tmp_path, monkeypatch):
    (tmp_path / "__main__.py").write_text(f"import os, signal, sys, time\n{program}\n")
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where a shell has tests in the background
    try:
        assert cli.main(["bench"]) == code
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_readmes_words_are_the_benchmarks():
    lines = [line for line in Path("README.md").read_text().splitlines() if line.startswith("trimtab bench")]
    assert lines
    for line in lines:
        benchmark_parser().parse_args(shlex.split(line, comments=True)[2:])


def test_more_rows_than_there_are_is_refused_rather_than_cut(folder):
    settings = Settings(data="demo/test.jsonl", model=str(folder), rows=104, against=())
    with pytest.raises(RecipeError, match=r"--rows: demo/test.jsonl has 100 examples, not 104\."):
        compare(settings, lambda *_: None)


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="--against: 'peft' is none of hf-peft, "):
        compare(Settings(against=("peft",)), lambda *_: None)
    with pytest.raises(RecipeError, match="--python: /no/python can't be run"):
        compare(Settings(python="/no/python"), lambda *_: None)
    with pytest.raises(RecipeError, match=r"--rows: 12 examples do not make whole steps of 8"):
        compare(Settings(rows=12), lambda *_: None)
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho trl peft\n")
    bare.chmod(0o755)
    with pytest.raises(RecipeError, match=r"trl needs trl, peft, which .*python does not have\. Install them"):
        compare(Settings(python=str(bare), against=("trl",)), lambda *_: None)
    assert set(PEERS) >= set(Settings().against)


@pytest.mark.usefixtures("one_thread")
def test_every_run_makes_its_own_pass_of_the_reference(folder, tmp_path, monkeypatch):
    """One that finds the numbers of the run before it would be faster than the first."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    settings = Settings(data="demo/terse/train.jsonl", model=str(folder), rows=4, rows_per_step=2, objective="dpo")
    base, objective = Base.load(ModelConfig(name=str(folder))), Objective.pick("dpo")
    rows = load_rows(settings, base, objective)
    spec = prepare(settings, base, rows, LoRA(rank=2), tmp_path) | {"objective": objective.plain()}
    computed = []
    original = run_trimtab.add_reference_logprobs

    def counted(*given):
        referred = original(*given)
        computed.append(referred.facts["computed"])
        return referred

    monkeypatch.setattr(run_trimtab, "add_reference_logprobs", counted)
    losses = [run_trimtab.run(spec)["losses"] for _ in range(2)]
    assert computed == [8, 8]
    assert losses[0] == losses[1]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_in_16_bits_all_train_from_the_same_weights(folder, tmp_path):
    """As on an accelerator: the model in bfloat16, LoRA's matrices in float32."""
    settings = Settings(data="demo/train.jsonl", model=str(folder), rows=6, rows_per_step=2)
    base = Base.load(ModelConfig(name=str(folder), dtype="bfloat16"))
    rows = load_rows(settings, base, Objective.pick("sft"))
    spec = prepare(settings, base, rows, LoRA(rank=2, alpha=64.0), tmp_path) | {
        "objective": Objective.pick("sft").plain(),
        "lr": 2e-3,
    }
    assert (spec["dtype"], spec["device"]) == ("bfloat16", "cpu")
    ours = run_trimtab.run(spec)
    theirs = run_peer.run(spec | PEERS["hf-peft-no-recompute"])
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=2e-3)
    assert len({round(loss, 3) for loss in ours["losses"]}) == 3


def test_a_run_sees_one_device():
    assert only(torch.device("cpu"), "0,1") == {}
    assert only(torch.device("cuda"), None) == {"CUDA_VISIBLE_DEVICES": "0"}
    assert only(torch.device("cuda", 1), None) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert only(torch.device("cuda", 1), "4,GPU-7") == {"CUDA_VISIBLE_DEVICES": "GPU-7"}
