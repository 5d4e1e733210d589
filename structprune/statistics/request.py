"""What every resolved pruning request holds: everything downstream reads a request, and no longer the configuration."""

from dataclasses import dataclass

from structprune.config import CalibrationSettings, Config, ReconstructSettings, SinkSettings
from structprune.models.resources import Resources


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run, resolved for one model's shapes and free of contradictions.

    Attributes:
        config: the configuration, for the report.
        arm: the calibration arm the score runs on; None for a score of weights alone.
        resources: device, dtype and memory.
        reads_text: whether score, allocation, refit or held-out check reads calibration text.
    """

    config: Config
    arm: str | None
    resources: Resources
    reads_text: bool = True

    @property
    def reconstruct(self) -> ReconstructSettings:
        return self.config.reconstruct

    @property
    def calibration(self) -> CalibrationSettings:
        return self.config.calibration

    @property
    def sink(self) -> SinkSettings:
        return self.config.sink
