"""Saving, loading, merging and combining adapters."""

from trimtab.deploy.adapter import copy_adapter, load_adapter, read_method, sample, save_adapter
from trimtab.deploy.combining import combine_adapters
from trimtab.deploy.hub_adapter import pinned_name
from trimtab.deploy.loaded_model import LoadedModel, adapter_folder, load_model
from trimtab.deploy.merging import COPIES, MIN_RETAINED, MergeReport, merge
from trimtab.deploy.provenance import versions
from trimtab.deploy.save_pretrained import attach

__all__ = [
    "COPIES", "MIN_RETAINED", "LoadedModel", "MergeReport", "adapter_folder", "attach", "combine_adapters", "copy_adapter", "load_adapter",
    "load_model", "merge", "pinned_name", "read_method", "sample", "save_adapter", "versions",
]  # fmt: skip
