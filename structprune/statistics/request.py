"""What every resolved pruning request holds: everything downstream reads a request, and no longer the configuration."""

from dataclasses import dataclass

from structprune.config import CalibrationSettings, Config, ReconstructSettings, SinkSettings
from structprune.models.resources import Resources


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run, resolved for one model's shapes and free of contradictions."""

    config: Config
    arm: str | None  # the calibration arm the score runs on; None for a score of weights alone
    resources: Resources  # device, dtype and memory
    reads_text: bool = True  # by score, allocation, refit or held-out check
    saved: dict[str, int] | None = None  # of a saved calibration, its sizes in place of the configuration's

    @property
    def reconstruct(self) -> ReconstructSettings:
        return self.config.reconstruct

    @property
    def calibration(self) -> CalibrationSettings:
        settings = self.config.calibration
        return settings if self.saved is None else settings.model_copy(update=self.saved)

    @property
    def sink(self) -> SinkSettings:
        return self.config.sink
