"""Adapters, training states and run folders on disk: safetensors and JSON, each with a manifest of hashes."""

from trimtab.artifacts.adapter import Adapter, is_adapter, read_adapter, write_adapter
from trimtab.artifacts.run_folder import is_run, read_certificate, read_record
from trimtab.artifacts.run_status import RunStatus, failure_advice, refuse_uncertified, run_status
from trimtab.artifacts.state import State, newest_state, read_state, saved_states, write_state
from trimtab.artifacts.tensors import sha256_tensor, write_tensors

__all__ = [
    "Adapter", "RunStatus", "State", "failure_advice", "is_adapter", "is_run", "newest_state", "read_adapter", "read_certificate",
    "read_record", "read_state", "refuse_uncertified", "run_status", "saved_states", "sha256_tensor", "write_adapter", "write_state",
    "write_tensors",
]  # fmt: skip
