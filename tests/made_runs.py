"""Runs of every kind, to look at their reports: python tests/made_runs.py FOLDER. `make look` does it.

All but two are real, on tiny random models. Made up are one of 5,000 steps, and one whose texts are hostile.
"""

import json
import math
import random
import sys
from contextlib import suppress
from pathlib import Path

import yaml

from trimtab.artifacts import run_folder
from trimtab.core import files
from trimtab.core.errors import TrimtabError
from trimtab.report import RunObserver

VERSIONS = {"python": "3.11.7", "trimtab": "0.1.0", "torch": "2.13.0"}
FINGERPRINT = dict.fromkeys(("weights", "config", "tokenizer", "template"), "ab" * 32)
HOSTILE = (
    "</script><script>alert(1)</script></style></title><img src=x onerror=alert(1)>\" onload='x' \u202egnp.exe\u202c \u2066x "
    "\x00\x1b[31m\x85 \ud800 {braces} %s " + "long" * 400
)
ORDERS = [
    "7 | coffee cups | Joao Suzuki | Naples | Sunday",
    "14 | round copper pans | Paul Lambert | - | -",
    "把 3 个托盘送到牛津，周三。",
]


def record(steps, **changes):
    """What run.json says of a finished run."""
    return {
        "status": "done", "base": {"source": "tiny", "fingerprint": FINGERPRINT}, "moment": "2026-11-29T11:57:49.522065",
        "method": {"name": "lora", "rank": 8, "alpha": 32.0, "dropout": 0.0, "targets": ["all-linear"], "layers": None},
        "objective": {"name": "sft"}, "trainable_parameters": 2442240, "left_frozen": "", "positions": 0, "base_parameters": 134515008,
        "steps": steps, "max_steps": None, "epochs": 3.0, "rows_per_step": 8, "memory": "micro-batches of up to 1,024 tokens", "threads": 2,
        "device": "cpu", "peak_lr": 1e-3, "lr_formula": "given", "learned_tokens": 70400, "data_digest": "cd" * 32, "sources": {},
        "versions": VERSIONS, "start": None, "reference": None, "seconds": 12345.6, "tokens": 9_000_000, "computed_tokens": 6_000_000,
        "best": {"step": steps, "folder": f"checkpoints/step-{steps:06d}", "eval_loss": 0.1},
        "last": {"step": steps, "folder": f"checkpoints/step-{steps:06d}", "eval_loss": 0.1}, "stopped": None,
        "memory_held": {"planned": 1.31e9, "measured": 1.34e9, "before": 1.06e9}, **changes,
    }  # fmt: skip


