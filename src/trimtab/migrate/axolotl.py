"""Axolotl's YAML files."""

from typing import Any

from trimtab.data.messages import ROLES
from trimtab.migrate._adapter import full, length, lora, quantized
from trimtab.migrate._preference import dpo_loss, objective
from trimtab.migrate._settings import NOTHING, Settings
from trimtab.migrate._sources import Source, held_out, no_sources, write_sources
from trimtab.migrate._training import training

TITLE = "Axolotl"
MULTIMODAL = ("processor_type", "image_size", "image_resize_algorithm", "freeze_mm_modules")
DEFAULTS = {
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1.0,
    "lr_scheduler": "cosine",
    "val_set_size": 0,
}
"""What Axolotl does where its schema has no default."""
TYPES = {
    "chatml.intel": {"prompt": "question"}, "llama3.intel": {"prompt": "question"},
    "chat_template.argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    "chatml.argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    "llama3.argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
}  # fmt: skip
"""What types of pairs call their columns."""
FASTER = ("cut_cross_entropy", "liger", "kernels")
"""Plugins that change how fast a result comes, and not the result."""
FIELDS = {
    "field_instruction": "instruction", "field_input": "input", "field_output": "output", "field_system": "system", "field_prompt": "prompt",
    "field_completion": "completion", "field_label": "label", "field_chosen": "chosen", "field_rejected": "rejected", "field_tools": "tools",
    "field": "text", "text_column": "text", "field_human": "prompt", "field_model": "completion",
}  # fmt: skip
DERIVED = ("type", "ds_type", "conversation", "chat_template", "roles", "field_thinking", "template_thinking_key", "trust_remote_code",
           "preprocess_shards", "split_thinking")  # fmt: skip
READ = {
    "message_property_mappings": ({"role": "role", "content": "content"}, {"role": "from", "content": "value"}),
    "message_field_role": ("role", "from"), "message_field_content": ("content", "value"), "message_field_training": ("train", "loss", "weight"),
    "train_on_eos": ("turn",), "train_on_eot": ("turn",),
}  # fmt: skip
"""Settings -> the values that mean what is done anyway."""
NOT_READ = {
    "train_on_eos": "the token that ends a trained turn is a target, and no other one is",
    "train_on_eot": "the token that ends a trained turn is a target, and no other one is",
}


def convert(settings: Settings, devices: int) -> None:
    _model(settings)
    _objective(settings)
    longer = "truncate" if settings.get("excess_length_strategy") == "truncate" else "drop"
    settings.settle("excess_length_strategy", "key", "", "data.overlong", longer)
    texts = settings.given.get("pretraining_dataset") not in NOTHING or _all_texts(settings.get("datasets"))
    most = length(settings, "sequence_len", "split" if texts else longer, "as Axolotl does with longer examples")
    _data(settings)
    plugins = settings.get("plugins") or []
    if plugins and all(any(known in str(plugin) for known in FASTER) for plugin in plugins):
        settings.derive("plugins", said="the fastest operations that are exact on the device are used")
    packs = settings.on("sample_packing") and most
    training(settings, "micro_batch_size", devices, packed=most if packs else None)


def _all_texts(sources: Any) -> bool:
    """Whether every dataset is of plain texts, which Axolotl cuts into blocks."""
    listed = sources if isinstance(sources, list) else []
    return bool(listed) and all(isinstance(one, dict) and str(one.get("type")).startswith("completion") for one in listed)


def _model(settings: Settings) -> None:
    for name in MULTIMODAL:
        if settings.on(name):
            settings.refuse(name, "images are not supported: Trimtab trains on text")
    if settings.on("gptq"):
        settings.refuse("gptq", "weights of GPTQ are not trained on: give the model that they were made from, and load_in_4bit")
    revision = settings.get("revision_of_model")
    settings.put("base_model", f"{settings.get('base_model')}{f'@{revision}' if revision else ''}")
    settings.settle("revision_of_model", "derived", "part of the model's name")
    adapter = settings.given.get("adapter")
    if adapter in NOTHING:
        full(settings, "adapter", "no adapter: all weights are trained")
    elif adapter in ("lora", "qlora", "dora"):
        settings.put("adapter", "lora" if adapter == "qlora" else adapter)
        lora(settings, alpha=2.0)
        quantized(settings)
    else:
        settings.refuse("adapter", "lora and qlora are converted")


def _objective(settings: Settings) -> None:
    for name in ("reward_model", "process_reward_model"):
        if settings.on(name):
            settings.refuse(name, "Trimtab trains models that answer, not ones that judge. TRL has it")
    kind = settings.given.get("rl")
    if kind in NOTHING:
        return
    if kind not in ("dpo", "ipo", "kto", "orpo", "simpo"):
        settings.refuse("rl", "Trimtab trains on existing examples, not on answers generated during training. TRL has it")
    beta = "orpo_alpha" if kind == "orpo" else settings.first("rl_beta", "dpo_beta")
    objective(settings, "rl", "dpo" if kind == "ipo" else kind, beta)
    if kind == "dpo" and settings.first("dpo_loss_type"):
        dpo_loss(settings, "dpo_loss_type")
    elif kind == "ipo":
        settings.write("rl", "objective.loss_type", "ipo")
    if kind == "simpo":
        settings.settle(
            "cpo_alpha", "missing", "simpo is trained without supervised fine-tuning beside it; objective: cpo has it"
        )


