"""Adapter methods, one file each, and the way every one of them gets onto a model and off it again."""

from trimtab.core.wrapping import look_through, modules
from trimtab.methods._attach import (
    Attached,
    activate,
    active,
    adapters,
    attach,
    place,
    refuse_name,
    room,
    stand_in,
    switch_of,
)
from trimtab.methods._base import AdapterLayer, Circumstances, Method, Sample
from trimtab.methods._combine import Combined, combine
from trimtab.methods._peft import OF_BASE
from trimtab.methods._switch import Routing, Switch, current_routing, routed

__all__ = [
    "OF_BASE",
    "AdapterLayer",
    "Attached",
    "Circumstances",
    "Combined",
    "Method",
    "Routing",
    "Sample",
    "Switch",
    "activate",
    "active",
    "adapters",
    "attach",
    "combine",
    "current_routing",
    "look_through",
    "modules",
    "place",
    "refuse_name",
    "room",
    "routed",
    "stand_in",
    "switch_of",
]
