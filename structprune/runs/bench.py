"""A benchmark: checkpoints -> latency, generation, memory and the share of the ideal saving, measured in one run."""

from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator, Sequence

import torch

from structprune.bench.compiled import check_compile, compiled_blocks
from structprune.bench.machine import describe_machine
from structprune.bench.semi_structured import masked_linears, refusal, semi_structured_row, shape_rows
from structprune.bench.settings import BenchSettings
from structprune.bench.workloads import Models, forward_rows, generation_rows
from structprune.checkpoint.atomic import whole_directory
from structprune.checkpoint.output import check_output, write_json
from structprune.config import ModelSettings
from structprune.errors import UserError
from structprune.evaluation.labels import checkpoint_labels
from structprune.generation.samplers import Generation
from structprune.models.adapter import Adapter
from structprune.models.families import family_of
from structprune.models.loading import load_config, load_model
from structprune.models.placement import pick_device
from structprune.progress import Track, untracked
from structprune.report.bench_plots import plot_bench
from structprune.report.plots import check_matplotlib
from structprune.structured.sizes import block_size

RESULT = "bench.json"


@dataclass(frozen=True)
class Bench:
    """What a benchmark found: plain data, and the files it wrote."""

    result: dict
    made: list[Path]


def bench(
    checkpoints: Sequence[str],
    settings: BenchSettings,
    out: str | Path,
    place: ModelSettings = ModelSettings(),
    plots: bool = True,
    overwrite: bool = False,
    track: Track = untracked,
) -> Bench:
    """Measure checkpoints against the first of them, all in memory at once, in turns.

    Args:
        checkpoints: directories or Hub ids of one family and vocabulary; the first is the dense one.
        out: directory of bench.json and pictures; it appears complete or not at all.
        place: device, dtype, and how checkpoints are read.
        plots: draw pictures (needs matplotlib).
    Raises:
        UserError: anything the user can mend, before any weight is read where it can be known then.
        torch.OutOfMemoryError: a checkpoint or a size that does not fit, by name.
    """
    if plots:
        check_matplotlib("or leave them out with --no-plots")
    check_output(out, None, overwrite, marks=(RESULT,))
    labels = checkpoint_labels(checkpoints)
    generation = check_checkpoints(checkpoints, settings, place)
    device = pick_device(place.device)
    if settings.compiled:
        check_compile(device)
    models: Models = {}
    for label, checkpoint in zip(labels, track(checkpoints, "loading")):
        with _fitting(f"'{checkpoint}'", len(models), "give fewer checkpoints, or a half-precision --dtype"):
            models[label] = load_model(checkpoint, place.dtype, device, place.mask_id, place.allow_pickle)
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
    with whole_directory(out) as draft:
        names = [RESULT, *(path.name for path in (plot_bench(result, draft) if plots else ()))]
        write_json(draft / RESULT, result)
    return Bench(result, [Path(out) / name for name in names])


def check_checkpoints(
    checkpoints: Sequence[str], settings: BenchSettings, place: ModelSettings = ModelSettings()
) -> Generation | None:
    """Refuse what cannot be measured together, from config.json alone; the sampler's settings for all.

    Raises:
        UserError: another family, vocabulary or (for generation) mask token than the first, a length beyond a model's
            positions, or a form of generation that the family has not.
    """
    first = None
    for checkpoint in checkpoints:
        _, family, config, _ = load_config(checkpoint, place.mask_id)
        vocabulary, positions = (getattr(config, family.keys[role]) for role in ("vocabulary", "positions"))
        first = first or (checkpoint, family, vocabulary, config)
        if family is not first[1]:
            raise UserError(
                f"'{checkpoint}' is of family {family.name}, '{first[0]}' of {first[1].name}: compare within one family"
            )
        if vocabulary != first[2]:
            raise UserError(
                f"'{checkpoint}' has a vocabulary of {vocabulary}, '{first[0]}' of {first[2]}: give checkpoints of one"
            )
        mask, other = config.mask_token_id, first[3].mask_token_id
        if settings.gen_length and mask != other:  # prompts of one may hold the other's
            raise UserError(
                f"'{checkpoint}' has mask token {mask}, '{first[0]}' {other}: name that of all by --mask-id"
            )
        if max(settings.lengths) > positions:
            raise UserError(
                f"--length {max(settings.lengths)} is beyond the {positions} positions of '{checkpoint}': lower it"
            )
    generation = settings.generation(first[3])
    if generation is not None:
        settings.caches_of(generation)
    return generation


