"""Adapter methods, one file each, and the way every one of them gets onto a model and off it again."""

from trimtab.methods._acting import Routing, Switch, current_routing, routed
from trimtab.methods._attach import (
    Attached,
    activate,
    active,
    adapters,
    attach,
    place,
    positions_taken,
    refuse_name,
    switch_of,
)
from trimtab.methods._base import AdapterLayer, Circumstances, Method, Sample, look_through, modules

__all__ = [
    "AdapterLayer",
    "Attached",
    "Circumstances",
    "Method",
    "Routing",
    "Sample",
    "Switch",
    "activate",
    "active",
    "adapters",
    "attach",
    "current_routing",
    "look_through",
    "modules",
    "place",
    "positions_taken",
    "refuse_name",
    "routed",
    "switch_of",
]
