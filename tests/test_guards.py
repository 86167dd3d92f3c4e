"""What is watched while a run trains: numbers that are none, what does not move, an update that is interrupted."""

import json
import math
import signal
import threading

import pytest
import torch
from families import perturb, random_rows, tiny

from trimtab.base import Base
from trimtab.core.errors import NonFinite
from trimtab.core.interrupts import interrupts_deferred
from trimtab.data import pack_all
from trimtab.data.example import TokenRow
from trimtab.methods import attach
from trimtab.methods.lora import LoRA
from trimtab.objectives.sft import SFT
from trimtab.run import checkpoints
from trimtab.train import Optimizer, TrainConfig, loop, train

pytestmark = pytest.mark.usefixtures("one_thread")

FLAT = TrainConfig(schedule="constant", warmup=0.0)
ROWS = [TokenRow(ids, list(range(2, len(ids))), f"row:{n}", len(ids)) for n, ids in enumerate(random_rows(9, 7, 8, 6, 9, 5))]


def adapted():
    base = Base(tiny("llama"))
    adapter = attach(base.model, LoRA(rank=2))
    perturb(adapter.parameters(), 0.1)
    return base, adapter


def spoil(monkeypatch, at):
    """Losses of the steps whose numbers are in `at` are not numbers."""
    losses, calls = SFT.losses, []

    def spoilt(self, logprobs, pack, kl=0.0):
        calls.append(1)
        return losses(self, logprobs, pack, kl) * (math.nan if len(calls) in at else 1.0)

    monkeypatch.setattr(SFT, "losses", spoilt)


def test_a_step_that_is_not_finite_is_passed_over_as_if_its_rows_had_not_been(monkeypatch):
    steps = [pack_all([row], 64) for row in ROWS]
    spoil(monkeypatch, {2, 4, 6})
    base, adapter = adapted()
    done = list(train(base, adapter, SFT(), steps, FLAT, 1e-2))
    assert [step.skipped is not None for step in done] == [False, True, False, True, False, True], "three, but never in a row"
    assert math.isnan(done[1].loss)
    assert done[1].skipped.startswith("Step 2: the loss is nan")
    assert "row:1" in done[1].skipped
    monkeypatch.undo()
    other, same = adapted()
    list(train(other, same, SFT(), [steps[n] for n in (0, 2, 4)], FLAT, 1e-2))
    assert all(torch.equal(a, b) for a, b in zip(adapter.state().values(), same.state().values(), strict=True))


def test_going_on_after_a_skipped_step_is_the_same_to_the_last_bit(monkeypatch):
    steps = [pack_all([row], 64) for row in ROWS]
    spoil(monkeypatch, {2})
    base, adapter = adapted()
    list(train(base, adapter, SFT(), steps, FLAT, 1e-2))
    monkeypatch.undo()
    spoil(monkeypatch, {2})
    other, same = adapted()
    first = Optimizer(same, 0.0)
    running = train(other, same, SFT(), steps, FLAT, 1e-2, optimizer=first)
    assert [next(running).number for _ in range(4)] == [1, 2, 3, 4]
    assert (first.taken, first.skipped) == (4, 1)
    again, anew = adapted()
    second = Optimizer(anew, 0.0)
    second.load(first.state(), first.taken, first.skipped)
    assert [step.number for step in train(again, anew, SFT(), steps, FLAT, 1e-2, optimizer=second)] == [5, 6]
    assert all(torch.equal(a, b) for a, b in zip(adapter.state().values(), anew.state().values(), strict=True))


def test_gradients_keep_their_place_in_memory_until_it_is_let_go():
    _, adapter = adapted()
    optimizer = Optimizer(adapter, 0.0)
    places = [p.grad.data_ptr() for p in optimizer.parameters]
    for after in (lambda: optimizer.step(1e-2), optimizer.skip, optimizer.clear):
        for parameter in optimizer.parameters:
            parameter.grad += 1
        after()
        assert [p.grad.data_ptr() for p in optimizer.parameters] == places
        assert all(not p.grad.any() for p in optimizer.parameters)
    optimizer.release()
    assert all(p.grad is None for p in optimizer.parameters)


