"""The switches of a chat template: variables that it reads and the user can set, such as `enable_thinking`."""

from collections.abc import Mapping
from typing import Any

from trimtab.base.render_limits import parse_template, within_limits

Switches = Mapping[str, Any]
"""Variables of a template that the user can set, such as `enable_thinking`."""
STANDARD_VARIABLES = {
    "messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "pad_token", "sep_token",
    "cls_token", "mask_token", "raise_exception", "strftime_now", "namespace", "range", "dict", "lipsum", "cycler", "joiner",
    "continue_final_message",
}  # fmt: skip
"""Variables that Transformers and Jinja pass to every template."""


def switches_of(template: str) -> set[str]:
    """The names of a template's switches: variables that it reads, and does not set itself or only where they are not set.

    Raises:
        DataError: The template exceeds a limit.
    """
    from jinja2 import meta, nodes

    tree = parse_template(template)
    if tree is None:
        return set()
    optional = {
        t.node.name for t in tree.find_all(nodes.Test) if t.name in ("defined", "undefined") and isinstance(t.node, nodes.Name)
    }
    optional |= {
        f.node.name for f in tree.find_all(nodes.Filter) if f.name in ("default", "d") and isinstance(f.node, nodes.Name)
    }
    optional -= {argument.name for macro in tree.find_all(nodes.Macro) for argument in macro.args}
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    read = within_limits(template, lambda: meta.find_undeclared_variables(tree))
    return {name for name in read - STANDARD_VARIABLES if (name not in own or name in optional) and not name.startswith("_")}
