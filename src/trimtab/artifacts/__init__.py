"""What Trimtab hands over, and what it goes on from: folders of safetensors and JSON, each with a manifest of ours."""

from trimtab.artifacts.adapter import Adapter, is_adapter, read_adapter, write_adapter
from trimtab.artifacts.state import State, newest_state, read_state, saved_states, write_state
from trimtab.artifacts.tensors import sha256_tensor, write_tensors

__all__ = [
    "Adapter", "State", "is_adapter", "newest_state", "read_adapter", "read_state", "saved_states", "sha256_tensor",
    "write_adapter", "write_state", "write_tensors",
]  # fmt: skip
