"""Compare `trimtab eval --harness` with the harness's own Hugging Face backend, task by task: python benchmarks/harness.py TASK.yaml …

Both get the same requests. For each task: the metrics by both, the largest difference of a log-likelihood, how many greedy verdicts
or answers differ, and the seconds of each.
"""

import argparse
import time

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

import trimtab
from trimtab.evaluate.harness import load_tasks, quiet
from trimtab.evaluate.packed_model import PackedModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="+", help="tasks that the harness has, or YAML files of tasks")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--adapter", help="a run or adapter folder, instead of --model")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=8, help="of the Hugging Face backend")
    arguments = parser.parse_args()
    ours, theirs = (_open(arguments) for _ in range(2))
    backends = {
        "packed": PackedModel(ours),
        "hf": HFLM(pretrained=theirs.model, tokenizer=theirs.tokenizer, batch_size=arguments.batch_size),
    }
    for name in arguments.tasks:
        results, seconds = {}, {}
        for backend, model in backends.items():
            with quiet():
                tasks = load_tasks([name])
                started = time.perf_counter()
                results[backend] = simple_evaluate(model, **tasks, limit=arguments.limit, bootstrap_iters=0)
                seconds[backend] = time.perf_counter() - started
        _show(results, seconds)


def _open(arguments: argparse.Namespace) -> "trimtab.Base":
    if arguments.adapter is None:
        return trimtab.load(arguments.model)
    from trimtab.deploy import load_model

    return load_model(arguments.adapter).base


def _show(results: dict, seconds: dict[str, float]) -> None:
    for task, samples in results["packed"]["samples"].items():
        for key, value in results["packed"]["results"][task].items():
            if "," in key and "_stderr" not in key:
                print(f"{task} {key}: packed {value:.6f}, hf {results['hf']['results'][task][key]:.6f}")
        pairs = [
            (ours, theirs)
            for one, other in zip(samples, results["hf"]["samples"][task], strict=True)
            for ours, theirs in zip(one["resps"], other["resps"], strict=True)
            for ours, theirs in zip(ours, theirs, strict=True)
        ]
        if isinstance(pairs[0][0], tuple):
            apart = max(abs(ours[0] - theirs[0]) for ours, theirs in pairs)
            print(
                f"  {len(pairs)} log-likelihoods, at most {apart:.2e} apart; greedy verdicts that differ: "
                f"{sum(ours[1] != theirs[1] for ours, theirs in pairs)}"
            )
        elif isinstance(pairs[0][0], str):
            print(f"  {len(pairs)} answers, of which {sum(ours != theirs for ours, theirs in pairs)} differ")
        else:
            print(f"  {len(pairs)} texts, at most {np.max(np.abs(np.subtract(*zip(*pairs, strict=True)))):.2e} apart")
    print(f"  packed {seconds['packed']:.1f} s, hf {seconds['hf']:.1f} s: {seconds['hf'] / seconds['packed']:.2f}x")


if __name__ == "__main__":
    main()