def describe_models(models: Models) -> list[dict]:
    """One row per model: sizes, the share of the first one's block projections that it lacks, and widths."""
    rows, whole = [], None
    for label, model in models.items():
        adapter = Adapter(model)
        projections = sum(block_size(block, "query_heads").total for block in adapter.blocks)
        whole = whole or projections
        widths = [asdict(block.widths) for block in adapter.blocks]
        rows.append(
            {
                "model": label,
                "source": model.source.name,
                "family": family_of(model.config).name,
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
                "parameters": model.num_parameters(),
                "block_parameters": projections,
                "removed": 1 - projections / whole,
                "bytes": sum(weight.numel() * weight.element_size() for weight in model.parameters()),
                "widths": widths,
            }
        )
    return rows


def _measure(models: Models, settings: BenchSettings, generation: Generation | None, track: Track):
    """Rows of forward passes and of generations, in eager mode and then compiled."""
    forward, generated = [], []
    wanted = () if generation is None else settings.caches_of(generation)
    for mode in ("eager", "compiled") if settings.compiled else ("eager",):
        compiled = mode == "compiled"
        # what a cache runs is hooked into the attention cores, which is not for the compiler
        caches = tuple(cache for cache in wanted if not compiled or cache == "none")
        with compiled_blocks(models.values()) if compiled else nullcontext():
            for size in _sizes(settings):
                title = f"{mode}, {size[0]} x {size[1]}"
                with _fitting_size(models, *size):
                    shown = _titled(track, f"forward, {title}")
                    rows = forward_rows(models, *size, settings.rounds, settings.warmup, shown)
                    forward += [{"mode": mode, **row} for row in rows]
                    full: dict[str, torch.Tensor] = {}
                    for cache in caches:
                        shown = _titled(track, f"generation, {title}, cache {cache}")
                        counts = (settings.generation_rounds, int(compiled))  # a warm-up compiles
                        rows = generation_rows(models, *size, generation, cache, *counts, full, shown)
                        generated += [{"mode": mode, **row} for row in rows]
    return forward, generated


def _sizes(settings: BenchSettings) -> list[tuple[int, int]]:
    return [(batch, length) for batch in settings.batches for length in settings.lengths]


@contextmanager
def _fitting(what: str, count: int, remedy: str) -> Iterator[None]:
    """Say where memory runs out for something beside `count` models, and what to do: still as an OutOfMemoryError, for
    whoever measures other things afterwards (scripts/gpu/gpu_report.py) goes on after it."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise torch.OutOfMemoryError(f"{what} does not fit the memory beside {count} models: {remedy}") from error


def _fitting_size(models: Models, batch: int, length: int):
    remedy = "lower either, or give fewer checkpoints"
    return _fitting(f"--batch {batch} at --length {length}", len(models), remedy)


def _titled(track: Track, title: str) -> Callable[[Iterable], Iterable]:
    return lambda items: track(items, title)


def _check_masked(models: Models) -> None:
    if not any(masked_linears(model) for model in models.values()):
        raise UserError(
            f"--semi-structured: none of {', '.join(models)} has two of every four weights zero: make one with"
            " structprune prune --method nm --nm 2:4"
        )


def _semi_structured(models: Models, settings: BenchSettings, device: torch.device, track: Track) -> dict:
    """By model that is 2:4-masked, layer shapes and whole passes; or why there is nothing to measure here."""
    found: dict = {"refused": None, "models": {}}
    masked = {label: model for label, model in models.items() if masked_linears(model)}
    first = next(iter(masked.values()))
    found["refused"] = refusal(device, first.embedding.weight.dtype)
    if found["refused"]:
        return found | {"models": {label: {} for label in masked}}
    rounds = (settings.rounds, settings.warmup)
    for label, model in track(masked.items(), "2:4 kernels"):
        counts = sorted({batch * length for batch, length in _sizes(settings)})
        shapes = [row for tokens in counts for row in shape_rows(model, tokens, *rounds)]
        forward = []
        for size in _sizes(settings):
            with _fitting_size(models, *size):
                forward.append(semi_structured_row(model, *size, *rounds))
        found["models"][label] = {"shapes": shapes, "forward": forward}
    return found


def _plain_settings(settings: BenchSettings, generation: Generation | None, device: torch.device, family: str) -> dict:
    sampler = None if generation is None else {"family": family, **asdict(generation)}
    return {**asdict(settings), "device": str(device), "sampler": sampler}
