"""Saving, loading, merging: handing a trained model over for use."""

from trimtab.deploy.adapter import keep_adapter, load_adapter, read_method, sample, save_adapter
from trimtab.deploy.combining import CombinedFolders, combine_adapters
from trimtab.deploy.merging import WELL_KEPT, Merged, merge
from trimtab.deploy.provenance import versions
from trimtab.deploy.save_pretrained import attach
from trimtab.deploy.target import Target, adapter_folder, open_target

__all__ = [
    "WELL_KEPT",
    "CombinedFolders",
    "Merged",
    "Target",
    "adapter_folder",
    "attach",
    "combine_adapters",
    "keep_adapter",
    "load_adapter",
    "merge",
    "open_target",
    "read_method",
    "sample",
    "save_adapter",
    "versions",
]
