"""One block's masks: from its statistics to new weights, and a refit of the kept ones."""

from dataclasses import dataclass

import torch

from structprune.config import ReconstructSettings
from structprune.masking.request import MaskRequest
from structprune.masking.scores.linears import Linears, Masked, Removal
from structprune.models.adapter import BlockView
from structprune.models.experts_structprune import role_of
from structprune.models.finite import all_finite
from structprune.models.maps import in_place_of
from structprune.refit.masked import choose_refit
from structprune.refit.products import InputProducts, LayerFit
from structprune.statistics.capture import EXPERT_INPUTS
from structprune.statistics.overflow import overflow
from structprune.workers import ALONE, Workers


@dataclass(frozen=True)
class Factored:
    """How SparseGPT's Gram matrix of one input was factored: the damping it took, and inputs that were always 0."""

    block: int
    input: str
    damping: float
    dead: int


def fill_unseen(block: BlockView, statistics: dict[str, torch.Tensor]) -> list[int]:
    """Give experts that saw no token of weight statistics with which their masks go by their weights alone, in place.

    Args:
        statistics: input -> norms (C,) or Gram matrix (C, C), or empty.
    Returns:
        The numbers of these experts.
    """
    unseen = []
    for number in range(block.mixture.experts if block.mixture and statistics else 0):
        names = [role_of(name, str(number)) for name in EXPERT_INPUTS]
        if not statistics[names[0]].any():
            unseen.append(number)
            for name in names:
                empty = statistics[name]  # (C,) or (C, C)
                statistics[name] = torch.ones_like(empty) if empty.dim() == 1 else torch.eye(len(empty)).to(empty)
    return unseen


def mask_readers(
    block: BlockView, name: str, request: MaskRequest, removal: Removal, statistics: dict, device: torch.device
) -> tuple[dict[str, Masked], list[Factored]]:
    """New weights and masks, by role, of a block's linears that read one input; the block is not changed.

    Args:
        name: of the input, a key of `BlockView.readers`.
        statistics: input -> norms (C,) or Gram matrix (C, C), as the score needs; this input's is removed from it, so
            that a Gram matrix is freed as soon as it is used.
        device: where to compute.
    Raises:
        UserError: activations that are not finite, or numbers too large for the score.
    """
    roles = block.readers[name]
    weights = [block[role].weight.detach().to(device).float() for role in roles]  # (O, C) each
    where = f"block {block.index}, input of {' and '.join(roles)}"
    if name in statistics and not all_finite(statistics[name]):
        raise overflow(where, "activations", block[roles[0]].weight.dtype)
    linears = Linears(weights, removal, statistics.pop(name, None))
    try:
        outcome = request.score.mask(linears, request.settings)
    except (FloatingPointError, torch.linalg.LinAlgError) as error:
        raise overflow(where, f"{request.settings.score} scores", torch.float32) from error
    damping = outcome.damping
    factored = [] if damping is None else [Factored(block.index, name, damping, outcome.dead)]
    return dict(zip(roles, outcome.masked)), factored


def refit_linears(
    block: BlockView,
    masked: dict[str, Masked],
    products: tuple[InputProducts, InputProducts],
    settings: ReconstructSettings,
    workers: Workers = ALONE,
) -> tuple[dict[str, Masked], list[LayerFit]]:
    """Refit the masked weights of linears that read one input, at the damping that held-out rows choose.

    Args:
        block: still dense; its linears give the target outputs.
        products: over the rows of the refit and over held-out rows.
        workers: who share the rows of a weight.
    """
    refitted, fits = {}, []
    for role, (weight, keep) in masked.items():  # (O, C) each
        fit, check = (each.of(role, block[role].weight) for each in products)
        choice = choose_refit(weight.double(), keep, fit, check, settings.damping, workers)
        refitted[role] = (choice[0].float(), keep)
        fits.append(LayerFit.of(block.index, role, weight.double(), check, choice))
    return refitted, fits


@torch.inference_mode(False)  # so that the new weights can be trained whoever calls
def install(block: BlockView, masked: dict[str, Masked]) -> None:
    """Replace a block's weights, in the dtype and on the device of the old ones; removed weights are exactly 0."""
    for role, (weight, keep) in masked.items():
        old = block[role].weight
        value = in_place_of(old, torch.where(keep, weight, 0.0))  # (O, C)
        block[role].weight = torch.nn.Parameter(value, requires_grad=old.requires_grad)
