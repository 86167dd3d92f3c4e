"""The frozen base model that adapters attach to: loading, identity and text."""

from trimtab.base.config import ModelConfig, fit_to_machine, nearest_config, resolve_device, resolve_dtype
from trimtab.base.export_files import write_config, write_processor, write_switches, write_tokenizer
from trimtab.base.fingerprint import Fingerprint, model_fingerprint, writes_dates
from trimtab.base.locate import locate_model
from trimtab.base.model import Base
from trimtab.base.room import room_to_use, weight_bytes
from trimtab.base.skeleton import quantization_when_loaded, skeleton
from trimtab.base.supported import context_length, limit_rows
from trimtab.core.chat import Message

__all__ = [
    "Base",
    "Fingerprint",
    "Message",
    "ModelConfig",
    "context_length",
    "fit_to_machine",
    "limit_rows",
    "locate_model",
    "model_fingerprint",
    "nearest_config",
    "quantization_when_loaded",
    "resolve_device",
    "resolve_dtype",
    "room_to_use",
    "skeleton",
    "weight_bytes",
    "write_config",
    "write_processor",
    "write_switches",
    "write_tokenizer",
    "writes_dates",
]
