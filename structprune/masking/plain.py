"""Masked weights before their refit, stored until the whole model has shown whether the refit is a gain."""

import torch

from structprune.masking.blocks import install
from structprune.masking.scores.linears import Masked
from structprune.models.adapter import Adapter
from structprune.models.maps import give_back
from structprune.models.placement import give_back_memory, stays_on_disk
from structprune.statistics.hidden import empty_on_host


class PlainWeights:
    """Weights of all projections in the model's dtype, on the host; beyond `budget` bytes in a temporary file."""

    def __init__(self, adapter: Adapter, budget: int):
        self._adapter, self._places, end = adapter, {}, 0
        for block in adapter.blocks:
            for role in block.names:
                start, end = end, end + block[role].weight.numel()
                self._places[block.index, role] = slice(start, end)
        self._flat = empty_on_host((end,), adapter.dtype, 0 if stays_on_disk(adapter.model) else budget)

    def put(self, index: int, masked: dict[str, Masked]) -> None:
        """Store a block's masked weights, role -> (O, C)."""
        for role, (weight, keep) in masked.items():
            stored = self._flat[self._places[index, role]]  # (O*C,)
            stored.copy_(torch.where(keep, weight, 0.0).flatten())
            give_back(stored)

    def weight(self, index: int, role: str) -> torch.Tensor:
        """What was stored of a projection, (O, C)."""
        return self._flat[self._places[index, role]].view(self._adapter.blocks[index][role].weight.shape)

    def swap(self) -> None:
        """Exchange the stored weights and the model's; calling it twice changes nothing."""
        for block in self._adapter.blocks:
            for role in block.names:
                stored = self._flat[self._places[block.index, role]]  # (O*C,)
                now = block[role].weight.detach()  # (O, C)
                weight = stored.view(now.shape).clone()  # (O, C)
                stored.copy_(now.flatten())
                install(block, {role: (weight, torch.ones_like(weight, dtype=torch.bool))})
            give_back_memory()
