"""What Trimtab hands over: adapter folders in PEFT's format, with a manifest of ours."""

from trimtab.artifacts.adapter import Adapter, is_adapter, read_adapter, write_adapter

__all__ = ["Adapter", "is_adapter", "read_adapter", "write_adapter"]
