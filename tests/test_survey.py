"""What is said to compute is what computes."""

import warnings

import torch
from accelerators import cuda_backend
from varlen import VarlenOperations

from trimtab.commands.doctor import _lines
from trimtab.engine.backends import cpu, flash, paths, probing, ways
from trimtab.engine.backends.survey import Way, survey

CPU = torch.device("cpu")
LOOP = "a call for each segment"


def said(dtype):
    return {way.operation: (way.by, way.problem) for way in survey(CPU) if way.dtype == dtype}


def test_on_a_cpu_c_computes_what_it_has_and_pytorch_the_rest(monkeypatch):
    if cpu.load_library() is not None:
        assert set(said("float32").values()) == {("C", "")}
    monkeypatch.setattr(cpu, "load_library", lambda: None)
    for dtype in ("float32", "bfloat16"):
        assert set(said(dtype).values()) == {("PyTorch", ""), (LOOP, "")}


def test_what_a_probe_proves_and_what_it_finds(monkeypatch):
    monkeypatch.setattr(ways, "WAYS", (ways.WAYS[0]._replace(takes=lambda q, plan, sinks: not sinks), ways.WAYS[-1]))
    monkeypatch.setattr(flash, "calls_of", paths.calls_of.__wrapped__)
    found = []
    for mistakes in ({}, {"later": 1}):
        monkeypatch.setattr(probing, "_probes", {})
        monkeypatch.setattr(probing, "_said", set())
        monkeypatch.setattr(flash, "_aten", VarlenOperations(**mistakes))
        with cuda_backend(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(said("bfloat16"))
    right, wrong = found
    assert right["norms"] == ("PyTorch", "")
    assert right["attention"] == right["attention in a window"] == ("flash attention", "")
    assert right["attention with sinks"] == wrong["attention with sinks"] == (LOOP, "")
    for operation in ("attention", "attention in a window"):
        by, problem = wrong[operation]
        assert by == LOOP
        assert "flash attention: the result is off by" in problem


def test_a_line_for_each_number_type_and_problem():
    made = [
        Way("cuda:0", "bfloat16", "norms", "Triton"),
        Way("cuda:0", "bfloat16", "gates", "Triton"),
        Way("cuda:0", "bfloat16", "attention", LOOP, "flash attention: it is off"),
        Way("cuda:0", "float16", "norms", "PyTorch", "it does not compile"),
    ]
    assert _lines(made) == [
        "cuda:0 bfloat16: norms, gates: Triton; attention: a call for each segment",
        "  flash attention: it is off",
        "cuda:0 float16: norms: PyTorch",
        "  it does not compile",
    ]
