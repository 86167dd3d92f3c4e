"""The model card (README.md) of what is published: metadata that the hub reads, and what a reader wants to know, measured.

Names in it come from data, files and models of anybody, so each is written as text: none becomes markup, a link or a line of its own.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from trimtab.base.locate import EMBEDDED
from trimtab.core import yaml12
from trimtab.core.hub import is_hub_name
from trimtab.deploy.publication import Publication

HUB = "https://huggingface.co"
UNKNOWN = "FOLDER_OF_THE_BASE_MODEL"
"""In the place of a base model that has no name that others know."""
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~$&]|:(?=//)|(?<=www)\.|@(?=\w))")
_QUESTION = "What is the capital of France?"


def model_card(about: Publication) -> str:
    """The card as Markdown with its metadata."""
    from huggingface_hub import ModelCard

    parts = (_title, _use, _data, _recipe, _results, _certificate, _limits, _versions)
    body = "\n".join(line for part in parts for line in part(about))
    return str(ModelCard(f"---\n{_metadata(about).to_yaml()}\n---\n\n{body.strip()}\n"))


def text(value: Any) -> str:
    """Anything as one line of Markdown that shows just it."""
    return _MARKUP.sub(r"\\\1", " ".join(str(value).split()))


def _fenced(content: str, language: str) -> list[str]:
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", content)), 3)
    return [f"{fence}{language}", content.rstrip(), fence]


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    lines = [" | ".join(text(cell) for cell in row) for row in (head, *rows)]
    return [f"| {lines[0]} |", f"|{'---|' * len(head)}", *(f"| {line} |" for line in lines[1:]), ""]


# Metadata


def _metadata(about: Publication) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    losses = about.certificate.get("losses", {}).get("adapter", {})
    names = {"held_out": "held-out examples of the training data", "general": "general text"}
    results = [
        EvalResult(
            task_type="text-generation", task_name="Text generation", dataset_type=on, dataset_name=names[on], metric_type="loss",
            metric_value=round(value, 6), metric_name=_loss_name(about, on),
        )
        for on, value in losses.items() if on in names
    ]  # fmt: skip
    method = about.adapter.method or {}
    library = (
        "transformers" if about.merged else "peft" if about.for_peft else "adapters" if about.for_adapterhub else "trimtab"
    )
    tags = ["trimtab", str(method.get("name")), _objective(about), *([] if about.merged else ["adapter"])]
    relation = {"base_model_relation": "finetune" if about.merged else "adapter"} if about.base_name else {}
    more: dict[str, Any] = {**about.base.licence, **relation}
    return ModelCardData(
        base_model=about.base_name,
        **more,
        language=about.base.language,
        library_name=library,
        pipeline_tag="text-generation",
        tags=[tag for tag in tags if tag],
        datasets=list(dict.fromkeys(source for source, *_ in _sources(about) if is_hub_name(source))) or None,
        model_name=about.name.rpartition("/")[2],
        eval_results=results or None,
    )


def _objective(about: Publication) -> str:
    return str(about.record.get("objective", {}).get("name", ""))


def _loss_name(about: Publication, on: str) -> str:
    objective = _objective(about) if on == "held_out" else "sft"
    return f"{objective.upper()} loss, nats a target token" if objective == "sft" else f"{objective.upper()} loss"


def _source_name(name: str, source: Mapping[str, Any]) -> str:
    return f"{source['name']} ({name})" if source.get("name") else name


def _sources(about: Publication) -> list[tuple[str, Mapping[str, Any]]]:
    """The training sources by the names that others may read: on the hub whole, of a file its last part."""
    found = []
    for source in about.data.get("sources", []):
        paths = [path for path in str(source["source"]).split(", ") if path]
        name = ", ".join(
            path.partition(":")[0] if is_hub_name(path.partition(":")[0]) else re.split(r"[/\\]", path)[-1] for path in paths
        )
        found.append((name, source))
    return found


# Parts


def _title(about: Publication) -> Iterator[str]:
    method, base = str((about.adapter.method or {}).get("name")), _base_link(about)
    kind = f"{base} with an adapter (`{method}`) merged into it" if about.merged else f"An adapter (`{method}`) for {base}"
    learned = f" {about.record['learned_tokens']:,} target tokens were trained on" if "learned_tokens" in about.record else ""
    steps = f" in {about.record['best']['step']:,} optimizer steps." if about.record.get("best") else "."
    yield from (
        f"# {text(about.name.rpartition('/')[2])}",
        "",
        f"{kind}, trained with [Trimtab](https://pypi.org/project/trimtab/).",
    )
    yield from ([f"{learned.strip()}{steps}"] if learned else [])
    yield ""
    licence = about.base.licence.get("license")
    if licence:
        yield f"Licence: {text(licence)}, the base model's."
    else:
        yield "Licence of the base model: unknown here, so none is given for this one. Look at the base model's own card before you use it."
    yield ""


def _base_link(about: Publication) -> str:
    if about.base_name:
        return f"[{text(about.base_name)}]({HUB}/{about.base_name})"
    return f"the model {text(about.adapter.base['model']['name'])} (not on the hub under a name known here)"


def _use(about: Publication) -> Iterator[str]:
    yield from ("## Use", "")
    if about.merged:
        yield from ("With Transformers:", "", *_fenced(_transformers_code(about), "python"), "")
        return
    option = "" if about.base_name else f" --model {UNKNOWN}"
    yield from ("With Trimtab:", "", *_fenced(f"trimtab chat {_ours(about)}{option}", "bash"), "")
    yield from (*_fenced(_trimtab_code(about), "python"), "")
    if about.for_peft:
        yield from ("With PEFT and Transformers:", "", *_fenced(_transformers_code(about), "python"), "")
    elif about.for_adapterhub:
        yield from ("The `adapters` library reads it, too; PEFT does not.", "")
    else:
        yield from ("PEFT does not read it: it does not have this method, or not in this form.", "")
    base = about.adapter.base["model"]["name"]
    if base == EMBEDDED:
        yield f"It was trained on the quantized copy of the base model that Trimtab calls {text(base)}."
        yield from ("On the original one, answers may differ a little.", "")


def _ours(about: Publication) -> str:
    return f"{about.name}@{about.branch}" if about.branch else about.name


def _trimtab_code(about: Publication) -> str:
    """A program that answers a question by Trimtab."""
    base, dtype = about.adapter.base["model"]["name"] if about.base_name else UNKNOWN, about.adapter.base["model"]["dtype"]
    load = f'base = trimtab.load({json.dumps(base)}, dtype="{dtype}")'
    ask = f"print(trimtab.answer(base, {json.dumps(_QUESTION)}))"
    return "\n".join(["import trimtab", "", load, f"trimtab.load_adapter(base, {json.dumps(_ours(about))})", ask])


def _transformers_code(about: Publication) -> str:
    """A program that answers a question by Transformers."""
    base, dtype = json.dumps(about.base_name or UNKNOWN), about.adapter.base["model"]["dtype"]
    name = json.dumps(about.name) + (f", revision={json.dumps(about.branch)}" if about.branch else "")
    if about.merged:
        imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
        load = [f'model = AutoModelForCausalLM.from_pretrained({name}, dtype="auto")']
    elif about.base_name and not about.branch:  # whose revision would be asked of the base model, too
        imports = ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer"]
        load = [f'model = AutoPeftModelForCausalLM.from_pretrained({name}, dtype="{dtype}")']
    else:
        imports = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
        load = [
            f'base = AutoModelForCausalLM.from_pretrained({base}, dtype="{dtype}")',
            f"model = PeftModel.from_pretrained(base, {name})",
        ]
    ask = [
        f'messages = [{{"role": "user", "content": {json.dumps(_QUESTION)}}}]',
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")',
    ]
    if not about.has_template:
        ask = [f'inputs = tokenizer({json.dumps(_QUESTION)}, return_tensors="pt")']
    answer = [
        "answer = model.generate(**inputs, max_new_tokens=256, do_sample=False)",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
    ]
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({name if about.tokenizer else base})"
    return "\n".join([*imports, "", *load, tokenizer, "", *ask, *answer])


def _data(about: Publication) -> Iterator[str]:
    sources = _sources(about)
    if not sources:
        return
    yield from ("## Training data", "")
    rows = [
        (
            f"{source['name']} ({name})" if source.get("name") else name,
            f"{source['rows']:,}",
            f"{source['used']:,}",
            f"{source['rows'] - source['used']:,}",
        )
        for name, source in sources
    ]
    yield from _table(("Source", "Examples", "Used", "Left out"), rows)
    hashes = [(re.split(r"[/\\]", name)[-1], digest) for name, digest in about.data.get("files", {}).items()]
    yield from (_table(("File", "SHA-256"), hashes) if hashes else [])
    held_out = len(about.data.get("held_out", []))
    if held_out:
        yield f"{held_out:,} of the examples were held out for validation, and not trained on."
    yield from (f"SHA-256 of all token rows: {text(about.data.get('digest'))}", "")


def _recipe(about: Publication) -> Iterator[str]:
    if about.recipe:
        yield from ("## Recipe", "", "<details><summary>The whole recipe, with every default</summary>", "")
        yield from (*_fenced(yaml12.dump(about.recipe), "yaml"), "", "</details>", "")
        rate = f"Peak learning rate {about.record['peak_lr']:.3g}" if "peak_lr" in about.record else ""
        parameters = (
            f"{about.record['trainable_parameters']:,} trained parameters" if "trainable_parameters" in about.record else ""
        )
        yield from ("; ".join(filter(None, (rate, parameters, f"device {text(about.record.get('device'))}"))) + ".", "")


def _results(about: Publication) -> Iterator[str]:
    losses = about.certificate.get("losses")
    if not losses:
        return
    differences = {test["name"]: test.get("difference") for test in about.certificate["tests"]}
    rows = []
    for on, name, test in (
        ("held_out", _loss_name(about, "held_out"), "gain"),
        ("general", "Loss on general text", "forgetting"),
    ):
        if on in losses["adapter"]:
            before = f"{losses['base'][on]:.4f}" if on in losses["base"] else "unknown"
            found = differences.get(test)
            change = "{:+.4f} ({:+.4f} to {:+.4f})".format(*found) if found else "unknown"
            rows.append((name, before, f"{losses['adapter'][on]:.4f}", change))
    other = "Reference model" if about.record.get("reference") else "Base model"
    yield from (
        "## Results",
        "",
        f"On {len(about.data.get('held_out', [])):,} held-out examples, and on general text apart from the task. Less is better.",
        "",
    )
    yield from _table(("", f"Before ({other.lower()})", "After", "Difference (95 % interval)"), rows)


def _certificate(about: Publication) -> Iterator[str]:
    yield from ("## Certificate", "")
    if not about.certificate:
        yield from ("None: this adapter comes without a certified run, so nothing was measured.", "")
        return
    state = "passed" if about.certificate["passed"] else "**not passed**"
    yield from (f"The run's certificate: {state}. It was made by a new process that loaded the saved adapter.", "")
    yield from _table(("Test", "Status", "Finding"), [(t["name"], t["status"], t["words"]) for t in about.certificate["tests"]])


def _limits(about: Publication) -> Iterator[str]:
    yield from ("## Limitations", "")
    tests = {test["name"]: test for test in about.certificate.get("tests", [])}
    if forgetting := tests.get("forgetting"):
        worse = " It has forgotten some of what the base model knew." if forgetting["status"] == "noted" else ""
        yield f"- {text(forgetting['words'][:1].upper() + forgetting['words'][1:])}.{worse}"
    if stops := tests.get("stops"):
        yield f"- {text(stops['words'])}."
    yield "- Only what stands above was measured. Facts, safety, and tasks other than the training data's were not."
    yield from ("- All limitations of the base model apply.", "")


def _versions(about: Publication) -> Iterator[str]:
    yield from (
        "## Versions",
        "",
        ", ".join(f"{text(name)} {text(version)}" for name, version in about.adapter.versions.items()),
        "",
    )
