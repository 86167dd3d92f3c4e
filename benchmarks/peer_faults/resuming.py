"""C04-C11: interrupted runs, and resuming."""

import io
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from harness import Found, injected, trial
from safetensors.torch import load_file
from tiny import adapted, adapter, apart, hf, llama, random_rows, same, told
from torch import Tensor

ROWS = random_rows(*[12] * 24)
"""Six steps an epoch, of four rows each."""


def _trainer(folder: Path, **settings: Any) -> transformers.Trainer:
    return hf(folder, adapted(llama(), lora_dropout=0.2), ROWS, **{"save_strategy": "steps", "save_steps": 1, **settings})


class Run(NamedTuple):
    adapter: dict[str, Tensor]
    rows: list[list[int]]
    """Of each step, by their first tokens."""
    losses: dict[int, float]


def _run(folder: Path, resume: str | None = None) -> Run:
    """Ten steps with dropout and rows in a random order, saved after the fifth, in the middle of an epoch."""
    trainer, rows = _trainer(folder, max_steps=10, save_steps=5), []
    real = trainer.training_step

    def step(model: Any, inputs: dict[str, Tensor], *given: Any, **named: Any) -> Tensor:
        rows.append(inputs["input_ids"][:, 0].tolist())
        return real(model, inputs, *given, **named)

    trainer.training_step = step
    trainer.train(resume_from_checkpoint=resume)
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    return Run(adapter(trainer.model), rows, losses)


def _whole_and_resumed(folder: Path) -> tuple[Run, Run]:
    whole = _run(folder / "whole")
    with injected():
        return whole, _run(folder / "again", str(folder / "whole" / "run" / "checkpoint-5"))


def _ended(work: Callable[[], object]) -> None:
    """Do it in a process that does not come back."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(1)
    os.waitpid(process, 0)


def _goes_on(folder: Path) -> Found:
    """Whether a run of four steps goes on from what was left in its folder."""
    whole = sorted(path.name for path in (folder / "run").glob("checkpoint-*") if (path / "trainer_state.json").exists())
    left = sorted(path.name for path in (folder / "run").glob("checkpoint-*"))
    assert whole == ["checkpoint-1"], whole
    assert left == ["checkpoint-1", "checkpoint-2"], left
    with injected("; checkpoint-1 beside it is whole"):
        trainer = _trainer(folder, max_steps=4)
        trainer.train(resume_from_checkpoint=True)
    return Found(trainer.state.global_step != 4, f"the run goes on to step {trainer.state.global_step}")


@trial("C04", "HF Trainer", r"checkpoint")
def half_written_checkpoint(folder: Path) -> Found:
    write = torch.save

    def killed(what: Any, path: Any, *given: Any, **named: Any) -> None:
        if not str(path).endswith("checkpoint-2/optimizer.pt"):
            return write(what, path, *given, **named)
        buffer = io.BytesIO()
        write(what, buffer)
        Path(path).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        torch.save = killed
        _trainer(folder, max_steps=4).train()

    _ended(work)
    return _goes_on(folder)


class FullDisk(transformers.TrainerCallback):
    """After the first checkpoint no file may be larger than an adapter's: the optimizer's state does not fit."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        (path,) = Path(args.output_dir).glob("checkpoint-1/adapter_model.safetensors")
        room = path.stat().st_size * 5 // 4
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))


@trial("C05", "HF Trainer", r"checkpoint|disk|space")
def disk_is_full(folder: Path) -> Found:
    _ended(lambda: _trainer(folder, max_steps=4, callbacks=[FullDisk()]).train())
    return _goes_on(folder)


@trial("C06", "HF Trainer", r"delet|remov|checkpoint")
def wrong_checkpoint_is_removed(folder: Path) -> Found:
    with injected():
        trainer = _trainer(
            folder, max_steps=6, save_total_limit=2, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
            eval_dataset=random_rows(*[12] * 4, seed=9),
        )  # fmt: skip
        trainer.train()
    left = {path.name for path in (folder / "run").glob("checkpoint-*")}
    best = Path(trainer.state.best_model_checkpoint).name
    return Found(not {best, "checkpoint-6"} <= left, f"of 6 checkpoints {' and '.join(sorted(left))} stay; the best is {best}")


