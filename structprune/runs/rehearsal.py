"""Before the long work: one block goes through every stage of a run, with the first windows of its calibration.

What would end a run late ends it here within a minute: a device that lacks the memory for a block's statistics or its
solves, a dtype that overflows, an operation that the device does not have.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from structprune.calibration.batches import Calibration
from structprune.calibration.build import held_out_noise
from structprune.errors import UserError, lacks_memory
from structprune.evaluation.nelbo import masked_nelbo
from structprune.masking.request import MaskRequest
from structprune.models.adapter import Adapter
from structprune.models.journal import Journal
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import give_back_memory
from structprune.refit.reconstruct import Reconstructor
from structprune.runs.mask import MaskRun
from structprune.runs.resolve import backward_user
from structprune.runs.run import Run
from structprune.runs.stages import digest
from structprune.runs.work import REHEARSED
from structprune.statistics.scan import Scan
from structprune.structured.plan import BlockPlan, identity_plan, make_plan
from structprune.structured.ranking import rank_units
from structprune.structured.request import StructuredRequest
from structprune.structured.surgery import apply_plan

WORTH = 10**9  # bytes of weights; a run on fewer fails as early without
DAMPING = 0.01  # at least, of the score of few windows
NOTHING = BlockPlan((), (), ())
DECISIVE: Any = {"method": True, "structured": True, "masking": True, "reconstruct": True, "memory": True}


def rehearse(run: Run, request: StructuredRequest | MaskRequest, journal: Journal) -> None:
    """Let one block go through every stage, unless an earlier run with these parts did so, with the same settings.

    Each process does it alone, with its own windows. `memory.rehearsal = true` asks for it in every run.

    Args:
        run: that has read its text. request: of it. journal: where its parts will be kept.
    Raises:
        UserError: what the run would end with at that block.
    """
    enabled, name = request.config.memory.rehearsal, _settings_of(request)
    if enabled is None:
        heavy = sum(each.numel() * each.element_size() for each in run.model.parameters()) >= WORTH
        enabled = heavy and not journal.within(REHEARSED).has(name)
    whole = any(len(block.cut_kinds) == 2 for block in run.adapter.blocks)  # else no block is a model of its own
    if not enabled or not whole or not request.reads_text:
        return
    for _ in run.track([0], "rehearsal"):
        try:
            run.timed("rehearsal", partial(_one_block, run, request))
        except UserError as error:
            raise UserError(f"in a rehearsal with one block, {error}") from error
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            remedy = "lower calibration.batch or memory.budget_gb" + _elsewhere(request)
            raise UserError(f"in a rehearsal with one block the memory of {run.device} is full: {remedy}") from error
    give_back_memory()
    journal.mark(REHEARSED, name, None)


def _elsewhere(request: StructuredRequest | MaskRequest) -> str:
    """The remedy of weights that lie elsewhere, where the run can have that and has not."""
    config, resources = request.config, request.resources
    if resources.offload or config.search.enabled or config.model.allow_pickle:
        return ""
    if config.method == "structured" and backward_user(config):
        return ""
    return f", or set memory.offload = {'true' if resources.accelerator else 'disk'}"


def _settings_of(request: StructuredRequest | MaskRequest) -> str:
    """A digest of what decides the work on a block, beside what all parts share."""
    values = request.config.model_dump(mode="json", include=DECISIVE | {"calibration": {"batch"}})
    return digest(values, str(request.resources.device))


def _one_block(run: Run, request: StructuredRequest | MaskRequest) -> None:
    windows = few_windows(run.text_windows.share(run.workers), run.limits.windows)
    if run.generates:  # the text's windows stand for those that will be generated
        windows = replace(windows, metadata=windows.metadata | {"trajectory": run.sink.trajectory})
    block = one_block(run.model)
    if isinstance(request, MaskRequest):
        MaskRun(block, request, windows, lambda items, title: items).run()
        return
    scan = Scan(Adapter(block), windows, run.sink, run.limits)
    with run.streamed(block):
        # few rows leave a Gram matrix that only a damping makes definite
        settings = request.settings.model_copy(update={"damping": max(DAMPING, request.settings.damping)})
        paths = rank_units(replace(scan, calibration=windows.fit), settings, request.arm)
        counts = {key: len(path.steps) // 2 for key, path in paths.items()}  # something of each kind stays
        plan = make_plan(scan.adapter, paths, counts, request.settings.gqa)
        small = apply_plan(block, plan, request.reconstruct.adds_bias)
        with run.streamed(small):
            if request.reconstruct.enabled:  # one damping takes the memory of all, which are solved one by one
                damping = (max(request.reconstruct.damping),)
                Reconstructor(scan, request.reconstruct.model_copy(update={"damping": damping})).refit(small)
            ids, noisy, p = held_out_noise(windows, block, run.seed)
            masked_nelbo(small, ids, noisy, p, batch=run.limits.sequences(windows.levels, windows.length))


def few_windows(calibration: Calibration, count: int) -> Calibration:
    """The first windows of a calibration, as many as a pass takes, and at most so many held-out ones."""
    few = calibration.first(count)
    fit = few.windows - few.held_out
    return few.part(torch.arange(fit + min(count, few.held_out)), held_out=min(count, few.held_out))


def one_block(model: DiffusionLM) -> DiffusionLM:
    """A model of the first block that has attention and MLP, which shares its tensors."""
    adapter = Adapter(model)
    index, plan = next(block.index for block in adapter.blocks if len(block.cut_kinds) == 2), identity_plan(adapter)
    blocks = tuple(each if place == index else NOTHING for place, each in enumerate(plan.blocks))
    return apply_plan(model, replace(plan, blocks=blocks), coupled={})
