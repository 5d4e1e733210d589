"""What the parts of a structured run are named in its journal: by all that decides them, beside what the journal's own
identity fixes (checkpoint, calibration, sink weights, machine)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from structprune.config import ReconstructSettings
from structprune.models.journal import Journal
from structprune.runs.stages import digest
from structprune.structured.plan import Plan
from structprune.structured.request import StructuredRequest

IRRELEVANT: Any = {"memory": True, "calibration": {"batch"}, "export": {"dtype", "max_shard_size"}}  # of levels
SCORING = ("score", "gqa", "damping", "rounds", "relative")  # of `structured`: what decides a score's paths


def scores_part(journal: Journal, request: StructuredRequest) -> Journal:
    """Of the removal paths, which other ratios, allocations and export classes share."""
    settings = request.settings.model_dump(mode="json", include=set(SCORING))
    return journal.within("scores", digest(settings, str(request.arm)))


def refit_part(journal: Journal, plan: Plan, settings: ReconstructSettings) -> Journal:
    """Of the refit of a plan."""
    return journal.within("refits", plan_digest(plan, settings))


def levels_part(journal: Journal, request: StructuredRequest, ratios: Sequence[float | None]) -> Path | None:
    """The directory of a search's levels, and of a latency table; None where nothing is kept."""
    config = request.config.model_dump(mode="json", exclude=IRRELEVANT)
    return journal.within("levels", digest(config, str(ratios))).directory


def drops_part(journal: Journal, request: StructuredRequest, batch: int) -> Journal:
    """Of the losses of a search for blocks to drop.

    Args:
        batch: sequences in a pass, which decide the last bits.
    """
    return journal.within("drops", digest(request.config.model_dump(mode="json", exclude=IRRELEVANT), str(batch)))


def plan_digest(plan: Plan, settings: ReconstructSettings, windows: int | None = None) -> str:
    """Of what a refit makes of a plan.

    Args:
        windows: that a candidate is refitted on; None: all.
    """
    return digest(plan.to_json(), settings.model_dump(mode="json"), str(windows))
