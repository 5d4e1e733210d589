"""The validated model of a run's choices, and which of them contradict each other."""

from structprune.config.sections import Section, Sections
from structprune.config.settings import (
    DEFAULT_ARM,
    Arm,
    CalibrationSettings,
    Config,
    ExportSettings,
    MaskingSettings,
    MemorySettings,
    ModelSettings,
    ReconstructSettings,
    SinkPolicy,
    SinkSettings,
    StructuredSettings,
    known_keys,
)

__all__ = [
    "DEFAULT_ARM",
    "Arm",
    "CalibrationSettings",
    "Config",
    "ExportSettings",
    "MaskingSettings",
    "MemorySettings",
    "ModelSettings",
    "ReconstructSettings",
    "Section",
    "Sections",
    "SinkPolicy",
    "SinkSettings",
    "StructuredSettings",
    "known_keys",
]
