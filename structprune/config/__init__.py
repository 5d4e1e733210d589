"""The validated model of a run's choices, and which of them contradict each other."""
# ruff: noqa: F401 (names for others to import)

from structprune.config.names import ARMS, Arm, register_name
from structprune.config.refit import ReconstructSettings
from structprune.config.sections import Section, Sections
from structprune.config.settings import (
    DEFAULT_ARM,
    CalibrationSettings,
    Config,
    ExportSettings,
    MaskingSettings,
    MemorySettings,
    ModelSettings,
    SearchSettings,
    SinkPolicy,
    SinkSettings,
    StructuredSettings,
)
