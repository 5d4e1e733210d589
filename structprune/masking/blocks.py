"""One block's masks: from its statistics to new weights, and a refit of what stays."""

from dataclasses import dataclass

import torch

from structprune.config import MaskingSettings, ReconstructSettings
from structprune.errors import UserError
from structprune.masking.patterns import group_mask, pooled_mask, row_mask
from structprune.masking.scores.magnitude import magnitude_scores
from structprune.masking.scores.ria import ria_scores
from structprune.masking.scores.sparsegpt import factorise, sparsegpt
from structprune.masking.scores.wanda import wanda_scores
from structprune.models.adapter import READERS, BlockView
from structprune.refit.masked import choose_refit
from structprune.refit.products import InputProducts
from structprune.refit.reconstruct import LayerFit, output_error

Masked = tuple[torch.Tensor, torch.Tensor]  # weight (O, C) fp32, and mask (O, C) bool, true where a weight stays


@dataclass(frozen=True)
class Request:
    """What goes in one block: a share of every matrix, or N of every M inputs of an output."""

    ratio: float
    nm: tuple[int, int] | None = None


@dataclass(frozen=True)
class Factored:
    """How SparseGPT's Gram matrix of one input was factored: damping, more than asked for where needed; dead inputs."""

    block: int
    input: str
    damping: float
    dead: int


def scored_mask(score: str, weight: torch.Tensor, norm: torch.Tensor | None, request: Request) -> torch.Tensor:
    """Mask (O, C) of a weight by a score that looks at it alone, or at the norm (C,) of its input."""
    if score == "magnitude":
        scores, unstructured = magnitude_scores(weight), pooled_mask
    else:
        scores = {"wanda": wanda_scores, "ria": ria_scores}[score](weight, norm)
        unstructured = row_mask
    return group_mask(scores, *request.nm) if request.nm else unstructured(scores, request.ratio)


def mask_block(
    block: BlockView,
    score: str,
    settings: MaskingSettings,
    request: Request,
    statistics: dict,
    device: torch.device,
    inputs: tuple[str, ...] = tuple(READERS),
) -> tuple[dict[str, Masked], list[Factored]]:
    """New weights and masks by role of a block's linears that read `inputs`, none changed yet.

    Args:
        score: of `masking.table.SCORES`.
        statistics: input -> norms (C,) or Gram (C, C), of what the score needs; emptied, so that a Gram's memory goes
            as soon as it is used.
        device: where to compute.
    Raises:
        UserError: activations that are not finite.
    """
    found: dict[str, Masked] = {}
    factored = []
    for name, roles in ((name, READERS[name]) for name in inputs):
        weights = [block[role].weight.detach().to(device).float() for role in roles]  # (O, C) each
        if name in statistics and not torch.isfinite(statistics[name]).all():
            raise UserError(f"block {block.index}: its activations overflow in this dtype: use model.dtype = float32")
        if score != "sparsegpt":
            norm = statistics.pop(name, None)  # (C,)
            masks = [scored_mask(score, weight, norm, request) for weight in weights]
            found |= {role: (weight * mask, mask) for role, weight, mask in zip(roles, weights, masks)}
            continue
        if request.nm is None and request.ratio == 0:
            found |= {role: (weight, torch.ones_like(weight, dtype=torch.bool)) for role, weight in zip(roles, weights)}
            continue
        factor = factorise(statistics.pop(name), settings.damping)  # nobody else holds the Gram, so its memory goes
        made = sparsegpt(weights, factor, request.ratio, request.nm, settings.column_block)
        found |= dict(zip(roles, made))
        factored.append(Factored(block.index, name, factor.damping, int(factor.dead.sum())))
    return found, factored


def refit_linears(
    block: BlockView,
    masked: dict[str, Masked],
    products: tuple[InputProducts, InputProducts],
    settings: ReconstructSettings,
) -> tuple[dict[str, Masked], list[LayerFit]]:
    """The masked weights of linears with one input refitted under their masks, at the damping held-out rows chose.

    Args:
        block: dense still; its linears make the outputs aimed at.
        masked: of `mask_block`.
        products: over the rows of the refit and over held-out ones.
    """
    found, fits = {}, []
    for role, (weight, kept) in masked.items():  # (O, C) each
        fit, check = (each.of(role, block[role].weight) for each in products)
        moved, damping, gain = choose_refit(weight.double(), kept, fit, check, settings.damping)
        plain = output_error(weight.double(), check.wanted, check.gram) + check.power
        found[role] = (moved.float(), kept)
        fits.append(LayerFit(block.index, role, damping, (plain + gain) / plain if plain > 0 else 1.0))
    return found, fits


@torch.inference_mode(False)  # so that the new weights can be trained whoever calls
def install(block: BlockView, masked: dict[str, Masked]) -> None:
    """Put new weights in place, in the dtype and on the device of the old ones; what is removed is exactly 0."""
    for role, (weight, kept) in masked.items():
        old = block[role].weight
        value = torch.where(kept, weight, 0.0).to(old.device, old.dtype)  # (O, C)
        block[role].weight = torch.nn.Parameter(value.clone(), requires_grad=old.requires_grad)
