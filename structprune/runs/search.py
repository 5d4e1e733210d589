"""The search for widths on one model: libraries of levels on disk, judged on the run's held-out windows."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from structprune import __version__
from structprune.calibration.batches import Calibration
from structprune.calibration.build import held_out_noise
from structprune.calibration.noise import stratified_noise
from structprune.errors import UserError
from structprune.evaluation.fidelity import masked_kl, process_divergence, reference_predictions
from structprune.levels.build import Recipe, build_library
from structprune.levels.latency import LatencyTarget
from structprune.levels.library import HEADER, Library, check_identity, plain_counts
from structprune.levels.losses import LOSSES, check_losses
from structprune.levels.prices import Price, fill_budget, mac_price, parameter_price
from structprune.levels.search import Places, Stitch, Task, search_rounds
from structprune.levels.stitch import ReferenceWindows, StitchedModel, consumer_biases
from structprune.models.adapter import Adapter
from structprune.models.journal import NOWHERE, Journal, unwatched
from structprune.models.modeling_structprune import DiffusionLM
from structprune.progress import Track
from structprune.refit.reconstruct import Reconstructor
from structprune.refit.walk import has_constant
from structprune.structured.allocate import Counts
from structprune.structured.choose import channel_multiple
from structprune.structured.ranking import Paths
from structprune.structured.request import StructuredRequest
from structprune.workers import ALONE, Workers, check_shares

FIRST = "first"  # the directory of the library that all ratios share
OWN = ("ratio-", "latency-")  # how folders of one ratio, or of one target in milliseconds, begin
LATENCY_FILE = "latency.json"  # in a directory of levels, the table that all targets share
OF_LEVELS = ("levels", "spread", "whole")  # settings of a search that decide its levels
SEARCH_SEED = 2000  # plus the run's seed: the noise that plans are compared under


@dataclass(frozen=True)
class SearchContext:
    """What a search stands on: the dense model, its request and calibration, and how to refit and copy it.

    Attributes:
        uncut: gives a copy of the model with linears of its own, as a plan that removes nothing.
        streamed: a context in which a model computes on the run's device.
        paths: of the dense model; used where the score is not obs, which ranks anew on the pruned prefix.
        timed: adds what some work takes to a phase of the run; `levels` are a part of `search`.
        latency: where the budget is milliseconds.
        workers: the processes that share the windows.
        journal: of the run's finished parts.
    """

    model: DiffusionLM
    request: StructuredRequest
    calibration: Calibration
    reconstructor: Reconstructor
    uncut: Callable[[], DiffusionLM]
    paths: Paths
    streamed: Callable[[DiffusionLM], AbstractContextManager]
    track: Track
    timed: Callable[[str, Callable[[], None]], None]
    latency: LatencyTarget | None = None
    workers: Workers = ALONE
    journal: Journal = NOWHERE

    @property
    def watch(self) -> Callable[[], None]:
        """What ends a step of several processes where a signal came to one; one process is watched by its `track`."""
        return self.journal.watch_all if self.workers.several else unwatched


@dataclass(frozen=True)
class SearchResult:
    """The widths of a search: counts, the order in which units go, and the rounds as plain data."""

    counts: Counts
    paths: Paths
    rounds: list[dict]

    def plain(self) -> dict:
        """The rounds: each one's best plan, and the divergences on the way there."""
        return {"rounds": self.rounds}


