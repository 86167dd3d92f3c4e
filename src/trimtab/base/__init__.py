"""The frozen model and everything that gives its tokens meaning."""

from trimtab.base.config import ModelConfig, as_held, here
from trimtab.base.fingerprint import Fingerprint, model_fingerprint
from trimtab.base.model import Base, Message
from trimtab.base.supported import context_length

__all__ = ["Base", "Fingerprint", "Message", "ModelConfig", "as_held", "context_length", "here", "model_fingerprint"]
