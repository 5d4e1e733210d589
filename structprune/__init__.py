"""structprune: prune masked diffusion language models into smaller dense ones."""

from importlib import import_module

__version__ = "0.1.0"

_LAZY = {
    "load_model": "structprune.models.loading",
    "load_tokenizer": "structprune.models.tokenizer",
    "Config": "structprune.config",
    "load_calibration": "structprune.calibration.build",
    "prune": "structprune.runs.prune",
    "recover": "structprune.runs.recover",
    "generate": "structprune.runs.generate",
    "prune_and_recover": "structprune.runs.gradual",
    "Schedule": "structprune.runs.schedule",
    "apply_plan": "structprune.structured.surgery",
    "Plan": "structprune.structured.plan",
    "save_pruned": "structprune.checkpoint.save",
    "UserError": "structprune.errors",
}
__all__ = [*_LAZY, "__version__"]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'structprune' has no attribute {name!r}")