def search_widths(context: SearchContext, start: Counts, directory: Path, plans: Sequence[Counts] = ()) -> SearchResult:
    """Search for the counts that lose least at the size of `start`.

    Args:
        directory: for the libraries; what is there already is used.
        plans: at which other searches start that share the first library, in the order of their size, with `start`.
    Raises:
        UserError: the directory holds the levels of something else.
    """
    request = context.request
    sizes = request.sizes
    multiple = channel_multiple(sizes, request.settings)
    price, budget = _price_and_budget(context, start)
    made_from, losses = levels_identity(context.model, context.calibration, request), losses_identity(request)
    if context.latency is not None:
        losses["latency table"] = context.latency.table.digest()
    task = Task(
        request.config.search, sizes, multiple, price, budget, request.calibration.seed, made_from, losses,
        tuple(plans), context.workers, context.watch,
    )  # fmt: skip
    windows, rounds, last = reference_windows(context), [], None
    stitch, places = _stitcher(context, windows), places_of(directory, request)
    for last in search_rounds(task, start, stitch, places, context.track):
        rounds.append({"plan": plain_counts(last.counts), "divergence": last.losses})
    assert last is not None, "at least one round"
    paths = {key: last.library.path(key) for key in last.counts}
    return SearchResult(fill_budget(last.counts, paths, price, budget, multiple), paths, rounds)


def _price_and_budget(context: SearchContext, start: Counts) -> tuple[Price, float]:
    """What a width costs, and the most that all may: as much as `start`, or up to the target in milliseconds."""
    if context.latency is not None:
        return context.latency.table.price, context.latency.budget(start)
    sizes = context.request.sizes
    price = parameter_price(sizes)
    if context.request.config.search.budget == "macs":
        price = mac_price(sizes, Adapter(context.model), context.request.calibration.length)
    return price, sum(price(key, steps) for key, steps in start.items())


def _stitcher(context: SearchContext, windows: ReferenceWindows) -> Stitch:
    reconstruct = context.request.reconstruct
    paths = None if context.request.settings.score == "obs" else context.paths
    recipe = Recipe(context.request.settings, reconstruct, paths)
    biases = consumer_biases(Adapter(context.model))

    @contextmanager
    def stitch(library: Library, counts: Counts) -> Iterator[StitchedModel]:
        walk, small = context.reconstructor.walk, context.uncut()
        if context.workers.from_first(lambda: any(library.has(block.index) for block in walk.dense.blocks)):
            context.journal.note_taken("levels", library.directory)
        context.journal.note_made(library.directory)
        with context.streamed(small):
            work = partial(build_library, walk, small, library, recipe, watch=context.watch)
            context.timed("levels", work)
            if counts != library.plan:
                context.timed("levels", partial(build_library, walk, small, library, recipe, counts))
            yield StitchedModel(small, library, counts, biases, windows, has_constant(reconstruct))

    return stitch


