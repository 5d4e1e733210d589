"""A resolved structured run."""

from dataclasses import dataclass

from structprune.config import StructuredSettings
from structprune.statistics.request import Request
from structprune.statistics.scan import Limits
from structprune.structured.scores.table import Score
from structprune.structured.sizes import BlockSize


@dataclass(frozen=True, kw_only=True)
class StructuredRequest(Request):
    """A structured run."""

    score: Score  # its row in the table
    sizes: list[BlockSize]  # of the blocks that may lose units
    reads_head_dim: bool = False  # the family's own code takes the head size from the config

    @property
    def settings(self) -> StructuredSettings:
        return self.config.structured

    @property
    def limits(self) -> Limits:
        """`calibration.batch` counts windows here, each with all its noise levels."""
        return Limits(self.calibration.batch, self.resources.budget, self.resources.overlap)
