"""Which rows a run for masks looks at, and for what."""

import torch

from structprune.calibration.batches import Calibration
from structprune.config import Config
from structprune.masking.scores.table import SCORES
from structprune.masking.walk import Use, Wanted
from structprune.models.adapter import Adapter
from structprune.statistics.rows import Observe, Rows, Track, arm_rows, measure_mass, needs_sinks, unobserved


def reads_text(config: Config, arm: str | None) -> bool:
    """Whether anything of a run looks at calibration text: score, allocation, refit or held-out check."""
    owl = config.masking.allocation == "owl"
    return arm is not None or owl or config.reconstruct.enabled or config.calibration.held_out > 0


def walked(config: Config, base: str) -> bool:
    """Whether the score's statistics come from a walk: Grams always do, norms unless they are of the dense model."""
    needs = SCORES[base].needs
    return needs == "grams" or (needs == "norms" and config.masking.order == "sequential")


def wanted_rows(
    adapter: Adapter,
    calibration: Calibration | None,
    config: Config,
    base: str,
    arm: str | None,
    track: Track,
    observe: Observe = unobserved,
) -> Wanted | None:
    """What a run's walk over the blocks measures; None where nothing needs one.

    Rows that score and refit both look at are walked once. Sink weights are measured by a pass of their own.
    """
    masking, refit = config.masking, config.reconstruct
    scored = arm if walked(config, base) else None
    fitted = refit.arm if refit.enabled else None
    if scored is None and fitted is None:
        return None
    mass = None
    if any(needs_sinks(each, config.sink) for each in (scored, fitted)):
        mass = measure_mass(adapter, calibration.fit, config.calibration.batch, track, observe)  # (N, S, T)
    rows = {
        each: arm_rows(calibration.fit, each, config.sink, mass, adapter.mask_id) for each in {scored, fitted} - {None}
    }
    ids: list[torch.Tensor] = []
    score = fit = check = None
    if scored is not None:
        score = _use(ids, rows[scored])
    if fitted is not None:
        same = scored is not None and scored.split("+")[0] == fitted.split("+")[0]
        fit = Use(score.rows, rows[fitted].weight) if same else _use(ids, rows[fitted])
        held_out = arm_rows(calibration.check, "masked", config.sink, None, adapter.mask_id)
        check = _use(ids, held_out)
        check = Use(check.rows, held_out.masked.float())
    return Wanted(
        ids=torch.cat(ids),
        score=score,
        norms=masking.norms if SCORES[base].needs == "norms" and scored else None,
        score_relative=masking.relative,
        on_dense=scored is not None and masking.order == "one-shot",
        fit=fit,
        check=check,
        fit_relative=refit.relative,
        target_dense=refit.target == "dense" and fitted is not None,
    )


def _use(ids: list[torch.Tensor], rows: Rows) -> Use:
    """Append the rows' sequences to `ids` and say where they are."""
    start = sum(map(len, ids))
    ids.append(rows.ids)
    return Use(slice(start, start + len(rows.ids)), rows.weight)
