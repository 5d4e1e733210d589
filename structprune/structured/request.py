"""A resolved structured run."""

from dataclasses import dataclass
from typing import Any

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
    dense: Any  # the configuration of the model that is cut

    @property
    def reads_head_dim(self) -> bool:
        """Whether the family's own code takes the head size from the config."""
        return getattr(self.dense, "reads_head_dim", False)

    @property
    def settings(self) -> StructuredSettings:
        return self.config.structured

    @property
    def limits(self) -> Limits:
        """`calibration.batch` counts windows here, each with all its noise levels."""
        return Limits(self.calibration.batch, self.resources.budget, self.resources.overlap)
