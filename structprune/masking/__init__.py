"""Masks: which weights are kept, and what keeps the others zero."""

from structprune.masking.finetune import keep_zeros, mask_adapters, merge_adapters
from structprune.masking.masks import Masks

__all__ = ["Masks", "keep_zeros", "mask_adapters", "merge_adapters"]
