"""A structured run or a run for masks, by the configuration's method."""

from structprune.calibration.batches import Calibration
from structprune.config import Config
from structprune.errors import UserError
from structprune.models.modeling_structprune import DiffusionLM
from structprune.progress import Track, untracked
from structprune.runs.budget import within_memory
from structprune.runs.mask import Masked, mask
from structprune.runs.pruned import Pruned
from structprune.runs.pruner import Pruner
from structprune.runs.resolve import check_given_plan, resolve_structured
from structprune.structured.plan import Plan


def prune(
    model: DiffusionLM,
    config: Config | None = None,
    calibration: Calibration | None = None,
    plan: Plan | None = None,
    track: Track = untracked,
) -> Pruned | Masked:
    """Prune a model once: score its units, plan, cut, refit, and check the result on held-out windows.

    Args:
        config: with method unstructured or nm, `structprune.runs.mask.mask` does the run.
        plan: apply this one instead of scoring; it is still refitted and checked.
        calibration, track: as in `Pruner`.
    Returns:
        The result, with `model`, `report` and `save`.
    Raises:
        UserError: a request that cannot be met, in one line.
    """
    config = config or Config()
    if config.method != "structured":
        if plan is not None:
            raise UserError(f"a plan removes heads and channels: leave it out, or method = {config.method}")
        return mask(model, config, calibration, track)
    request = within_memory(resolve_structured(config, model, calibration=calibration), model, plan=plan)
    if plan is not None:
        check_given_plan(request, model, plan, model.source.values)
    return Pruner(model, request, calibration, track).prune(plan=plan)
