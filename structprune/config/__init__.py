"""The validated model of a run's choices, and which of them contradict each other."""

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
    SinkPolicy,
    SinkSettings,
    StructuredSettings,
)

__all__ = [
    "ARMS",
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
    "register_name",
]
