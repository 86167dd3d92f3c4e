"""Read other tools' options, and how often the example recipes of two use them: names, defaults and counts, as facts.

python benchmarks/options.py --llamafactory CHECKOUT --axolotl CHECKOUT --swift CHECKOUT --unsloth CHECKOUT

TRL is the installed one; LLaMA-Factory, Axolotl, ms-swift and Unsloth are checkouts of their repositories.
Writes src/trimtab/migrate/options/TOOL.json, which
`trimtab convert` reads, and tests/fixtures/other_tools/usage.json, by which a test counts what of the examples is covered.
"""

import argparse
import ast
import dataclasses
import enum
import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
OPTIONS, USAGE = ROOT / "src" / "trimtab" / "migrate" / "options", ROOT / "tests" / "fixtures" / "other_tools" / "usage.json"
LLAMAFACTORY = ("model_args", "data_args", "finetuning_args", "generating_args", "training_args", "megatron_bridge_args")
"""Files of hparams that `llamafactory-cli train` reads."""
AXOLOTL = ("model", "peft", "training", "integrations", "config", "multimodal", "deprecated")
SWIFT = ("base_args/base_args", "base_args/data_args", "base_args/model_args", "base_args/template_args", "base_args/quant_args",
         "base_args/generation_args", "tuner_args", "sft_args", "pretrain_args", "rlhf_args")  # fmt: skip
EARNED = {"RewardModelArguments", "TeacherModelArguments", "PPOArguments", "GRPOArguments"}
"""Classes of ms-swift whose trainers generate or judge answers, which are refused."""
UNSLOTH = {"FastLanguageModel": ("loader", "from_pretrained"), "get_peft_model": ("llama", "get_peft_model")}
"""Names for the arguments of two functions -> the file of unsloth/models and the function."""
PARTS = {
    "EBFTConfig", "LoftQConfig", "PeftConfig", "SpecialTokensConfig", "LrGroup", "SelectiveCheckpointingConfig", "RoleBoundarySpec",
    "AxolotlConfigWCapabilities",
}  # fmt: skip
"""Classes of these files whose fields are keys of an inner mapping."""


def plain(value: Any) -> Any:
    """A default as JSON data; None for what is none, or made at run time."""
    value = value.value if isinstance(value, enum.Enum) else value
    return value if isinstance(value, str | int | float | bool | list) else None


def declared(file: Path, skipped: set[str]) -> dict[str, Any]:
    """The fields of the classes of a file and their literal defaults."""
    found: dict[str, Any] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef) or node.name in skipped:
            continue
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and not field.target.id.startswith("_"):
                found[field.target.id] = _default(field.value)
    return found


def arguments_of(file: Path, name: str) -> dict[str, Any]:
    """The arguments of a file's first function of this name, and their literal defaults."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name).args
    defaults = zip(found.args[len(found.args) - len(found.defaults) :], found.defaults, strict=True)
    return {argument.arg: _default(default) for argument, default in defaults}


def _default(node: ast.expr | None) -> Any:
    if isinstance(node, ast.Call):
        named = {keyword.arg: keyword.value for keyword in node.keywords}
        node = named.get("default", node.args[0] if node.args else None)
    try:
        return plain(ast.literal_eval(node)) if node is not None else None
    except ValueError:
        return None


def fields(kind: Any) -> dict[str, Any]:
    """The fields of a dataclass and their defaults."""
    made = dataclasses.MISSING
    return {
        field.name: plain(field.default_factory() if field.default_factory is not made else field.default)
        for field in dataclasses.fields(kind)
    }


def examples(folder: Path) -> dict[str, Any]:
    """How often each key is set, neither empty nor switched off, in the YAML files that say how to train.

    Without LLaMA-Factory's examples/v1, files of another trainer with options of its own.
    """
    counts: Counter[str] = Counter()
    files = 0
    for file in sorted(folder.rglob("*.y*ml")):
        try:
            recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError:
            continue
        if isinstance(recipe, dict) and "learning_rate" in recipe and "v1" not in file.parts:
            files += 1
            counts.update(key for key, value in recipe.items() if value not in (None, False, "none", ""))
    return {"files": files, "keys": dict(sorted(counts.items()))}


def trl_options() -> dict[str, dict[str, Any]]:
    import peft
    import trl

    classes = {
        "SFTConfig": trl.SFTConfig,
        "DPOConfig": trl.DPOConfig,
        "KTOConfig": trl.KTOConfig,
        "LoraConfig": peft.LoraConfig,
    }
    script = {**fields(trl.ScriptArguments), **fields(trl.ModelConfig), "datasets": None}
    return {
        **{name: dict(sorted(fields(kind).items())) for name, kind in classes.items()},
        "script": dict(sorted(script.items())),
    }


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def version(checkout: Path, package: str) -> str:
    commit = subprocess.run(
        ["git", "-C", checkout, "log", "-1", "--format=%h, %as"], capture_output=True, text=True, check=True
    )
    return f"{package} at {commit.stdout.strip()}"


def main() -> None:
    from transformers import Seq2SeqTrainingArguments

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--llamafactory", type=Path, required=True)
    parser.add_argument("--axolotl", type=Path, required=True)
    parser.add_argument("--swift", type=Path, required=True)
    parser.add_argument("--unsloth", type=Path, required=True)
    arguments = parser.parse_args()
    theirs = {}
    hparams = arguments.llamafactory / "src" / "llamafactory" / "hparams"
    schemas = arguments.axolotl / "src" / "axolotl" / "utils" / "schemas"
    own = [declared(hparams / f"{name}.py", set()) for name in LLAMAFACTORY]
    theirs["llamafactory"] = {"train": {**fields(Seq2SeqTrainingArguments), **{k: v for part in own for k, v in part.items()}}}
    theirs["axolotl"] = {"train": {k: v for name in AXOLOTL for k, v in declared(schemas / f"{name}.py", PARTS).items()}}
    swift = arguments.swift / "swift"
    files = [*(swift / "arguments" / f"{name}.py" for name in SWIFT), swift / "trainers" / "arguments.py"]
    parts = [fields(Seq2SeqTrainingArguments), *(declared(file, EARNED) for file in files)]
    theirs["swift"] = {"train": {key: value for part in parts for key, value in part.items()}}
    models = arguments.unsloth / "unsloth" / "models"
    theirs["trl"] = trl_options() | {
        name: arguments_of(models / f"{file}.py", function) for name, (file, function) in UNSLOTH.items()
    }
    import trl

    versions = {
        "llamafactory": version(arguments.llamafactory, "hiyouga/LLaMA-Factory"),
        "axolotl": version(arguments.axolotl, "axolotl-ai-cloud/axolotl"),
        "swift": version(arguments.swift, "modelscope/ms-swift"),
        "trl": f"TRL {trl.__version__}, and of Unsloth {version(arguments.unsloth, 'unslothai/unsloth')}",
    }
    for tool, options in theirs.items():
        write(
            OPTIONS / f"{tool}.json",
            {"version": versions[tool], "options": {k: dict(sorted(v.items())) for k, v in options.items()}},
        )
    write(USAGE, {tool: examples(getattr(arguments, tool) / "examples") for tool in ("llamafactory", "axolotl")})


if __name__ == "__main__":
    main()
