"""Trainable tokens: the embeddings of a few tokens are trained, new tokens' among them, and nothing else.

A token's row of the head is trained with its embedding where the two are tied, as one; elsewhere new tokens have a row of
each, since what has none can't be said. PEFT calls this TRAINABLE_TOKENS, and has no paper for it either.
"""

from typing import Annotated, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, SerializeAsAny, field_serializer, model_validator
from torch import Tensor, nn

from trimtab.config import as_tuple
from trimtab.errors import RecipeError
from trimtab.methods._base import AdapterLayer, Circumstances, Method, Sample, modules
