"""structprune: prune masked diffusion language models into smaller dense ones.

    load_model          a checkpoint directory or Hub id -> the model
    map_model           the same, whose weights stay in their files
    load_tokenizer      its tokenizer
    Config              every choice of a pruning run, by section
    load_calibration    text -> calibration windows and their noise
    prune               a model -> the pruned model and its report
    recover             train a pruned checkpoint back against the dense one
    prune_and_recover   both in one run, also step by step through several ratios
    Schedule            what such a run does
    generate            text from a checkpoint or model
    Plan, apply_plan    what each block keeps, and a model cut to it
    save_pruned         write a pruned model as a checkpoint that loads anywhere
    UserError           what the user can mend, in one line
    __version__         of structprune

Names load on first use, so that the import is quick.
"""

from importlib import import_module

__version__ = "0.1.0"

_LAZY = {
    "load_model": "structprune.models.loading",
    "map_model": "structprune.models.loading",
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


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'structprune' has no attribute {name!r}")