def test_three_in_a_row_end_the_run(monkeypatch):
    spoil(monkeypatch, {2, 3, 4})
    base, adapter = adapted()
    done = []
    with pytest.raises(NonFinite, match=r"Step 4: .* It is the 3rd in a row\. Lower train\.lr"):
        done.extend(train(base, adapter, SFT(), [pack_all([row], 64) for row in ROWS], FLAT, 1e-2))
    assert all(bool(tensor.isfinite().all()) for tensor in adapter.state().values())
    assert loop.PATIENCE == 3


def test_a_step_that_is_not_finite_is_skipped_and_logged_as_it_was(here, trimtab, monkeypatch):
    spoil(monkeypatch, {3})
    done = trimtab("train", "r.yaml", "output=new", "data.eval=0", "train.pack_tokens=4096")
    assert done.code == 0
    assert "Step 3: the loss is nan" in done.out
    lines = [json.loads(line) for line in (here / "new" / "metrics.jsonl").read_text().splitlines()]
    (skipped,) = [line for line in lines if "skipped" in line]
    assert (skipped["step"], skipped["loss"]) == (3, "nan")
    assert all(isinstance(line["loss"], float) for line in lines if "skipped" not in line)


def test_values_that_are_no_numbers_are_never_saved(here, trimtab, monkeypatch):
    step = Optimizer.step

    def breaking(self, lr):
        step(self, lr)
        if self.taken == 6:
            with torch.no_grad():
                self.parameters[0][0, 0] = math.inf

    monkeypatch.setattr(Optimizer, "step", breaking)
    done = trimtab("train", "r.yaml", "output=new", "data.eval=0", "train.evaluate_every=6")
    assert done.code == 5
    assert "After step 6, " in done.err
    assert "holds NaN or Inf, so it is not saved" in done.err
    assert not (here / "new" / "checkpoints").exists()
    assert not (here / "new" / "states").exists()


def test_an_interruption_waits_for_the_end_of_an_update():
    done, before = [], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            updated(done)
        assert done == ["first", "second"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def updated(done):
    with interrupts_deferred():
        done.append("first")
        signal.raise_signal(signal.SIGINT)
        done.append("second")


def test_an_update_that_is_interrupted_is_whole_and_its_step_is_told(monkeypatch):
    base, adapter = adapted()
    step, before = torch.optim.AdamW.step, signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def half(self, closure=None):
        signal.raise_signal(signal.SIGINT)
        return step(self, closure)

    told = []
    try:
        steps = train(base, adapter, SFT(), [pack_all(ROWS, 64)] * 3, FLAT, 1e-2)
        told.append(next(steps).number)
        monkeypatch.setattr(torch.optim.AdamW, "step", half)
        told.append(next(steps).number)
        with pytest.raises(KeyboardInterrupt):
            next(steps)
    finally:
        signal.signal(signal.SIGINT, before)
    assert told == [1, 2]
    monkeypatch.undo()
    other, same = adapted()
    list(train(other, same, SFT(), [pack_all(ROWS, 64)] * 2, FLAT, 1e-2))
    assert all(torch.equal(a, b) for a, b in zip(adapter.state().values(), same.state().values(), strict=True))


def test_a_model_that_gives_a_row_no_number_is_not_saved(here, trimtab, monkeypatch):
    monkeypatch.setattr(checkpoints, "logprobs", lambda base, rows, _: [-1.0, math.nan, -1.0, -1.0][: len(rows)])
    failed = trimtab("train", "r.yaml", "output=new", "data.eval=0")
    assert failed.code == 5
    assert "a log-probability of NaN or Inf, so it is not saved. Lower train.lr." in failed.err
    assert not list((here / "new").glob("checkpoints/step-*"))


def test_in_another_thread_an_update_goes_on_as_it_is():
    """Only the main thread gets signals, and may say what becomes of them."""
    done = []

    def update():
        with interrupts_deferred():
            done.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=update)
    thread.start()
    thread.join()
    assert done == [before]
