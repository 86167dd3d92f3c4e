"""Adapter methods, one file each, and the way every one of them gets onto a model and off it again."""

from trimtab.core.wrapping import modules, unwrap
from trimtab.methods._attach import (
    Attached,
    activate,
    active,
    adapters,
    attach,
    place,
    refuse_name,
    replace_method,
    room,
    switch_of,
)
from trimtab.methods._base import AdapterLayer, LearningRateContext, Method, Sample
from trimtab.methods._combine import Combined, combine
from trimtab.methods._peft import OF_BASE
from trimtab.methods._switch import Routing, Switch, current_routing, routed

__all__ = [
    "OF_BASE",
    "AdapterLayer",
    "Attached",
    "Combined",
    "LearningRateContext",
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
    "modules",
    "place",
    "refuse_name",
    "replace_method",
    "room",
    "routed",
    "switch_of",
    "unwrap",
]