def _data(settings: Settings) -> None:
    name = settings.first("datasets", "pretraining_dataset")
    for given in ("datasets", "pretraining_dataset"):
        if given in settings.given and given != name:
            settings.settle(given, "unset")
    if name:
        write_sources(settings, name, _sources(settings, name))
    else:
        no_sources(settings, "datasets")
    if settings.first("test_datasets"):
        write_sources(settings, "test_datasets", _sources(settings, "test_datasets"), "data.eval")
    held_out(settings, "val_set_size")
    if settings.on("train_on_inputs"):
        settings.put("train_on_inputs", "everything")
    if settings.given.get("chat_template_jinja") and "\n" in str(settings.get("chat_template_jinja")):
        settings.settle("chat_template_jinja", "missing", "write the template into a file, and give model.chat_template=FILE")


def _sources(settings: Settings, name: str) -> list[Source]:
    given = settings.get(name)
    listed = given if isinstance(given, list) else [given]
    return [source for number, one in enumerate(listed) for source in _source(settings, f"{name}[{number}]", one)]


def _source(settings: Settings, where: str, one: Any) -> list[Source]:
    """The sources of an entry of `datasets`: one, or one a file."""
    given = {"path": one} if isinstance(one, str) else {key: value for key, value in dict(one).items() if value not in NOTHING}
    kind = given.get("type")
    inner = dict(kind) if isinstance(kind, dict) else {}
    given.update(inner)
    source: Source = {"path": given.pop("path", None)}
    files = given.pop("data_files", None)
    for theirs, here in (("name", "subset"), ("split", "split"), ("revision", "revision")):
        if theirs in given:
            source[here] = given.pop(theirs)
    if source.get("split") == "train":
        del source["split"]
    columns = {**TYPES.get(kind if isinstance(kind, str) else "", {}), **_columns(given)}
    if isinstance(kind, str) and kind.startswith("completion"):
        columns = {key: value for key, value in columns.items() if key == "text" and value != "text"}
    if columns:
        source["columns"] = columns
    return _settle_source(settings, where, given, kind, [{**source, "path": file} for file in _listed(files)] or [source])


def _columns(given: dict[str, Any]) -> dict[str, str]:
    columns = {here: given.pop(theirs) for theirs, here in FIELDS.items() if isinstance(given.get(theirs), str)}
    if messages := given.pop("field_messages", None):
        columns["conversations" if messages == "conversations" else "messages"] = messages
    return {here: theirs for here, theirs in columns.items() if here != theirs}


def _settle_source(settings: Settings, where: str, left: dict[str, Any], kind: Any, sources: list[Source]) -> list[Source]:
    """Say of what is left of an entry what became of it."""
    for key, value in left.items():
        settings.given.setdefault(f"{where}.{key}", value)
        named = f"{where}.{key}"
        if key in ("format", "no_input_format") and str(value).replace("{input}", "").strip() == "{instruction}":
            settings.settle(named, "derived", "the text of the prompt is the instruction and the input")
        elif key == "format":
            _write_format(str(value), sources)
            settings.settle(
                named, "key", "within the model's own chat template", "data.train.NAME.prompt", sources[0]["prompt"]
            )
        elif key == "roles_to_train":
            roles = list(dict.fromkeys(ROLES.get(str(role).lower(), role) for role in value))
            settings.write(named, "data.train_on", "assistant" if roles == ["assistant"] else roles)
        elif key == "system_prompt" and len(sources) == 1 and len(_listed(settings.get("datasets"))) == 1:
            settings.write(named, "data.system", value, "of examples that have none")
        elif key == "drop_system_message":
            settings.write(named, "data.drop_system", bool(value))
        elif key in READ and value not in READ[key]:
            said = "messages have role and content, or from and value, and a weight of their own as weight, train or loss: rename the keys"
            settings.settle(named, "missing", NOT_READ.get(key, said))
        elif key in DERIVED or key in READ:
            settings.settle(named, "derived", _said_of(key, value))
        else:
            settings.settle(named, "missing", "a source has no such setting: docs/recipe.md lists its keys")
    return sources


def _write_format(format: str, sources: list[Source]) -> None:
    """A prompt of Axolotl's fields as one of the data's columns, and the completion beside it."""
    for source in sources:
        columns = source.pop("columns", {})
        for field in ("instruction", "input", "system"):
            format = format.replace(f"{{{field}}}", f"{{{columns.get(field, field)}}}")
        source["prompt"], source["completion"] = format, f"{{{columns.get('output', 'output')}}}"
        if kept := {here: theirs for here, theirs in columns.items() if here not in ("instruction", "input", "output")}:
            source["columns"] = kept


def _said_of(key: str, value: Any) -> str:
    if key == "type" and str(value).startswith(("alpaca", "jeopardy")):
        return "recognized by its columns; the prompt's text is the model's own chat template's, not Alpaca's"
    return "the format is recognized by its columns, and written by the model's own chat template"


def _listed(given: Any) -> list[Any]:
    return [given] if isinstance(given, str) else list(given or [])