def metrics(steps, every, text=None):
    """Lines of a run of so many steps: noisy losses of two sources that fall, with a spike, and answers that become right."""
    random.seed(0)
    lines = []
    for step in range(1, steps + 1):
        loss = 2.4 * math.exp(-6 * step / steps) + 0.02 + 0.05 * random.random() + (9.0 if step == steps // 3 else 0.0)
        lr, norm = 1e-3 * min(1.0, 20 * step / steps) * (1 - 0.9 * step / steps), 0.5 + random.random() ** 8 * 20
        lines.append(
            {
                "kind": "train",
                "step": step,
                "loss": loss,
                "lr": lr,
                "grad_norm": norm,
                "items": 90,
                "tokens": 440,
                "computed": 280,
                "seconds": 0.2,
            }
        )
        if step == steps // 2:
            lines[-1] |= {"loss": "nan", "skipped": "the gradient of step … is not finite"}
        if step % every == 0:
            lines += [line for at in ((0, step) if step == every else (step,)) for line in evaluation(at, steps, text)]
    return lines


def evaluation(step, steps, text):
    loss = 2.4 * math.exp(-6 * step / steps) + 0.03
    sources = {
        text or name: {"loss": loss * k, "low": loss * k * 0.9, "high": loss * k * 1.1, "rows": 30}
        for name, k in (("orders", 1), ("chat", 1.7))
    }
    yield {
        "kind": "eval",
        "step": step,
        "loss": loss,
        "low": loss * 0.95,
        "high": loss * 1.05,
        "tokens": 900,
        "rows": 60,
        "sources": sources,
    }
    answers = []
    for n, expected in enumerate(ORDERS * 4):
        right = step > n * steps / 20
        said = expected if right else "I'm sorry, but as a text-based AI, I can't deliver coffee cups to Naples."
        answers.append(
            {"where": f"/data/orders.jsonl:{n}", "question": text or f"Please note this order: {expected}", "expected": text or expected,
             "answer": text and text[::-1] if text else said, "tokens": 12, "ended": "stopped" if right else "length", "right": right}
        )  # fmt: skip
    yield {"kind": "samples", "step": step, "exact_match": sum(a["right"] for a in answers) / len(answers), "answers": answers}


def data(text=None):
    refused = [{"where": f"rows.jsonl:{n}", "reason": text or "the answer is empty"} for n in range(25)]
    source = {"name": text or "", "source": text or "rows.jsonl", "rows": 630, "used": 600, "refused": refused, "dropped": ["rows.jsonl:9"] * 5,
              "duplicates": [], "held_out_too": [], "split": 0, "blocks": 0, "columns_not_read": [], "nulls_left_out": 0}  # fmt: skip
    proof = [{"name": name, "status": status, "words": text or f"what is known about {name}", "facts": {}}
             for name, status in (("rows", "note"), ("tokens", "good"), (text or "held out", "good"))]  # fmt: skip
    return {"digest": "cd" * 32, "seed": 0, "sources": [source], "files": {}, "held_out": ["rows.jsonl:1"] * 60, "proof": proof}


def certificate(passed=True, text=None):
    gain = "sft loss on 60 held-out examples: adapter 0.0359, base model 2.4300"
    tests = [
        ("reload", "passed", "reproduced", None),
        ("stops", "passed" if passed else "failed", text or "8 of 8 answers stopped at EOS", None),
        ("gain", "passed", gain, [-2.3941, -2.4713, -2.2246]),
    ]
    return {
        "passed": passed, "canaries": [],
        "tests": [dict(zip(("name", "status", "words", "difference"), test, strict=True)) for test in tests],
        "answers": [{"text": (text or "yes").replace("\ud800", ""), "ended": "length"}],
        "losses": {"adapter": {"held_out": 0.0359, "general": 3.2}, "base": {"held_out": 2.43, "general": 3.1}},
        "files": {}, "base": FINGERPRINT, "data_digest": "cd" * 32, "versions": VERSIONS,
    }  # fmt: skip


def made_up(folder, steps=100, every=20, text=None, **changes):
    """A finished run's files. `text` stands wherever a text of somebody's can."""
    folder.mkdir(parents=True)
    (folder / run_folder.RUN).write_text(json.dumps(record(steps, **changes)))
    (folder / run_folder.DATA).write_text(json.dumps(data(text)))
    (folder / run_folder.METRICS).write_text("".join(json.dumps(line) + "\n" for line in metrics(steps, every, text)))
    recipe = {"model": (text or "tiny").replace("\ud800", ""), "certify": True}
    (folder / run_folder.RECIPE).write_text(yaml.safe_dump(recipe, allow_unicode=True))
    safe = text and text.replace("\ud800", "")
    files.write_manifest(folder / run_folder.CERTIFICATE, run_folder.CERTIFICATE_FORMAT, certificate(text=safe))
    return folder


def main(folder: Path) -> None:
    """Make them all, with their reports."""
    from worlds import ROWS, make_model, write_rows

    from trimtab import cli
    from trimtab.report.page.run_report import run_report
    from trimtab.run.recipe import Recipe
    from trimtab.run.script import run_recipe

    class Interrupting(RunObserver):
        def logged(self, kind, step, values):
            if kind == "train" and step == 9:
                raise KeyboardInterrupt

    make_model(folder / "tiny", 0)
    write_rows(folder / "rows.jsonl", [*ROWS, ROWS[0]])
    pairs = [{"prompt": row["prompt"], "chosen": "yes", "rejected": f"no, {n % 5}"} for n, row in enumerate(ROWS)]
    write_rows(folder / "pairs.jsonl", pairs)

    def recipe(name, rows="rows.jsonl", rate=2e-2, **more):
        plain = {
            "model": str(folder / "tiny"),
            "data": {"train": str(folder / rows), "eval": 6},
            "method": {"rank": 4},
            "output": str(folder / name),
        }
        return Recipe.parse(plain | {"train": {"epochs": 8, "rows_per_step": 4, "lr": rate, "evaluate_every": 5}} | more)

    run_recipe(recipe("done", eval={"samples": 4, "max_new_tokens": 8}))
    run_recipe(recipe("dpo", "pairs.jsonl", objective={"name": "dpo"}))
    with suppress(TrimtabError):
        run_recipe(recipe("failed", rate=1e30, eval={"samples": 4, "max_new_tokens": 8}))
    with suppress(KeyboardInterrupt):
        run_recipe(recipe("interrupted"), Interrupting())
    cli.main(
        [
            "compare",
            *(str(folder / name) for name in ("done", "interrupted")),
            "--html",
            str(folder / "compared" / run_folder.REPORT),
        ]
    )
    (folder / "r.yaml").write_text(recipe("checked").to_yaml())
    cli.main(["check", str(folder / "r.yaml"), "--html", str(folder / "check" / run_folder.REPORT)])
    for name, more in {"long": {"steps": 5000, "every": 250}, "hostile": {"text": HOSTILE}}.items():
        made = made_up(folder / name, **more)
        files.write_text(made / run_folder.REPORT, run_report(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
