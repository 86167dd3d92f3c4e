"""A01-A14: the loss, the steps, and what is trained."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from harness import Found, injected, trial
from tiny import (
    ROWS,
    adapted,
    adapter,
    apart,
    hf,
    llama,
    logged,
    lora,
    orpo,
    random_rows,
    same,
    saved,
    sft,
    share_of_nan,
    small,
    told,
    trained,
)
from torch import Tensor


def _step(trainer: Callable[..., Any], folder: Path, rows: list[dict[str, list[int]]], at_a_time: int) -> Tensor:
    """What one step of plain gradient descent does to an adapter: a step of Adam would hide a factor."""
    model = trained()
    before = adapter(model)
    trainer(
        folder, model, rows, per_device_train_batch_size=at_a_time, gradient_accumulation_steps=len(rows) // at_a_time,
        max_steps=1, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0,
    ).train()  # fmt: skip
    return torch.cat([(after - before[name]).flatten() for name, after in adapter(model).items()])


@trial("A01", "HF Trainer", r"accumulat|num_items")
def short_rows_weigh_more(folder: Path) -> Found:
    rows = random_rows(5, 40, 8, 31, 6, 22, 12, 37)
    with injected():
        whole, pieces = _step(hf, folder, rows, 8), _step(hf, folder, rows, 1)
    off = apart(pieces, whole)
    return Found(off > 1e-3, f"steps of 8 x 1 and of 1 x 8 rows are {small(off)} apart")


@trial("A02", "TRL SFTTrainer", r"accumulat|num_items")
def divided_twice(folder: Path) -> Found:
    with injected():
        whole, pieces = _step(sft, folder, ROWS, 8), _step(sft, folder, ROWS, 1)
    size = float(pieces.norm() / whole.norm())
    return Found(abs(size - 1) > 1e-3, f"a step of 8 x 1 rows is {size:.4f} times one of 1 x 8 rows")


class Steps(transformers.TrainerCallback):
    """The rows that each step of the optimizer has learned from, by their first tokens."""

    def __init__(self) -> None:
        self.waiting: list[int] = []
        self.learned: list[list[int]] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.learned.append(self.waiting)
        self.waiting = []


def _watched(trainer: transformers.Trainer, steps: Steps) -> transformers.Trainer:
    real = trainer.training_step

    def step(model: Any, inputs: dict[str, Tensor], *given: Any, **named: Any) -> Tensor:
        steps.waiting += inputs["input_ids"][:, 0].tolist()
        return real(model, inputs, *given, **named)

    trainer.training_step = step
    trainer.add_callback(steps)
    return trainer


@trial("A04", "HF Trainer", r"drop|remain|last")
def last_step_dropped(folder: Path) -> Found:
    # 11 rows, two at a time, four times a step: the second step has two micro-batches, of 2 rows and of 1
    rows, steps = [{"input_ids": [10 + n, 5, 6, 7], "labels": [10 + n, 5, 6, 7]} for n in range(11)], Steps()
    with injected():
        trainer = hf(folder, trained(), rows, per_device_train_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=1)
        _watched(trainer, steps).train()
    learned, sizes = {row for step in steps.learned for row in step}, " and ".join(str(len(step)) for step in steps.learned)
    return Found(learned != set(range(10, 21)), f"{len(learned)} of 11 rows are learned, in steps of {sizes}")


@trial("A05", "HF Trainer", r"learning rate|lr_scheduler|scheduler")
def rate_falls_too_fast(folder: Path) -> Found:
    rows = random_rows(*[8] * 12)
    with injected():
        trainer = hf(folder, trained(), rows, per_device_train_batch_size=1, gradient_accumulation_steps=4, num_train_epochs=2)
        trainer.train()
    rates = logged(trainer, "learning_rate")
    wanted = [1e-2 * (1 - step / 6) for step in range(6)]
    off = max(abs(rate - want) / 1e-2 for rate, want in zip(rates, wanted, strict=True))
    return Found(off > 1e-6, f"over 6 steps of 4 micro-batches the rate falls as a line, but for {small(off)}")


@trial("A06", "HF Trainer", r"label|-100|nan|nothing to learn|no loss")
def nothing_to_learn(folder: Path) -> Found:
    rows = [{**row, "labels": [-100] * 16} for row in ROWS]  # prompts that fill the length, or a template that does not fit
    model = trained()
    before = adapter(model)
    with injected():
        trainer = hf(folder, model, rows, max_steps=5)
        trainer.train()
    lost, still = share_of_nan(adapter(model)), same(adapter(model), before)
    said = "no weight has moved" if still else f"{lost:.0%} of the adapter is NaN"
    return Found(
        still or lost > 0, f"with every label ignored, 5 steps end normally, and {said}; losses: {told(logged(trainer))}"
    )


@trial("A07", "HF Trainer", r"nan|not finite|inf\b|overflow")
def not_a_number(folder: Path) -> Found:
    model, calls = trained(), []

    def overflow(module: Any, inputs: Any, output: Tensor) -> Tensor:
        calls.append(1)
        return output * float("nan") if len(calls) == 2 else output

    model.get_base_model().model.norm.register_forward_hook(overflow)
    with injected():
        trainer = hf(folder, model, ROWS, max_steps=4)
        trainer.train()
    lost = share_of_nan(adapter(model))
    losses = told(logged(trainer))
    return Found(lost > 0, f"after one such loss {lost:.0%} of the adapter is NaN, and the exit normal; losses: {losses}")


@trial("A08", "TRL SFTTrainer", r"lm_head|head")
def head_never_learns(folder: Path) -> Found:
    model = adapted(llama(), target_modules=["lm_head"])
    before = adapter(model)
    with injected():
        sft(folder, model, ROWS, max_steps=5).train()
    still = same(adapter(model), before)
    return Found(still, "an adapter on the head does not move" if still else "an adapter on the head moves")


@trial("A09", "HF Trainer", r"requires_grad|checkpoint")
def recomputation_loses_gradients(folder: Path) -> Found:
    with injected():
        kept = _step(hf, folder, ROWS, 8)
        again = _step(partial(hf, activation_checkpointing=True), folder, ROWS, 8)
    off = apart(again, kept)
    return Found(off > 1e-4, f"with and without recomputation steps are {small(off)} apart")


@trial("A10", "TRL SFTTrainer", r"trainable|requires_grad|inference_mode|frozen")
def nothing_is_trained(folder: Path) -> Found:
    start = saved(folder / "start", trained())
    with injected():
        model = peft.PeftModel.from_pretrained(llama(), start)  # as it is by default: not to be trained
        before = adapter(model)
        trainer = sft(folder, model, ROWS, max_steps=5)
        trainer.train()
    still = same(adapter(model), before)
    return Found(still, f"no weight of a loaded adapter has moved after 5 steps; losses: {told(logged(trainer))}")


@trial("A11", "HF Trainer", r"optimizer|parameters")
def other_weights_are_trained(folder: Path) -> Found:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # made too early: the adapter's weights are not among these
    with injected():
        model = adapted(model)
        before = adapter(model)
        hf(folder, model, ROWS, max_steps=5, optimizers=(optimizer, None)).train()
    still = same(adapter(model), before)
    return Found(still, "with an optimizer made before the adapter, no weight of it has moved after 5 steps")


def _unmoved(folder: Path, model: Any) -> tuple[float, torch.dtype]:
    """The share of the numbers in A that 20 steps at TRL's own rate leave as they are, and their type."""
    trainer = sft(folder, model, ROWS, peft_config=lora(), max_steps=20, learning_rate=2e-5)
    before = adapter(trainer.model)
    trainer.train()
    after = adapter(trainer.model)
    still = torch.cat([(after[name] == old).flatten() for name, old in before.items() if "lora_A" in name])
    return float(still.double().mean()), next(iter(after.values())).dtype


