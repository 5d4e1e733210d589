"""Predicted memory of runs whose weights stay on disk (`memory.offload = disk`): layers are copied as they compute."""

from dataclasses import dataclass

import torch

from structprune.models.adapter import Adapter
from structprune.models.placement import COPIED_AT_ONCE
from structprune.models.resources import Resources

READ = 16  # bytes per number of a weight that is scored in fp64, or goes to a file: as it came, narrowed, and compared


@dataclass(frozen=True)
class DiskWeights:
    """Weights on disk.

    Attributes:
        adapter: of the dense model. dtype: to compute in. stored: of the weights in their files.
    """

    adapter: Adapter
    dtype: torch.dtype
    stored: torch.dtype

    @property
    def widest(self) -> int:
        """Numbers of the largest weight of a block."""
        return max(weight.numel() for block in self.adapter.blocks for weight in block.module.parameters())

    @property
    def parts(self) -> dict[str, int]:
        """Bytes in their files, and of copies of layers: dense and changed model compute by turns."""
        head = self.adapter.vocabulary * self.adapter.hidden_size
        return {
            "weights on disk": self.adapter.model.num_parameters() * self.stored.itemsize,
            "layers under way": 2 * self.widest * self.dtype.itemsize + self._pages(self.widest),
            "head under way": head * self.dtype.itemsize + self._pages(head),
        }

    def _pages(self, numbers: int) -> int:
        """Bytes of a weight's file that are resident beside its copy."""
        return min(numbers, COPIED_AT_ONCE) * self.stored.itemsize

    def peaks(self, resources: Resources, blocks: int, check: int, aside: int) -> dict[str, int]:
        """Bytes at the peak, of the host and of an accelerator.

        Args:
            blocks, check: beside layers, while blocks are worked on and while held-out loss is computed.
            aside: on the host at any time.
        """
        parts, read = self.parts, READ * self.widest
        if resources.overlap:  # the next layer is copied while one computes
            parts = {name: 2 * size for name, size in parts.items()}
        working = max(parts["layers under way"] + max(blocks, read), parts["head under way"] + check)
        if not resources.accelerator:
            return {"peak host": aside + working}
        head = self.adapter.vocabulary * self.adapter.hidden_size * self.stored.itemsize  # pages while it is copied
        return {"peak host": aside + max(head, read), "peak device": working}
