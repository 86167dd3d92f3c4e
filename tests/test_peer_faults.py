"""What came of the known faults on the peers is measured for as many of them as the script says, and judged as it says."""

import importlib.util
import json
import sys
import warnings
from pathlib import Path

import pytest
from fault_catalogue import FAULTS

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "peer_faults"


@pytest.fixture(scope="module")
def script():
    """benchmarks/peer_faults, as `python benchmarks/peer_faults` finds its own files."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers', of each other
        patch.syspath_prepend(str(SCRIPT))
        specification = importlib.util.spec_from_file_location("peer_faults", SCRIPT / "__main__.py")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        module.trials()
        yield module


@pytest.fixture(scope="module")
def harness(script):
    return sys.modules["harness"]


def test_every_fault_of_the_catalogue_is_tried_or_said_to_be_left_out(script):
    tried = script.trials()
    assert tried.keys() | script.NOT_TRIED.keys() == FAULTS.keys()
    assert not tried.keys() & script.NOT_TRIED.keys()
    assert all(one.peer and one.about and one.run for one in tried.values())


def test_what_is_kept_is_what_the_script_tries(script):
    kept = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    assert list(kept["faults"]) == list(script.trials())
    assert kept["not_tried"] == script.NOT_TRIED
    assert kept["versions"].keys() == set(script.PEERS)
    for fault, result in kept["faults"].items():
        assert result["outcome"] in ("silent", "warned", "refused", "right"), fault
        assert result["peer"] == script.trials()[fault].peer
        assert result["words"]
        assert ("said" in result) == (result["outcome"] == "warned")


def judged(harness, run, about="the fault"):
    return harness.judge(harness.Trial("X01", "made up", about, run), Path())


def found(harness, wrong, said=""):
    def run(folder):
        with harness.injected():
            if said:
                warnings.warn(said, stacklevel=1)
        return harness.Found(wrong, "5 %")

    return run


def test_what_is_wrong_without_a_word_is_silent(harness):
    assert judged(harness, found(harness, True)) == {"peer": "made up", "outcome": "silent", "words": "5 %"}
    assert judged(harness, found(harness, True, "another key is deprecated"))["outcome"] == "silent"


def test_a_warning_counts_if_it_is_about_the_fault(harness, capfd):
    told = judged(harness, found(harness, True, "Beware of the fault"))
    assert told == {"peer": "made up", "outcome": "warned", "words": "5 %", "said": "Beware of the fault"}

    def writes(folder):
        with harness.injected():
            print("The fault is near", file=sys.__stderr__, flush=True)
        return harness.Found(True, "5 %")

    with capfd.disabled():
        assert judged(harness, writes)["outcome"] == "warned"
    assert judged(harness, found(harness, True))["outcome"] == "silent", "what was heard before does not count"


def test_what_is_not_wrong_is_right_whatever_is_said(harness):
    assert judged(harness, found(harness, False, "Beware of the fault"))["outcome"] == "right"


def test_an_exception_of_the_peers_is_a_refusal(harness):
    def run(folder):
        with harness.injected("; nothing is left"):
            json.loads("{")
        return harness.Found(True, "it is taken")

    told = judged(harness, run)
    assert told["outcome"] == "refused"
    assert told["words"].startswith("Expecting property name")
    assert told["words"].endswith("; nothing is left")
    assert harness.refusal(lambda: json.loads("{")) is not None
    assert harness.refusal(lambda: json.loads("{}")) is None


def test_an_error_of_ours_is_no_refusal(harness):
    def unprepared(folder):
        json.loads("{")
        with harness.injected():
            pass
        return harness.Found(True, "it is taken")

    with pytest.raises(json.JSONDecodeError):
        judged(harness, unprepared)
    source = "def slips():\n    with injected():\n        missing\n"  # as in a trial's own file
    place = {"injected": harness.injected}
    exec(compile(source, str(SCRIPT / "made_up.py"), "exec"), place)
    with pytest.raises(NameError):
        judged(harness, lambda folder: place["slips"]())
