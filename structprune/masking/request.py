"""A resolved run for masks."""

from dataclasses import dataclass

from structprune.config import MaskingSettings
from structprune.masking.scores.table import MaskScore
from structprune.statistics.request import Request
from structprune.statistics.scan import Limits


@dataclass(frozen=True, kw_only=True)
class MaskRequest(Request):
    """An unstructured or N:M run."""

    name: str  # of the score, without `sink-`
    score: MaskScore  # its row in the table
    ratio: float  # removed share of every projection, N / M for N:M
    nm: tuple[int, int] | None  # (N, M)

    @property
    def settings(self) -> MaskingSettings:
        return self.config.masking

    @property
    def walks(self) -> bool:
        """Whether the score's statistics come from a walk: Gram matrices always, norms unless of the dense model."""
        return self.score.needs == "grams" or (self.score.needs == "norms" and self.settings.order == "sequential")

    @property
    def measures_dense(self) -> bool:
        """Whether norms of the dense model are measured in one shot, for the score or for `owl`."""
        return (self.arm is not None and not self.walks) or self.settings.allocation == "owl"

    @property
    def limits(self) -> Limits:
        """`calibration.batch` counts sequences here, noisy or clean."""
        return Limits(batch=self.calibration.batch, budget=self.resources.budget, overlap=self.resources.overlap)
