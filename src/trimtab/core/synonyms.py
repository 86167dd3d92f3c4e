"""What other tools' names of recipe keys, methods and objectives are here, looked up in core/other_tools.py and other_tools_only.py."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from trimtab.core.other_tools import AUTOMATIC, AUTOMATIC_FAMILIES, SAME
from trimtab.core.other_tools_only import FAMILIES, UNSUPPORTED

CHOICES = {
    "qlora": "it is method: lora with model.quantize: nf4",
    "rslora": "it is method: lora with method.rank_stabilized: true",
    "pissa": "it is method: lora with method.init: pissa",
    "eva": "it is method: lora with method.init: eva",
    "loraplus": "it is method: lora with method.b_rate: 16",
    "lora+": "it is method: lora with method.b_rate: 16",
    **dict.fromkeys(("adapter", "adapters", "houlsby", "pfeiffer", "bottleneck_adapter"), "it is method: bottleneck"),
    **dict.fromkeys(("prefix_tuning", "prefix-tuning", "prefixtuning"), "it is method: prefix"),
    **dict.fromkeys(("p_tuning", "p-tuning"), "it is method: ptuning"),
    **dict.fromkeys(("p_tuning_v2", "p-tuning-v2", "ptuning-v2", "ptuningv2"), "it is method: ptuning_v2"),
    **dict.fromkeys(("prompt_tuning", "prompt-tuning"), "it is method: prompt"),
    **dict.fromkeys(("(ia)3", "ia^3", "ia3_tuning"), "it is method: ia3"),
    **dict.fromkeys(("boft", "hra", "goft"), "method: oft is the nearest"),
    **dict.fromkeys(
        ("loha", "lokr", "adalora", "vera", "vblora", "fourierft", "longlora", "galore", "badam", "lisa", "freeze"),
        "it is not supported: `trimtab methods` lists the methods that are",
    ),
    **dict.fromkeys(("pretrain", "pt", "cpt", "pretraining", "clm"), "it is objective: sft on examples with the column `text`"),
    **dict.fromkeys(("sft_trainer", "instruct", "instruction"), "it is objective: sft"),
    **dict.fromkeys(("ipo", "hinge"), "it is objective: {name: dpo, loss_type: …}"),
    **dict.fromkeys(
        ("grpo", "ppo", "rloo", "reinforce", "online_dpo", "gkd", "rm", "reward", "reward_model", "prm", "dapo", "gspo", "nash_md", "xpo"),
        "it is not supported: Trimtab trains on existing examples, not on answers generated during training. TRL has it",
    ),
}  # fmt: skip
"""Other tools' names of methods and objectives."""


class Meaning(NamedTuple):
    """What a setting of another tool is here."""

    outcome: Literal["key", "derived", "missing"]
    said: str
    """The key of the recipe; what is done without one; or why it is not there."""


def meaning_of(name: str) -> Meaning | None:
    """What another tool's setting is here; None if the table does not have it."""
    name = _normalize(name)
    if name in SAME:
        return Meaning("key", SAME[name])
    derived = AUTOMATIC.get(name) or _of_family(name, AUTOMATIC_FAMILIES)
    if derived:
        return Meaning("derived", derived)
    missing = UNSUPPORTED.get(name) or _of_family(name, FAMILIES)
    return Meaning("missing", missing) if missing else None


def _of_family(name: str, families: dict[str, str]) -> str | None:
    return next((said for start, said in families.items() if name.startswith(start)), None)


def translate_key(name: str, known: Iterable[str] = ()) -> str | None:
    """What another tool's key is in Trimtab, as a sentence without its end; None if the key is unknown.

    Args:
        known: The keys of the section in which it was used. A key that another section has under the same name is
            translated only where sections are known, at the top of the recipe.
    """
    meaning = meaning_of(name)
    if meaning is None or meaning.outcome != "key":
        return meaning and (f"it is not supported: {meaning.said}" if meaning.outcome == "missing" else meaning.said)
    elsewhere = meaning.said.endswith(f".{_normalize(name)}") and meaning.said.partition(".")[0] not in known
    return None if elsewhere else f"it is {meaning.said} here"


def translate_choice(name: str, known: Iterable[str] = ()) -> str | None:
    """What another tool's method or objective is in Trimtab."""
    return CHOICES.get(name.strip().lower()) or CHOICES.get(_normalize(name))


def suggest(name: Any, known: Iterable[str], translate: Callable[[str, Iterable[str]], str | None]) -> str:
    """How a message about an unknown name ends: `. Did you mean …?`, the name's translation, or all known names.

    Args:
        translate: Explains a name that other tools use.
    """
    name, known = str(name), list(known)
    same = [candidate for candidate in known if _normalize(candidate) == _normalize(name)]
    if not same and (translation := translate(name, known)):
        return f": {translation}."
    nearest = same or difflib.get_close_matches(name, known, n=1, cutoff=0.65)
    return f". Did you mean {nearest[0]!r}?" if nearest else f". Known: {', '.join(known)}." if known else ". It has none."


def key_for_option(option: str) -> str | None:
    """The recipe key to write instead of an unknown command-line option such as `--lr=1e-4`, if there is one."""
    name, equals, value = option.lstrip("-").partition("=")
    key = name if "." in name else SAME.get(_normalize(name), "").partition(" ")[0]
    return f"{key}={value if equals else '…'}" if key and "=" not in key else key or None


def _normalize(name: str) -> str:
    return name.strip().lower().replace("-", "_")
