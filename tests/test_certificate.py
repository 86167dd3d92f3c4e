"""A run ends well only if its adapter, loaded by a fresh process, is what was trained, and no worse than the base."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from worlds import combinations, write_rows

import trimtab as package
from trimtab.artifacts.run_folder import CERTIFICATE_FORMAT
from trimtab.artifacts.run_status import ADVICE
from trimtab.base import Base
from trimtab.certify import certificate
from trimtab.certify.certificate import certificate_text
from trimtab.certify.fresh_process import measure
from trimtab.core import files
from trimtab.evaluate import paired_difference
from trimtab.methods import Method
from trimtab.methods.lora import LoRA
from trimtab.run import checkpoints
from trimtab.run import script as running

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ("train", "r.yaml", "certify=true", "train.epochs=4")


@pytest.fixture(scope="module")
def certified(world, tmp_path_factory):
    """A run with its certificate."""
    from trimtab import cli

    place, before = tmp_path_factory.mktemp("certified"), Path.cwd()
    shutil.copytree(world, place / "world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place / "world")
        assert cli.main([*WORDS, "output=done"]) == 0
    assert Path.cwd() == before
    return place / "world" / "done"


@pytest.fixture
def done(certified, tmp_path):
    shutil.copytree(certified, tmp_path / "done")
    return tmp_path / "done"


@pytest.fixture
def at_once(monkeypatch):
    """The same examination in this process, which has paid for torch already; other tests hold what a fresh one is for."""

    def examine(job):
        with torch.no_grad():
            return json.loads(json.dumps(measure(json.loads(json.dumps(job)))))

    monkeypatch.setattr(certificate, "_measure_in_new_process", examine)


def test_a_run_ends_with_a_certificate(done, trimtab):
    held = json.loads((done / "certificate.json").read_text())
    assert {one["name"]: one["status"] for one in held["tests"]} == {
        "reload": "passed", "base": "passed", "moved": "passed", "stops": "passed", "gain": "passed", "forgetting": held["tests"][-1]["status"],
    }  # fmt: skip
    assert held["passed"]
    assert held["losses"]["adapter"]["held_out"] < held["losses"]["base"]["held_out"]
    assert {one["text"] for one in held["answers"]} == {"yes"}
    text = (done / "certificate.txt").read_text()
    assert text == certificate_text(held)
    assert text.startswith("Trimtab certificate: passed\n\npassed  reload: reloaded in a new process, the adapter reproduces")
    verified = trimtab("verify", done)
    assert verified.code == 0
    assert verified.out.startswith("Trimtab certificate: passed")
    assert json.loads(trimtab("verify", done, "--json").out) == held
    assert not (done / "states").exists()
    assert not (done / "lock").exists()


def test_what_is_not_certified_is_merged_only_if_that_is_meant(done, trimtab, tmp_path, monkeypatch):
    def merges(*words):
        shutil.rmtree(tmp_path / "merged", ignore_errors=True)
        return trimtab("merge", *words, tmp_path / "merged")

    monkeypatch.chdir(done.parent)
    page = " ".join(trimtab("show", "done").out.split())
    assert "done: done, certified" in page
    assert "gain sft loss on 4 held-out examples: adapter" in page
    assert "trimtab merge done FOLDER" in page
    saved = json.loads((done / "run.json").read_text())["best"]["folder"]
    assert [merges(done).code, merges(done / "adapter").code, merges(done / saved).code] == [0, 0, 7]
    assert trimtab("combine", f"{done}=1", tmp_path / "sum").code == 0

    held = json.loads((done / "certificate.json").read_text())
    held["tests"][3] |= {"status": "failed", "words": "0 of 4 answers stopped at EOS"}
    del held["format"], held["digest"]
    files.write_manifest(done / "certificate.json", CERTIFICATE_FORMAT, {**held, "passed": False})
    for target in (done, done / "adapter"):
        refused = merges(target)
        assert (refused.code, (tmp_path / "merged").exists()) == (7, False)
        assert (
            "is done, NOT certified, so this adapter is not certified.\n  stops: 0 of 4 answers stopped at EOS" in refused.err
        )
        assert "use more train.epochs" in refused.err
        assert "--force" in refused.err
        assert merges("--force", target).code == 0
    assert trimtab("combine", f"{done}=1", tmp_path / "other").code == 7
    assert trimtab("combine", "--force", f"{done}=1", tmp_path / "other").code == 0
    page = " ".join(trimtab("show", done).out.split())
    assert "done, NOT certified" in page
    assert "stops (failed) 0 of 4 answers stopped at EOS" in page
    assert "what to do It was trained too little" in page
    assert "trimtab merge" not in page
    assert "is not certified. stops: 0 of 4" in trimtab("chat", done, "--prompt", "x", "--max-new-tokens", 1).err

    shutil.copytree(done / "adapter", tmp_path / "alone")
    assert merges(tmp_path / "alone").code == 0  # no run says anything of it
    for name in ("certificate.json", "certificate.txt"):
        (done / name).unlink()
    refused = merges(done)
    assert (refused.code, "is done, without a certificate, so" in refused.err) == (7, True)
    page = " ".join(trimtab("show", done).out.split())
    assert "done, without a certificate" in page
    assert "gain lowest loss on held-out examples:" in page
    facts = json.loads(trimtab("show", done, "--json").out)
    assert facts["held_out"]["lowest"] == facts["best"]["eval_loss"] < facts["held_out"]["first"]


def test_every_test_that_can_fail_has_advice():
    source = Path(certificate.__file__).read_text()
    tests = re.split(r"\bTest\(", source)[1:]
    failing = {
        re.match(r'\s*"(\w+)"', test)[1]
        for test in tests
        if '"failed"' in test.split("def ")[0].split("return")[0] and re.match(r'\s*"', test)
    }
    assert failing == set(ADVICE)


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "adapter/trimtab.json", "recipe.yaml", "data.json",
                                  "certificate.json", "certificate.txt", "run.json", "metrics.jsonl",
                                  "losses.json"])  # fmt: skip
def test_a_changed_file_is_refused_by_its_name(name, done, trimtab):
    content = bytearray((done / name).read_bytes())
    content[-20] ^= 1
    (done / name).write_bytes(content)
    refused = trimtab("verify", done)
    assert refused.code == 4
    assert Path(name).name in refused.err or "lora_" in refused.err


def test_missing_and_additional_files_are_refused(done, trimtab):
    (done / "adapter" / "more.safetensors").write_bytes(b"x")
    assert "more.safetensors: was not there when the run was certified" in trimtab("verify", done).err
    (done / "adapter" / "more.safetensors").unlink()
    (done / "data.json").unlink()
    assert "data.json: is missing, or changed" in trimtab("verify", done).err
    (done / "certificate.json").unlink()
    refused = trimtab("verify", done)
    assert (refused.code, "has no certificate.json: " in refused.err) == (4, True)
    assert f"trimtab verify {done / 'adapter'}" in refused.err
    assert trimtab("verify", done / "adapter").code == 0


def test_an_adapter_by_itself_is_verified_as_far_as_it_goes(done, trimtab, at_once, tmp_path):
    adapter = shutil.copytree(done / "adapter", tmp_path / "alone")
    said = trimtab("verify", adapter)
    assert said.code == 0
    assert "passed  files: the adapter's 28 tensors and its configuration are unchanged since they were saved" in said.out
    assert "noted   certificate: an adapter alone has none" in said.out
    content = bytearray((adapter / "adapter_model.safetensors").read_bytes())
    content[-20] ^= 1
    (adapter / "adapter_model.safetensors").write_bytes(content)
    assert (refused := trimtab("verify", adapter)).code == 4, refused.err
    shutil.copytree(done / "adapter", tmp_path / "theirs")
    (tmp_path / "theirs" / "trimtab.json").unlink()
    refused = trimtab("verify", tmp_path / "theirs")
    assert (refused.code, "has no manifest of Trimtab" in refused.err) == (4, True)


def test_a_base_that_is_another_is_refused(done, here, trimtab):
    manifest = json.loads((done / "adapter" / "trimtab.json").read_text())
    place = Path(manifest["base"]["model"]["name"])
    kept = place.with_name("kept")
    place.rename(kept)
    try:
        shutil.copytree(here / "other", place)
        refused = trimtab("verify", done)
        assert refused.code == 7
        assert "different weights" in refused.err
    finally:
        shutil.rmtree(place)
        kept.rename(place)


def test_what_is_saved_must_be_what_was_trained(here, trimtab, monkeypatch):
    """The negative control: an adapter that is written a little differently, with a manifest that fits."""
    save = checkpoints.save_adapter

    def damaged(base, adapter, folder, facts, **options):
        with torch.no_grad():
            first = next(iter(adapter.parameters().values()))
            first.mul_(1.5)
            save(base, adapter, folder, facts, **options)
            first.div_(1.5)

    monkeypatch.setattr(checkpoints, "save_adapter", damaged)
    failed = trimtab(*WORDS, "output=new")
    assert failed.code == 7
    assert (
        "new is finished, but its adapter failed certification:\n  reload: reloaded in a new process, the adapter gives"
        in failed.err
    )
    assert json.loads(Path("new/certificate.json").read_text())["passed"] is False
    assert json.loads(Path("new/run.json").read_text())["status"] == "done"
    assert trimtab("verify", "new").code == 7


def test_an_adapter_that_is_worse_than_its_base_does_not_pass(here, trimtab, at_once):
    write_rows(here / "held.jsonl", [{"prompt": f"Is {n} a number?", "completion": "no, not at all"} for n in range(40)])
    failed = trimtab(*WORDS, "output=new", "data.eval=held.jsonl", "train.evaluate_every=1000", "train.epochs=12")
    assert failed.code == 7
    assert "gain: sft loss on 40 held-out examples: adapter" in failed.err


def test_an_adapter_that_never_stops_does_not_pass(here, trimtab, monkeypatch, at_once):
    real = certificate._measure_in_new_process
    monkeypatch.setattr(certificate, "_measure_in_new_process", lambda job: {
        **(found := real(job)), "answers": [{**one, "ended": "length"} for one in found["answers"]],
    })  # fmt: skip
    failed = trimtab(*WORDS, "output=new")
    assert failed.code == 7
    assert "stops: 0 of 4 answers stopped at EOS" in failed.err


@pytest.mark.parametrize(("ends", "status", "words"), [
    (["stopped"] * 3, "passed", "3 of 3 answers stopped at EOS"),
    (["stopped", "length", "context"], "noted", "1 of 3 answers stopped at EOS; 1 were cut off because the model's context was full"),
    (["context"] * 2, "noted", "0 of 2 answers stopped at EOS; 2 were cut off because the model's context was full"),
    (["context", "length"], "failed", "0 of 2 answers stopped at EOS; 1 were cut off"),
    (["length"], "failed", "0 of 1 answers stopped at EOS"),
])  # fmt: skip
def test_an_answer_that_the_context_cuts_off_says_nothing_against_the_adapter(ends, status, words):
    (test,) = certificate._test_stops([{"text": "x", "ended": one} for one in ends])
    assert test.status == status
    assert test.words.startswith(words)
    written = {"passed": True, "tests": [], "answers": [{"text": "x", "ended": one} for one in ends]}
    assert certificate_text(written).count("(cut off by the context) 'x'") == ends.count("context")


def test_a_run_whose_rows_fill_the_context_is_not_failed_for_what_it_cuts_off(here, trimtab, at_once):
    """An adapter that has hardly learned, and would not stop for long."""
    base = Base.load("tiny")
    longest = max(len(row.ids) for row in package.rows("rows.jsonl", base))
    config = json.loads((here / "tiny/config.json").read_text())
    (here / "tiny/config.json").write_text(json.dumps({**config, "max_position_embeddings": longest}))
    done = trimtab(*WORDS, "output=new", "train.epochs=0.5", "train.lr=1e-6")
    assert done.code == 0, done.err
    held = json.loads((here / "new/certificate.json").read_text())
    stops = next(one for one in held["tests"] if one["name"] == "stops")
    assert stops["status"] == "noted"
    assert stops["words"].startswith("0 of 4 answers stopped at EOS; 4 were cut off because the model's context was full")
    assert "(cut off by the context) " in (here / "new/certificate.txt").read_text()
    done = trimtab("eval", "new", "--base")
    assert "the model's context was full: 4 of base, 4 of adapter" in " ".join(done.out.split())
    asked = trimtab("chat", "new", "--prompt", "Is 3 a number?")
    assert asked.err == "trimtab: the answer was cut off because the model's context is full.\n"
    asked = trimtab("chat", "new", "--prompt", "Is 3 a number?", "--max-new-tokens", "1")
    assert asked.err == "trimtab: the answer was cut off after 1 tokens (--max-new-tokens).\n"


def test_what_no_gradient_reaches_is_said_after_three_steps(here, trimtab, monkeypatch):
    monkeypatch.setattr(LoRA, "lr_multiplier", lambda self, name: 0.0 if name == "A" else 1.0)
    failed = trimtab(*WORDS, "output=new")
    assert failed.code == 5
    assert "After 3 steps, training has not changed:" in failed.err
    assert ".A" in failed.err


def test_a_process_that_cannot_load_it_says_why(here, trimtab, monkeypatch):
    keep = running.copy_adapter

    def damaged(base, old, folder):
        keep(base, old, folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors[next(iter(tensors))][0] += 1
        save_file(tensors, folder / "adapter_model.safetensors")

    monkeypatch.setattr(running, "copy_adapter", damaged)
    failed = trimtab(*WORDS, "output=new")
    assert failed.code == 7
    assert "A new process could not load and run" in failed.err
    assert "changed since it was saved" in failed.err


def test_a_run_that_is_killed_before_its_certificate_comes_back_for_it(here, trimtab, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running, "certify", killed)
        assert trimtab(*WORDS, "output=new").code == 130
    weights = (here / "new" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert json.loads((here / "new" / "run.json").read_text())["status"] == "done"
    done = trimtab(*WORDS, "output=new")
    assert done.code == 0
    assert "passed reload" in done.out
    assert (here / "new" / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    assert trimtab("verify", "new").code == 0
    assert "exists already" in trimtab(*WORDS, "output=new").err


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo"])
def test_preferences_are_certified_beside_their_reference(objective, here, trimtab, at_once):
    rows = [{"prompt": f"Is {n} a number?", "chosen": "yes", "rejected": "no"} for n in range(30)]
    write_rows(here / "pairs.jsonl", rows)
    done = trimtab(*WORDS, "output=new", "data.train=pairs.jsonl", f"objective={objective}", "train.lr=1e-2")
    held = json.loads((here / "new" / "certificate.json").read_text())
    gain = next(one for one in held["tests"] if one["name"] == "gain")
    assert gain["status"] == "passed", done.err
    if objective == "dpo":
        assert held["losses"]["base"]["held_out"] == pytest.approx(0.693147, abs=1e-5)
        assert "reference model 0.6931" in gain["words"]
    assert next(one for one in held["tests"] if one["name"] == "reload")["status"] == "passed"


@pytest.mark.parametrize(
    ("method", "objective"), combinations(sorted(Method.names(), key=lambda name: name != "lora"), ["sft", "dpo", "kto"])
)
def test_whatever_is_trained_is_found_again(method, objective, here, trimtab, at_once):
    rows = [{"prompt": f"Is {n} a number?", "chosen": "yes", "rejected": "no"} for n in range(30)]
    write_rows(here / "pairs.jsonl", rows)
    words = [f"objective={objective}", f"method={method}", "train.epochs=1", "train.lr=1e-3"]
    words += ["data.train=pairs.jsonl"] if objective != "sft" else []
    words += ["method.tokens=[<|im_start|>, <|im_end|>]"] if method == "tokens" else []
    words += ["method.rank=4"] if method == "miss" else []
    trimtab("train", "r.yaml", "certify=true", "output=new", *words)
    tests = {one["name"]: one for one in json.loads((here / "new" / "certificate.json").read_text())["tests"]}
    assert {name: tests[name]["status"] for name in ("reload", "base", "moved")} == dict.fromkeys(
        ["reload", "base", "moved"], "passed"
    )
    assert trimtab("verify", "new").code == (0 if all(one["status"] != "failed" for one in tests.values()) else 7)


def test_a_paired_interval_is_narrower_than_rows_are_unlike():
    theirs = [float(n % 7) for n in range(50)]
    difference, (low, high) = paired_difference(
        [value - 0.1 - 0.01 * (n % 3) for n, value in enumerate(theirs)], theirs, [1] * 50
    )
    assert -0.12 < low < difference < high < -0.1
