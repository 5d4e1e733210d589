"""A benchmark: checkpoints -> latency, generation, memory and the share of the ideal saving, measured in one run."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from structprune.bench.compiled import check_compile, compiled_blocks
from structprune.bench.latency import Timing
from structprune.bench.machine import describe_machine
from structprune.bench.semi_structured import masked_linears, refusal, semi_structured_row, shape_rows
from structprune.bench.settings import BenchSettings, Size
from structprune.bench.workloads import GenerationWork, Models, forward_rows, generation_rows
from structprune.checkpoint.output import check_apart, check_output, output_draft, write_json
from structprune.config import ModelSettings
from structprune.errors import UserError, lacks_memory
from structprune.evaluation.labels import checkpoint_labels
from structprune.generation.samplers import Generation
from structprune.models.adapter import Adapter
from structprune.models.checkpoint_files import locate
from structprune.models.families import Family, family_of
from structprune.models.loading import load_model, source_of
from structprune.models.placement import pick_device
from structprune.progress import Track, untracked
from structprune.report.bench_plots import plot_bench
from structprune.report.plots import check_matplotlib
from structprune.runs.ghost import read_ghost
from structprune.structured.sizes import block_size

RESULT = "bench.json"


@dataclass(frozen=True)
class BenchOutput:
    """Where a benchmark writes.

    Attributes:
        directory: of bench.json and the plots; it appears complete or not at all.
        plots: draw plots (needs matplotlib).
        overwrite: replace an earlier output.
    """

    directory: Path
    plots: bool = True
    overwrite: bool = False


@dataclass(frozen=True)
class Bench:
    """What a benchmark measured, as plain data, and the files it wrote."""

    result: dict
    paths: list[Path]


def bench(
    checkpoints: Sequence[str],
    settings: BenchSettings,
    output: BenchOutput,
    place: ModelSettings | None = None,
    track: Track = untracked,
) -> Bench:
    """Measure checkpoints against the first of them, all in memory at once, in turns.

    Args:
        checkpoints: directories or Hub ids of one family and vocabulary; the first is the dense one.
        place: device, dtype, and how checkpoints are read; default `ModelSettings()`.
    Raises:
        UserError: anything the user can mend, before any weight is read where it can be known then.
        torch.OutOfMemoryError: a checkpoint or a size that does not fit, by name.
    """
    place = place or ModelSettings()
    if output.plots:
        check_matplotlib("or leave them out with --no-plots")
    check_output(output.directory, None, output.overwrite, marks=(RESULT,))
    labels = checkpoint_labels(checkpoints)
    generation = check_checkpoints(checkpoints, settings, place)
    for checkpoint in checkpoints:
        check_apart(output.directory, locate(checkpoint, weights=False), output.overwrite)
    device = pick_device(place.device)
    if settings.compiled:
        check_compile(device)
    models: Models = {}
    for label, checkpoint in zip(labels, track(checkpoints, "loading"), strict=True):
        with _fitting(f"'{checkpoint}'", len(models), "give fewer checkpoints, or a half-precision --dtype"):
            models[label] = load_model(checkpoint, place.dtype, device, **place.reading)
    if settings.semi_structured:
        _check_masked(models)
    forward, generated = _measure(models, settings, generation, track)
    rows = describe_models(models)
    result = {
        "models": rows,
        "forward": forward,
        "generation": generated,
        "semi_structured": _semi_structured(models, settings, device, track) if settings.semi_structured else None,
        "settings": _plain_settings(settings, generation, device, rows[0]["family"]),
        "machine": describe_machine(),
    }
    with output_draft(output.directory, output.overwrite, marks=(RESULT,)) as draft:
        names = [RESULT, *(path.name for path in (plot_bench(result, draft) if output.plots else ()))]
        write_json(draft / RESULT, result)
    return Bench(result, [output.directory / name for name in names])


def check_checkpoints(checkpoints: Sequence[str], settings: BenchSettings, place: ModelSettings) -> Generation | None:
    """Refuse checkpoints that cannot be measured, or not together, from config.json and headers alone.

    Returns:
        The sampler's settings for all of them; None where no generation is measured.
    Raises:
        UserError: a family, vocabulary or (for generation) mask token other than the first one's, a length beyond a
            model's positions, a form of generation that the family does not have, or broken weights.
    """
    dense, *others = checkpoints
    first_config = read_ghost(dense, place).model.config
    first_family = family_of(first_config)
    _check_length(dense, first_family, first_config, settings)
    for checkpoint in others:
        config = read_ghost(checkpoint, place).model.config
        family = family_of(config)
        if family is not first_family:
            names = f"'{checkpoint}' is of family {family.name}, '{dense}' of {first_family.name}"
            raise UserError(f"{names}: compare within one family")
        vocabulary, first_vocabulary = (getattr(each, family.keys["vocabulary"]) for each in (config, first_config))
        if vocabulary != first_vocabulary:
            raise UserError(
                f"'{checkpoint}' has a vocabulary of {vocabulary}, '{dense}' of {first_vocabulary}: give checkpoints"
                " with the same vocabulary"
            )
        mask, first_mask = config.mask_token_id, first_config.mask_token_id
        if settings.gen_length and mask != first_mask:  # prompts of one may hold the other's
            raise UserError(
                f"'{checkpoint}' has mask token {mask}, '{dense}' {first_mask}: set one for all with --mask-id"
            )
        _check_length(checkpoint, family, config, settings)
    generation = settings.generation(first_config)
    if generation is not None:
        settings.caches_of(generation)
    return generation


def _check_length(checkpoint: str, family: Family, config, settings: BenchSettings) -> None:
    longest, positions = max(settings.lengths), getattr(config, family.keys["positions"])
    if longest > positions:
        raise UserError(f"--length {longest} is beyond the {positions} positions of '{checkpoint}': lower it")


def describe_models(models: Models) -> list[dict]:
    """One row per model: sizes, widths, and the share of the first model's block projections that it lacks."""
    rows: list[dict] = []
    for label, model in models.items():
        adapter = Adapter(model)
        projections = sum(block_size(block, "query_heads").total for block in adapter.blocks)
        whole = rows[0]["block_parameters"] if rows else projections
        rows.append(
            {
                "model": label,
                "source": source_of(model).name,
                "family": family_of(model.config).name,
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
                "parameters": model.num_parameters(),
                "block_parameters": projections,
                "removed": 1 - projections / whole,
                "bytes": sum(weight.numel() * weight.element_size() for weight in model.parameters()),
                "widths": [asdict(block.widths) for block in adapter.blocks],
            }
        )
    return rows


