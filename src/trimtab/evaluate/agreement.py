"""What processes agree on before they divide an evaluation, for each would take another's results for its own."""

from typing import Any

from trimtab.artifacts import sha256_tensor
from trimtab.base import Base
from trimtab.core.files import json_digest
from trimtab.core.processes import processes
from trimtab.methods import adapters


def agree_on_questions(base: Base, what: str, asked: Any) -> None:
    """Raise ProcessesDiffer if another process, on another machine perhaps, has another model or other questions.

    Args:
        what: Says what is asked.
        asked: The tokens of all of it, as JSON data.
    """
    if processes.size == 1:
        return
    advice = "Have the same files on every machine."
    processes.agree(f"the base model {base.source}: {advice}", base.fingerprint)
    tensors = [tensor for adapter in adapters(base.model).values() for tensor in adapter.state().values()]
    processes.agree(f"the adapter: {advice}", [sha256_tensor(tensor) for tensor in tensors])
    processes.agree(f"{what}: {advice}", json_digest(asked))
