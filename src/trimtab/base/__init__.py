"""The frozen model and everything that gives its tokens meaning."""

from trimtab.base.config import ModelConfig, here
from trimtab.base.fingerprint import Fingerprint
from trimtab.base.model import Base, Message

__all__ = ["Base", "Fingerprint", "Message", "ModelConfig", "here"]
