"""Adapter methods, one file each, and the way every one of them gets onto a model and off it again."""

from trimtab.methods.attach import Attached, attach
from trimtab.methods.base import AdapterLayer, Circumstances, Method

__all__ = ["AdapterLayer", "Attached", "Circumstances", "Method", "attach"]