@trial("C07", "HF Trainer", r"optimizer|missing|not found|state")
def part_of_the_state_is_missing(folder: Path) -> Found:
    whole = _run(folder / "whole")
    cut = shutil.copytree(folder / "whole" / "run" / "checkpoint-5", folder / "checkpoint-5")
    (cut / "optimizer.pt").unlink()
    with injected():
        again = _run(folder / "again", str(cut))
    off = apart(*(torch.cat([tensor.flatten() for tensor in run.adapter.values()]) for run in (again, whole)))
    return Found(off > 1e-6, f"without optimizer.pt the run goes on, to an adapter {off:.0%} from that of the whole run")


@trial("C08", "HF Trainer", r"rng|random")
def random_numbers_are_others(folder: Path) -> Found:
    whole, again = _whole_and_resumed(folder)
    equal = same(again.adapter, whole.adapter)
    return Found(not equal, f"with dropout the resumed adapter is {'the same to the bit' if equal else 'another'}")


@trial("C09", "HF Trainer", r"order|shuffle|sampler|skip")
def rows_in_another_order(folder: Path) -> Found:
    whole, again = _whole_and_resumed(folder)
    others = sum(one != other for one, other in zip(again.rows, whole.rows[5:], strict=True))
    return Found(others > 0, f"{others} of 5 steps after going on learn from other rows than in an uninterrupted run")


@trial("C10", "HF Trainer", r"loss")
def loss_jumps(folder: Path) -> Found:
    whole, again = _whole_and_resumed(folder)
    jump = max(abs(again.losses[step] - whole.losses[step]) for step in range(6, 11))
    return Found(jump > 0, f"after going on, losses are {told([jump])} from those of an uninterrupted run")


@trial("C11", "HF Trainer, PEFT", r"best")
def best_is_not_handed_over(folder: Path) -> Found:
    with injected():
        trainer = _trainer(
            folder, max_steps=6, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
            eval_dataset=random_rows(*[12] * 4, seed=9),
        )  # fmt: skip
        trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    stored = load_file(best / "adapter_model.safetensors")
    mine = {path.replace(".default.", "."): tensor for path, tensor in adapter(trainer.model).items()}
    equal = same(mine, stored)
    said = f"the bytes in memory are {'' if equal else 'not '}those of {best.name}, the best of 6"
    return Found(not equal, said)


class _Meanwhile(transformers.TrainerCallback):
    """Lets something else happen once the third step is saved."""

    def __init__(self, do: Callable[[], object]) -> None:
        self.do = do

    def on_step_end(self, args: Any, state: transformers.TrainerState, *_: Any, **__: Any) -> None:
        if state.global_step == 4:
            self.do()


@trial("C22", "HF Trainer", r"exist|another process|lock|overwrit|in use")
def two_runs_in_one_folder(folder: Path) -> Found:
    def other() -> object:
        return _trainer(folder, max_steps=3, learning_rate=1e-1, seed=7).train()

    whole = _trainer(folder / "alone", max_steps=6)
    whole.train()
    with injected():
        _trainer(folder, max_steps=5, callbacks=[_Meanwhile(other)]).train()
        (folder / "run" / "checkpoint-4").rename(folder / "4")  # as if the first had been killed after the third step
        (folder / "run" / "checkpoint-5").rename(folder / "5")
        again = _trainer(folder, max_steps=6)
        again.train(resume_from_checkpoint=True)
    off = apart(*(torch.cat([t.flatten() for t in adapter(run.model).values()]) for run in (again, whole)))
    return Found(
        off > 1e-6, f"after a second run in its folder, the first goes on from the second's, to an adapter {off:.0%} off"
    )
