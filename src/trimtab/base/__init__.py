"""The frozen model that adapters attach to: loading it, and knowing exactly which one it is."""

from trimtab.base.config import ModelConfig, as_held, here
from trimtab.base.export_files import write_config, write_switches, write_tokenizer
from trimtab.base.fingerprint import Fingerprint, model_fingerprint, writes_dates
from trimtab.base.locate import located
from trimtab.base.model import Base, Message
from trimtab.base.skeleton import skeleton
from trimtab.base.supported import context_length

__all__ = [
    "Base",
    "Fingerprint",
    "Message",
    "ModelConfig",
    "as_held",
    "context_length",
    "here",
    "located",
    "model_fingerprint",
    "skeleton",
    "write_config",
    "write_switches",
    "write_tokenizer",
    "writes_dates",
]
