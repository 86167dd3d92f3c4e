"""What several processes do with the base model, one file each: hold all of it each, or a share each."""

from trimtab.distributed._base import Engine

__all__ = ["Engine"]
