"""The validated model of a run's choices, and which of them contradict each other."""
# ruff: noqa: F401 (names for others to import)

from structprune.config.names import register_name
from structprune.config.sections import Section, Sections
from structprune.config.settings import (
    ARMS,
    DEFAULT_ARM,
    Arm,
    CalibrationSettings,
    Config,
    ExportSettings,
    MaskingSettings,
    MemorySettings,
    ModelSettings,
    ReconstructSettings,
    SearchSettings,
    SinkPolicy,
    SinkSettings,
    StructuredSettings,
)
