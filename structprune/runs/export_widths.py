"""Whether the widths that a run will leave suit its export class, as far as shapes tell, and what would make them."""

from dataclasses import replace
from typing import Any

from structprune.checkpoint.export import obstacles
from structprune.config import StructuredSettings
from structprune.errors import UserError
from structprune.models.adapter import ExpertWidths, Widths, block_widths, set_widths
from structprune.models.families import family_of
from structprune.runs.expected import even_choices
from structprune.structured.allocate import Counts
from structprune.structured.request import StructuredRequest
from structprune.structured.sizes import BlockSize, widths_after

TRIES = 8  # one more shared channel moves the others' width by far less than one, so that few settle both


def check_export_widths(request: StructuredRequest) -> None:
    """Raise UserError where the export class rules out a width that the run may choose, and name what makes it suit.

    For runs that `check_export_request` lets pass: all blocks are cut alike. Where the split between heads and channels
    is decided by scores, every width that it may choose has to suit.
    """
    config, settings = request.config, request.settings
    if config.export.compat == "free" or settings.ratio == 0 or config.search.enabled:  # a search decides widths
        return
    choices, shown = even_choices(request)
    decided = isinstance(settings.split, int) or settings.split == "equal"
    reasons = {steps: _obstacle(request, choices[steps]) for steps in ([shown] if decided else choices)}
    reason = reasons[shown] or next(filter(None, reasons.values()), None)
    if reason is None:
        return
    if remedy := _remedy(request if decided else _with(request, split="equal"), settings):
        reason += f" ({remedy})"
    raise UserError(f"export.compat = {config.export.compat} is not possible: {reason}; or export as free")


def _obstacle(request: StructuredRequest, counts: Counts) -> str | None:
    """Why the family's own keys cannot say the widths that `counts` leave."""
    dense, form = request.dense, request.settings.gqa
    family = family_of(dense)
    widths = [widths_after(each, counts, index, form) for index, each in enumerate(_dense_widths(dense))]
    return obstacles(family.config_class(**set_widths(dense.to_dict(), family, widths)), None).get("uniform")


def _dense_widths(dense: Any) -> list[Widths]:
    family = family_of(dense)
    return [block_widths(dense, family, index) for index in range(getattr(dense, family.keys["depth"]))]


def _remedy(request: StructuredRequest, before: StructuredSettings) -> str | None:
    """The settings, other than `before`, by which shared experts stay as many times as wide as others.

    The others' width depends on the number of shared channels that go, since these are part of the ratio. None where
    there are no shared experts.
    """
    dense = {index: each for index, each in enumerate(_dense_widths(request.dense))}
    mixtures = {index: each for index, each in dense.items() if isinstance(each, ExpertWidths) and each.shared}
    if not mixtures:
        return None
    index, widths = next(iter(mixtures.items()))
    for _ in range(TRIES):
        try:
            choices, shown = even_choices(request)
        except UserError:  # so many shared channels are more than the ratio
            break
        if _obstacle(request, choices[shown]) is None:
            values = {"split": request.settings.split, "shared": request.settings.shared}
            changes = [f"structured.{key} to {value}" for key, value in values.items() if value != getattr(before, key)]
            return f"set {' and '.join(changes)}"
        channels = widths_after(widths, choices[shown], index, request.settings.gqa).channels
        times = max(1, widths.shared // widths.channels)
        shared = max(0, widths.shared - times * channels)
        request = _with(request, shared=shared)
        sizes = [
            _with_shared(size, mixtures[size.index], shared) if size.index in mixtures else size
            for size in request.sizes
        ]
        request = replace(request, sizes=sizes)
    return "no structured.shared mends that at this ratio: try one a little higher or lower"


def _with(request: StructuredRequest, **changes) -> StructuredRequest:
    """The request with other settings of `structured`."""
    settings = request.settings.model_copy(update=changes)
    return replace(request, config=request.config.model_copy(update={"structured": settings}))


def _with_shared(size: BlockSize, widths: ExpertWidths, shared: int) -> BlockSize:
    """The sizes of a mixture where so many shared channels go: each is as large as a channel of one other expert."""
    channel = size.step["channels"] // (widths.experts - size.experts)
    return replace(size, shared=shared, gone=size.gone + (shared - size.shared) * channel)
