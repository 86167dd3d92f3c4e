"""The frozen model and everything that gives its tokens meaning."""

from trimtab.base.fingerprint import Fingerprint, model_fingerprint
from trimtab.base.model import Base, Message, ModelConfig

__all__ = ["Base", "Fingerprint", "Message", "ModelConfig", "model_fingerprint"]