def _measure(models: Models, settings: BenchSettings, sampler: Generation | None, track: Track):
    """Rows of forward passes and of generations, in eager mode and then compiled."""
    forward: list[dict] = []
    generated: list[dict] = []
    for mode in ("eager", "compiled") if settings.compiled else ("eager",):
        with compiled_blocks(models.values()) if mode == "compiled" else nullcontext():
            for size in settings.sizes:
                with _fitting_size(models, size):
                    title = _titled(track, f"forward, {mode}, {size}")
                    rows = forward_rows(models, size, Timing(settings.rounds, settings.warmup, title))
                    forward += [{"mode": mode, **row} for row in rows]
                    if sampler is not None:
                        generated += _generations(models, settings, GenerationWork(size, sampler), mode, track)
    return forward, generated


def _generations(models: Models, settings: BenchSettings, work: GenerationWork, mode: str, track: Track) -> list[dict]:
    """Rows of generations at one size, cache by cache."""
    rows: list[dict] = []
    for cache in settings.caches_of(work.sampler):
        if mode == "compiled" and cache != "none":
            continue  # caches work by hooks on attention, which the compiler does not support
        title = _titled(track, f"generation, {mode}, {work.size}, cache {cache}")
        timing = Timing(settings.generation_rounds, int(mode == "compiled"), title)  # a warm-up compiles
        rows += [{"mode": mode, **row} for row in generation_rows(models, work, cache, timing)]
    return rows


@contextmanager
def _fitting(subject: str, count: int, remedy: str) -> Iterator[None]:
    """Turn a lack of memory into an OutOfMemoryError that names the subject, the models in memory and a remedy.

    It is not a UserError, so that scripts which measure several things can continue with the next.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        raise torch.OutOfMemoryError(f"{subject} does not fit the memory beside {count} models: {remedy}") from error


def _fitting_size(models: Models, size: Size):
    remedy = "lower either, or give fewer checkpoints"
    return _fitting(f"--batch {size.batch} at --length {size.length}", len(models), remedy)


def _titled(track: Track, title: str) -> Callable[[Iterable], Iterable]:
    return lambda items: track(items, title)


def _check_masked(models: Models) -> None:
    if not any(masked_linears(model) for model in models.values()):
        raise UserError(
            f"--semi-structured: none of {', '.join(models)} has two of every four weights zero: make one with"
            " structprune prune --method nm --nm 2:4"
        )


def _semi_structured(models: Models, settings: BenchSettings, device: torch.device, track: Track) -> dict:
    """For each 2:4-masked model, layer shapes and whole passes; or the reason why kernels cannot be measured here."""
    linears = {label: masked_linears(model) for label, model in models.items()}
    labels = [label for label in models if linears[label]]
    dtype = next(iter(linears[labels[0]].values())).weight.dtype
    reason = refusal(device, dtype)
    if reason:
        return {"refused": reason, "models": {label: {} for label in labels}}
    timing = Timing(settings.rounds, settings.warmup)
    results = {}
    for label in track(labels, "2:4 kernels"):
        counts = sorted({size.batch * size.length for size in settings.sizes})
        shapes = [row for tokens in counts for row in shape_rows(models[label], tokens, timing)]
        forward = []
        for size in settings.sizes:
            with _fitting_size(models, size):
                forward.append(semi_structured_row(models[label], size, timing))
        results[label] = {"shapes": shapes, "forward": forward}
    return {"refused": None, "models": results}


def _plain_settings(settings: BenchSettings, generation: Generation | None, device: torch.device, family: str) -> dict:
    sampler = None if generation is None else {"family": family, **vars(generation)}
    return {**asdict(settings), "device": str(device), "sampler": sampler}
