"""Planned against measured peak memory of runs, each in a new process.

    python benchmarks/memory.py [NAME ...]

Random models of several families, and SmolLM2-135M, on examples of random tokens: methods, lengths, soft-capped and windowed attention (which
keeps a number for each pair of tokens), packs of many examples and of one, with and without gradient checkpointing. A run is planned, takes
three steps, and saves its adapter and its state. Its peak is that of the process (VmHWM) since it was planned; its growth is the peak minus
the memory at that time. Results go to docs/measured/memory.json.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

RESULTS = Path(__file__).parents[1] / "docs" / "measured" / "memory.json"


class Run(NamedTuple):
    family: str
    method: str
    row: int
    """Tokens in a row."""
    rows: int = 1
    """Rows in a step."""
    settings: Mapping[str, Any] = MappingProxyType({})
    """Of the method."""
    train: Mapping[str, Any] = MappingProxyType({})
    """Of the training."""
    objective: str = "sft"
    dtype: str = "float32"


RUNS = {
    "llama, examples of 128": Run("llama", "lora", 128, 16),
    "llama, one of 2,048": Run("llama", "lora", 2048),
    "llama, dropout": Run("llama", "lora", 256, 8, {"dropout": 0.05}),
    "llama, gradient checkpointing": Run("llama", "lora", 2048, train={"recompute": "full"}),
    "llama, full": Run("llama", "full", 256, 8),
    "llama, the head adapted": Run("llama", "lora", 256, 8, {"targets": ["lm_head", "q_proj"]}),
    "llama, prefix": Run("llama", "prefix", 256, 8),
    "llama, upper layers, two epochs": Run("llama", "lora", 256, 8, {"targets": [r".*layers\.[4-7]\..*_proj"]}, {"epochs": 2}),
    "llama, kto": Run("llama", "lora", 256, 8, objective="kto"),
    "llama, dpo": Run("llama", "lora", 256, 8, objective="dpo"),
    "qwen3, dora": Run("qwen3", "dora", 256, 8),
    "mistral, a window": Run("mistral", "lora", 2048),
    "mistral, bottleneck, a window": Run("mistral", "bottleneck", 1024, 2),
    "gemma 2, soft-cap, 1,024": Run("gemma2", "lora", 1024),
    "gemma 2, soft-cap, 2,048": Run("gemma2", "lora", 2048),
    "gemma 2, soft-cap, examples of 128": Run("gemma2", "lora", 128, 16),
    "gemma 2, soft-cap, gradient checkpointing": Run("gemma2", "ia3", 2048, train={"recompute": "full"}),
    "gemma 2, soft-cap, bfloat16": Run("gemma2", "lora", 512, dtype="bfloat16"),
    "gemma 3, a window": Run("gemma3", "oft", 1024, settings={"block_size": 32}),
    "gpt2, one of 1,024": Run("gpt2", "lora", 1024, 2),
    "cohere, examples of 256": Run("cohere", "lora", 256, 8),
    "SmolLM2, examples of 128": Run("smollm2", "lora", 128, 8),
    "SmolLM2, one of 1,024": Run("smollm2", "lora", 1024, settings={"rank": 64}),
    "SmolLM2, full": Run("smollm2", "full", 128, 4),
}


def base_of(family: str, dtype: str) -> Any:
    import torch
    import transformers as t

    import trimtab

    if family == "smollm2":
        return trimtab.load("smollm2-135m-instruct")
    shape = dict(
        vocab_size=16_000, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    window = {"sliding_window": 512}
    makers = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**shape)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**shape, head_dim=48)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**shape, **window)),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**shape, head_dim=48, **window)),
        "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**shape, head_dim=48, **window)),
        "cohere": lambda: t.CohereForCausalLM(t.CohereConfig(**shape)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=16_000, n_embd=384, n_layer=8, n_head=8, n_positions=4096, bos_token_id=1, eos_token_id=2)
        ),
    }
    torch.manual_seed(0)
    return trimtab.Base(makers[family]().eval().requires_grad_(False).to(getattr(torch, dtype)))


def rows_of(run: Run, vocabulary: int, steps: int) -> list[Any]:
    """Made-up rows, half of which is learned, as the objective wants them."""
    from trimtab.data.example import TokenRow

    draw, made = random.Random(0), []
    for number in range(steps * run.rows):
        prompt = [draw.randrange(vocabulary) for _ in range(run.row // 2)]
        sides = {"dpo": ("chosen", "rejected"), "kto": (("good", "bad")[number % 2],)}.get(run.objective, (None,))
        for side in sides:
            ids = [*prompt, *(draw.randrange(vocabulary) for _ in range(run.row - len(prompt)))]
            made.append(TokenRow(ids, list(range(len(prompt), len(ids))), f"row:{number}", len(ids), side))
    return made


def measured(run: Run) -> dict[str, Any]:
    """A run in this process: planned, trained, saved."""
    import trimtab
    from trimtab.artifacts import State, write_state
    from trimtab.engine import PeakMemory
    from trimtab.methods import Sample
    from trimtab.objectives import Objective
    from trimtab.run.start import prepare_objective
    from trimtab.train import Optimizer, TrainConfig, TrainingSteps, plan_training_memory, train

    base = base_of(run.family, run.dtype)
    rows = rows_of(run, base.model.config.get_text_config().vocab_size, 3)
    adapter = trimtab.attach(base.model, trimtab.method(run.method, **run.settings), sample=Sample([rows[0].ids]))
    config = TrainConfig(**{"epochs": 1, "rows_per_step": run.rows, **run.train})
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRIMTAB_CACHE"] = folder
        objective, (rows, _), _ = prepare_objective(Objective.pick(run.objective), base, adapter, (rows, []), 0, None)
        base.check_unchanged()  # so that all of it has been read
        memory = plan_training_memory(base, config, rows)
        peak = PeakMemory(base.device)
        optimizer = Optimizer(adapter, 0.0)
        for step in train(base, adapter, objective, TrainingSteps(rows, config, memory), config, 1e-4, memory, optimizer):
            if step.number == 3:
                trimtab.save_adapter(base, adapter, Path(folder) / "adapter")
                write_state(Path(folder), State(1, optimizer.state(), {}))
    assert peak.start is not None
    assert peak.highest is not None
    return {"before": peak.start, "planned": memory.peak_bytes, "grew": peak.highest - peak.start}


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(measured(RUNS[sys.argv[2]])))
        return
    for name in sys.argv[1:] or RUNS:
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        done = subprocess.run(
            [sys.executable, __file__, "one", name], capture_output=True, text=True, check=False, env=environment
        )
        if done.returncode:
            sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        result = json.loads(done.stdout.strip().splitlines()[-1])
        whole = (result["before"] + result["planned"]) / (result["before"] + result["grew"]) - 1
        grown = result["planned"] / result["grew"] - 1
        said = ", ".join(f"{key} {value / 1e6:,.0f} MB" for key, value in result.items())
        print(f"{name}: {said}; whole {whole:+.1%}, growth {grown:+.1%}", flush=True)
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**known, name: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
