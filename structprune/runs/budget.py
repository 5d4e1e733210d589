"""How a run stays within the memory that it is given: what is held, what is streamed, and what goes to files."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

import torch

from structprune.bench.mask_memory import predicted_mask_peak
from structprune.bench.memory import predicted_peak
from structprune.errors import UserError
from structprune.masking.request import MaskRequest
from structprune.models.adapter import Adapter
from structprune.models.loading import source_of
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.resources import Resources
from structprune.runs.expected import expected_model
from structprune.runs.resolve import backward_user
from structprune.structured.plan import Plan
from structprune.structured.request import StructuredRequest
from structprune.workers import processes_here

AnyRequest = TypeVar("AnyRequest", StructuredRequest, MaskRequest)
BUDGETS_GB = (4.0, 2.0, 1.0, 0.5, 0.25, 0.1)  # of hidden states and held activations, where the user names none
# free beside a predicted peak from disk: a share of the weights in files, whose pages are resident for a while, and
# some bytes; at most 3.6% of 16 GB and 30 MB of 0.2 GB were measured (scripts/results/offload.json)
SPARE_SHARE, SPARE_BYTES = 0.04, 30_000_000
PLACES = {False: "all weights where it computes", True: "weights in host memory", "disk": "weights on disk"}


def within_memory(
    request: AnyRequest, model: DiffusionLM, stored: torch.dtype | None = None, plan: Plan | None = None
) -> AnyRequest:
    """The request with the fastest resources whose predicted peaks are within `memory.host_gb` and `memory.device_gb`.

    Weights are held where they fit, else streamed from host memory to an accelerator, else read from disk, where
    a little more than predicted must fit; before that, hidden states and held activations go to files or are computed
    again. Keys that the user has set stay as they are.

    Args:
        model: of the checkpoint's shapes. stored: dtype of its weights; None: it is loaded, and stays where it is.
        plan: what a structured run applies; it counts as if nothing were cut.
    Raises:
        UserError: no way of running takes so little, in one line with the least that one takes.
    """
    memory = request.config.memory
    limits = {f"peak {name}": gb for name, gb in (("host", memory.host_gb), ("device", memory.device_gb)) if gb}
    if not limits:
        return request
    ways, processes = [], processes_here()
    dtype = source_of(model).dtype if stored is None else stored
    for resources in _ways(request, stored is None):
        changed = replace(request, resources=resources)
        sizes = predicted_memory(changed, model, dtype, plan)
        spare = SPARE_BYTES + round(SPARE_SHARE * sizes["weights on disk"]) if resources.on_disk else 0
        sizes["peak host"] = processes * (sizes["peak host"] + spare)
        peaks = {name: sizes[name] / 1e9 for name in limits}
        if all(peaks[name] <= limits[name] for name in peaks):
            return changed
        ways.append((max(peaks[name] / limits[name] for name in peaks), resources, peaks))
    _, resources, peaks = min(ways, key=lambda way: way[0])
    name = max(peaks, key=lambda name: peaks[name] / limits[name])
    least = " and ".join(f"{size:.2f} GB ({name.removeprefix('peak ')})" for name, size in peaks.items())
    place = f" in {processes} processes" * (processes > 1) + f", with {PLACES[resources.offload]}"
    raise UserError(
        f"memory.{name.removeprefix('peak ')}_gb = {limits[name]:g} is too little: the least that this run takes is"
        f" {least}{place}: raise it, lower calibration.batch, or choose a smaller model"
    )


def _ways(request: StructuredRequest | MaskRequest, loaded: bool) -> Iterator[Resources]:
    """Resources to run with, the fastest first."""
    resources, memory = request.resources, request.config.memory
    budgets = [resources.budget]
    if "budget_gb" not in memory.model_fields_set:
        budgets += [int(gb * 1e9) for gb in BUDGETS_GB]
    for offload in [resources.offload] if loaded or "offload" in memory.model_fields_set else _places(request):
        for budget in budgets:
            yield replace(resources, offload=offload, budget=budget)


def _places(request: StructuredRequest | MaskRequest) -> list:
    """Where weights may be, as `memory.offload` has it."""
    if isinstance(request, StructuredRequest) and backward_user(request.config):
        return [False]
    search = request.config.search
    times = search.enabled and search.budget == "latency"
    streams = [True] if request.resources.accelerator and request.reads_text and not times else []
    reads = [] if search.enabled or request.config.model.allow_pickle else ["disk"]
    return [False, *streams, *reads]


def predicted_memory(
    request: StructuredRequest | MaskRequest, model: DiffusionLM, stored: torch.dtype, plan: Plan | None = None
) -> dict[str, int]:
    """Bytes by part, the peaks and "temporary files" among them.

    Args:
        model: of the checkpoint's shapes. stored: dtype of its weights.
        plan: what a structured run applies; it counts as if nothing were cut.
    """
    if isinstance(request, MaskRequest):
        return predicted_mask_peak(Adapter(model), request, stored)
    small = expected_model(model, request) if plan is None else model
    return predicted_peak(Adapter(model), Adapter(small), request, stored)