def reference_windows(context: SearchContext) -> ReferenceWindows:
    """Held-out windows under noise of their own, and the dense model's predictions there; of this process.

    Raises:
        UserError: fewer windows than processes.
    """
    request, model, workers = context.request, context.model, context.workers
    count = request.config.search.sequences
    windows = context.calibration.check.input_ids[:count]  # (n, T)
    generator = torch.Generator().manual_seed(SEARCH_SEED + request.calibration.seed)
    samples = max(1, count // len(windows))
    noisy, p = stratified_noise(windows, model.config.mask_token_id, generator, samples, model.edges_visible)
    check_shares(workers, [(len(windows), "windows of a search (search.sequences)")])
    windows, noisy, p = (each[workers.rank :: workers.count] for each in (windows, noisy, p))
    batch = request.limits.sequences(samples, windows.shape[1])
    reference, _ = reference_predictions(model, windows, noisy, batch=batch)
    return ReferenceWindows(windows, noisy, p, reference, request.limits, workers)


def held_out_divergences(dense: DiffusionLM, models: Sequence[DiffusionLM], context: SearchContext) -> list[float]:
    """How far models are from the dense one on the held-out windows, in nats per token (`process_divergence`)."""
    all_windows = held_out_noise(context.calibration, dense, context.request.calibration.seed)
    own = context.workers.span(len(all_windows[0]))
    ids, noisy, p = (each[own] for each in all_windows)  # (n, T), (n, S, T), (n, S)
    batch = context.request.limits.sequences(noisy.shape[1], ids.shape[1])
    reference, _ = reference_predictions(dense, ids, noisy, batch=batch)
    values = [process_divergence(masked_kl(model, ids, noisy, reference, batch), p, ids.shape[1]) for model in models]
    return [context.workers.mean(value, len(ids)) for value in values]


@contextmanager
def levels_directory(directory: Path | None, workers: Workers = ALONE) -> Iterator[Path]:
    """The directory given, or a temporary one that is removed; the same one in all processes."""
    if directory is not None:
        yield directory
        return
    with ExitStack() as stack:
        temporary = partial(
            tempfile.TemporaryDirectory, prefix="structprune-levels-", ignore_cleanup_errors=True
        )  # fmt: skip
        yield Path(workers.from_first(lambda: stack.enter_context(temporary())))
        workers.wait()  # until none reads it


def places_of(directory: Path, request: StructuredRequest) -> Places:
    """The first library, which all ratios and budgets share, and the directory of the request's own ones."""
    search = request.config.search
    name = f"ratio-{request.settings.ratio}" + ("" if search.budget == "parameters" else f"-{search.budget}")
    if search.budget == "latency":  # which decides the ratio
        name = f"latency-{search.target_ms}"
    return Places(directory / FIRST, directory / name)


def check_levels_directory(directory: Path) -> None:
    """Raise UserError for a place that cannot be a directory of levels: a file, or a directory of something else."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--levels {directory} is a file: give a directory")
    if directory.exists() and not os.access(directory, os.R_OK | os.X_OK):
        raise UserError(f"--levels {directory} cannot be read: give another directory")
    parent = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--levels {directory} cannot be written below '{parent}': give another directory")
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    names = [name for name in names if not name.startswith(".")]  # drafts of a run that was killed
    if others := [name for name in names if not name.startswith(OWN) and name not in (FIRST, LATENCY_FILE)]:
        raise UserError(f"--levels {directory} holds '{others[0]}', which is no level: give another directory")


def check_levels(directory: Path, model: DiffusionLM, calibration: Calibration, request: StructuredRequest) -> None:
    """Raise UserError, before anything is computed, without a search, or for levels made of something else."""
    if not request.config.search.enabled:
        raise UserError(f"levels in '{directory}' are for a search: set search.enabled = true, or leave them out")
    places, made_from = places_of(directory, request), levels_identity(model, calibration, request)
    for header in (places.first / HEADER, *places.own.glob(f"*/{HEADER}")):
        if header.exists():
            check_identity(header, made_from)
    for losses in places.own.glob(f"*/{LOSSES}"):
        check_losses(losses, made_from | losses_identity(request))
        if request.config.search.budget == "latency" and not (directory / LATENCY_FILE).exists():
            raise UserError(f"'{losses}' lacks the times that it was measured with: delete '{places.own}'")


def levels_identity(model: DiffusionLM, calibration: Calibration, request: StructuredRequest) -> dict:
    """Plain data that decides the levels of a library, beside its grids and plan. All ratios and budgets share it."""
    config = request.config
    settings = {
        f"{name}.{key}": value
        for name in ("structured", "reconstruct", "sink", "search")
        for key, value in getattr(config, name).model_dump(mode="json").items()
        if f"{name}.{key}" != "structured.ratio" and (name != "search" or key in OF_LEVELS)
    }
    return {
        "version": __version__,
        "model": weights_digest(model),
        "calibration": calibration.digest,
        "arm": request.arm,
        "seed": request.calibration.seed,
        **settings,
    }


def losses_identity(request: StructuredRequest) -> dict:
    """The settings that decide losses, beside levels. Not the number of rounds: a search can go on with more."""
    settings = request.config.search.model_dump(mode="json")
    return {f"search.{key}": value for key, value in settings.items() if key not in ("rounds", *OF_LEVELS)}


def weights_digest(model: DiffusionLM, probe: int = 64) -> str:
    """SHA-256 (first 16 hex digits) of every parameter's name, shape, and values at start, middle and end.

    A change of single values between those places goes unnoticed.
    """
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        flat = value.detach().flatten()  # (n,)
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        for start in (0, len(flat) // 2, max(0, len(flat) - probe)):
            digest.update(flat[start : start + probe].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
