"""The shapes that a structured run is expected to leave, before any score: what goes is spread evenly over blocks."""

import torch

from structprune.config import StructuredSettings
from structprune.models.adapter import Adapter, set_widths
from structprune.models.modeling_structprune import DiffusionLM
from structprune.structured.allocate import Counts, chosen_heads, equal_heads, fixed_counts
from structprune.structured.choose import candidates
from structprune.structured.request import StructuredRequest
from structprune.structured.sizes import BlockSize, widths_after


def expected_model(model: DiffusionLM, request: StructuredRequest) -> DiffusionLM:
    """A meta model of about the shapes that a run leaves of `model`: what goes is spread evenly over the blocks."""
    choices, shown = even_choices(request)
    return pruned_ghost(model, Adapter(model), choices[shown], request.settings.gqa)


def even_choices(request: StructuredRequest) -> tuple[dict[int, Counts], int]:
    """Attention steps per block -> counts, spread evenly, and the number of steps to show."""
    settings, sizes = request.settings, request.sizes
    even = settings.model_copy(update={"allocation": "uniform"}) if settings.allocation == "global" else settings
    choices = {heads: counts | fixed_counts(sizes) for heads, counts in candidates(sizes, even).items()}
    return choices, _shown(settings, sizes, choices)


def _shown(settings: StructuredSettings, sizes: list[BlockSize], choices: dict[int, Counts]) -> int:
    """Attention steps per block to show: the configured number, its share per block under `global`, or equal shares."""
    split = settings.split
    if not isinstance(split, int):
        return equal_heads(sizes, settings.ratio, choices)
    if settings.allocation != "global":
        return chosen_heads(split, choices)
    return min(choices, key=lambda steps: abs(steps * len(sizes) - split))


def pruned_ghost(model: DiffusionLM, adapter: Adapter, counts: Counts, form: str) -> DiffusionLM:
    """A model on the meta device with the widths that `counts` leave."""
    family = adapter.family
    widths = [widths_after(block.widths, counts, block.index, form) for block in adapter.blocks]
    with torch.device("meta"):
        return family.model_class(family.config_class(**set_widths(model.config.to_dict(), family, widths)))
