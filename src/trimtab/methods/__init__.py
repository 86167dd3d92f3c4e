"""Adapter methods, one file each, and the way every one of them gets onto a model and off it again."""

from trimtab.methods._attach import Attached, attach, refuse_second
from trimtab.methods._base import AdapterLayer, Circumstances, Method

__all__ = ["AdapterLayer", "Attached", "Circumstances", "Method", "attach", "refuse_second"]
