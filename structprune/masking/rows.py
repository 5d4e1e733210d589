"""Which rows a run for masks reads, and for what."""

from dataclasses import replace

import torch

from structprune.masking.request import MaskRequest
from structprune.masking.walk import Use, WalkPlan
from structprune.statistics.rows import Rows, arm_rows, both_uses, measure_mass, needs_sinks, predicted_weights
from structprune.statistics.scan import Scan


def plan_walk(scan: Scan, request: MaskRequest) -> WalkPlan | None:
    """What a run's walk over the blocks measures; None where nothing needs a walk.

    Rows that score and refit both read are walked once. Sink weights are measured by a pass of their own.

    Args:
        scan: of the dense model, with all windows, held-out ones included.
    """
    masking, refit = request.settings, request.reconstruct
    scored = request.arm if request.walks else None
    fitted = refit.arm if refit.enabled else None
    arms = [arm for arm in (scored, fitted) if arm is not None]
    if not arms:
        return None
    fit_windows, mask_id, mass = scan.calibration.fit, scan.adapter.mask_id, None
    if any(needs_sinks(arm, request.sink) for arm in arms):
        mass = measure_mass(replace(scan, calibration=fit_windows))  # (N, S, T)
    rows = {arm: arm_rows(fit_windows, arm, request.sink, mass, mask_id, scan.layout) for arm in arms}
    rows = {arm: both_uses(each, scan) for arm, each in rows.items()}
    ids: list[torch.Tensor] = []
    score = _use(ids, rows[scored]) if scored is not None else None
    fit = check = None
    if fitted is not None:
        same = score is not None and str(scored).split("+")[0] == fitted.split("+")[0]
        fit = Use(score.rows, rows[fitted].weight) if score is not None and same else _use(ids, rows[fitted])
        held_out = arm_rows(scan.calibration.check, "masked", request.sink, None, mask_id, scan.layout)
        check = Use(_use(ids, held_out).rows, predicted_weights(held_out.masked, scan))
    return WalkPlan(
        ids=torch.cat(ids),
        score=score,
        norms=masking.norms if request.score.needs == "norms" and scored else None,
        score_relative=masking.relative,
        on_dense=scored is not None and masking.order == "one-shot",
        fit=fit,
        check=check,
        fit_relative=refit.relative,
        target_dense=refit.target == "dense" and fitted is not None,
    )


def _use(ids: list[torch.Tensor], rows: Rows) -> Use:
    """Append the rows' sequences to `ids`, and where they are."""
    start = sum(map(len, ids))
    ids.append(rows.ids)
    return Use(slice(start, start + len(rows.ids)), rows.weight)