@trial("A12", "TRL SFTTrainer, 4-bit base", r"bfloat16|precision|dtype")
def updates_are_lost(folder: Path) -> Found:
    base = saved(folder / "base", llama())
    four = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    quantized = transformers.LlamaForCausalLM.from_pretrained(base, quantization_config=four, device_map={"": "cpu"})
    with injected():
        few, kind = _unmoved(folder, quantized)
        full, _ = _unmoved(folder, llama())
    said = f"A is {str(kind).removeprefix('torch.')}: {few:.0%} of it has not moved after 20 steps at 2e-5"
    return Found(few > full + 0.1, f"{said}; on a float32 base, {full:.0%}")


@trial("A13", "HF Trainer", r"optimizer|overwrit")
def loaded_adapter_overwritten(folder: Path) -> Found:
    start = saved(folder / "start", trained())
    with injected():
        model = peft.PeftModel.from_pretrained(llama(), start, is_trainable=True)
        before = adapter(model)
        hf(folder, model, ROWS, max_steps=3, learning_rate=0.0).train()
    kept = same(adapter(model), before)
    return Found(not kept, "at a learning rate of 0 a loaded adapter is left as it is, to the bit" if kept else "it is another")


class First(transformers.TrainerCallback):
    """The optimizer's first moments, and the adapter, as they are when a run begins."""

    def __init__(self) -> None:
        self.moments: list[Tensor] = []
        self.start: dict[str, Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        if not self.start:
            self.start = adapter(model)
            held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            self.moments = [optimizer.state[parameter]["exp_avg"].clone() for parameter in held if parameter in optimizer.state]


@trial("A14", "HF Trainer", r"unexpected|missing|mismatch|target_modules|param_group|does not match")
def moments_of_others(folder: Path) -> Found:
    hf(folder, adapted(llama(), target_modules=["q_proj"]), ROWS, max_steps=5, save_strategy="steps", save_steps=5).train()
    stored = torch.load(folder / "run" / "checkpoint-5" / "optimizer.pt", weights_only=True)["state"]
    fresh, first = adapted(llama(), target_modules=["o_proj"]), First()  # matrices of the same shape
    before = adapter(fresh)
    with injected():
        trainer = hf(folder, fresh, ROWS, max_steps=10, save_strategy="steps", save_steps=5, callbacks=[first])
        trainer.train(resume_from_checkpoint=True)
    taken = [torch.equal(moment, stored[n]["exp_avg"]) for n, moment in enumerate(first.moments)]
    wrong = bool(taken) and all(taken)
    own = "its weights start anew" if same(first.start, before) else "its weights are q_proj's"
    return Found(wrong, f"o_proj goes on with the moments of q_proj, to the bit ({len(taken)} of {len(stored)} tensors); {own}")


class _Adds(transformers.TrainerCallback):
    """What the gradients of micro-batches add up to, in float32 and as the optimizer is given them."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        self.weight, self.exact, self.given = weight, torch.zeros(weight.shape), torch.zeros(0)
        weight.register_hook(self.add)

    def add(self, gradient: Tensor) -> None:
        self.exact += gradient.float()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        assert self.weight.grad is not None
        self.given = self.weight.grad.float()


@trial("A26", "HF Trainer, bfloat16 base in full", r"bfloat16|bf16|precision|accumulat")
def gradients_are_added_up_in_few_bits(folder: Path) -> Found:
    model = llama().to(torch.bfloat16)
    adds = _Adds(model.model.layers[0].self_attn.q_proj.weight)
    with injected():
        hf(
            folder, model, random_rows(*[16] * 128), per_device_train_batch_size=1, gradient_accumulation_steps=128, max_steps=1,
            max_grad_norm=0.0, callbacks=[adds],
        ).train()  # fmt: skip
    off = apart(adds.given, adds.exact)
    return Found(off > 0.001, f"the sum of 128 micro-batches' gradients is {off:.1%} off; PEFT's own adapters are float32")


@trial("A27", "TRL ORPOTrainer", r"\bnan\b|finite|overflow")
def answer_becomes_certain(folder: Path) -> Found:
    model, rows = llama(), [{"prompt": "say", "chosen": " yes", "rejected": " no"}] * 4
    with injected():
        trainer = orpo(folder, model, rows, max_steps=200, learning_rate=3e-2, lr_scheduler_type="constant")
        trainer.train()
    lost = share_of_nan(dict(model.named_parameters()))
    said = f"{lost:.0%} of the model is NaN once a short answer is known by heart, and the exit normal"
    return Found(lost > 0, f"{said}; the last losses: {told(logged(trainer)[-3:])}")
