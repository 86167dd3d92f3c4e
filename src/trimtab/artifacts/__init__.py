"""What Trimtab hands over, and what it goes on from: folders of safetensors and JSON, each with a manifest of ours."""

from trimtab.artifacts.adapter import Adapter, is_adapter, read_adapter, write_adapter
from trimtab.artifacts.run_folder import is_run, read_record
from trimtab.artifacts.standing import Standing, advice, refuse_uncertified, standing
from trimtab.artifacts.state import State, newest_state, read_state, saved_states, write_state
from trimtab.artifacts.tensors import sha256_tensor, write_tensors

__all__ = [
    "Adapter", "Standing", "State", "advice", "is_adapter", "is_run", "newest_state", "read_adapter", "read_record", "read_state",
    "refuse_uncertified", "saved_states", "sha256_tensor", "standing", "write_adapter", "write_state", "write_tensors",
]  # fmt: skip
