"""Adapter methods, one file each; how they get onto a model and off it again; and what a new method is made from."""

from trimtab.core.wrapping import base_modules, unwrap
from trimtab.methods._attach import (
    Attached,
    activate,
    active,
    adapters,
    attach,
    attach_uninitialized,
    max_row_length,
    replace_method,
    require_free_name,
    switch_of,
)
from trimtab.methods._base import AdapterLayer, LearningRateContext, LowRankUpdate, MatrixMethod, Method, Sample
from trimtab.methods._combine import Combined, combine
from trimtab.methods._matrices import (
    ALL,
    ALL_LINEAR,
    ATTENTION,
    ByTarget,
    MatrixShape,
    Patterns,
    Targets,
    find_matrices,
    left_frozen,
    matches_target,
    matrix_modules,
    matrix_shape,
    require_matrix_shape,
    select_modules,
    targeted_experts,
    trainable_dtype,
    weight_matrix,
    with_weight,
)
from trimtab.methods._peft import (
    BASE_TENSOR_PREFIX,
    check_peft_config,
    shortest_names,
    to_peft_names,
)
from trimtab.methods._switch import Routing, Switch, current_routing, routed

__all__ = [
    "ALL", "ALL_LINEAR", "ATTENTION", "BASE_TENSOR_PREFIX", "AdapterLayer", "Attached", "ByTarget", "Combined",
    "LearningRateContext", "LowRankUpdate", "MatrixMethod", "MatrixShape", "Method", "Patterns", "Routing", "Sample", "Switch",
    "Targets", "activate", "active", "adapters", "attach", "attach_uninitialized", "base_modules", "check_peft_config", "combine",
    "current_routing", "find_matrices", "left_frozen", "matches_target", "matrix_modules", "matrix_shape", "max_row_length",
    "replace_method", "require_free_name", "require_matrix_shape", "routed", "select_modules", "shortest_names", "switch_of",
    "targeted_experts", "to_peft_names", "trainable_dtype", "unwrap", "weight_matrix", "with_weight",
]  # fmt: skip
