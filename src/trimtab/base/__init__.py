"""The frozen model and everything that gives its tokens meaning."""

from trimtab.base.config import ModelConfig, as_held, here
from trimtab.base.fingerprint import Fingerprint, model_fingerprint
from trimtab.base.model import Base, Message
from trimtab.base.written import write_config, write_tokenizer

__all__ = [
    "Base",
    "Fingerprint",
    "Message",
    "ModelConfig",
    "as_held",
    "here",
    "model_fingerprint",
    "write_config",
    "write_tokenizer",
]
