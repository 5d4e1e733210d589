"""`structprune bench`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from structprune.cli.configuration import read_model_settings
from structprune.cli.options import (
    BlockSize,
    Checkpoints,
    Debug,
    Device,
    Dtype,
    MaskId,
    Overwrite,
    Pickle,
    without_dots,
)
from structprune.errors import UserError, shown

if TYPE_CHECKING:
    from structprune.bench.settings import BenchSettings
    from structprune.config import ModelSettings
    from structprune.runs.bench import BenchOutput


Results = Annotated[
    Path, typer.Option("--out", callback=without_dots, help="Output directory for bench.json and the plots.")
]
Batches = Annotated[str, typer.Option(metavar="LIST", help="Batch sizes, separated by commas.")]
Lengths = Annotated[
    str, typer.Option(metavar="LIST", help="Tokens per sequence, generated ones included; commas between.")
]
Compile = Annotated[bool, typer.Option("--compile", help="Also measure with torch.compile (without caches).")]
CACHES = (
    "Caches of generation: none (full recomputation), prefix, dual, or all that apply to the model. Caches are"
    " approximate, but exact in block diffusion."
)
Cache = Annotated[str, typer.Option(metavar="LIST", help=CACHES)]
GenLength = Annotated[int, typer.Option(help="Tokens to generate; 0 measures no generation.")]
Steps = Annotated[int, typer.Option(help="Denoising steps of a generation.")]
BlockLength = Annotated[
    int | None,
    typer.Option(
        help="Tokens in a block of LLaDA's sampler.",
        show_default="32, at most --gen-length, half of it for a dual cache",
    ),
]
Rounds = Annotated[int, typer.Option(help="Timed forward passes of each model.")]
GenerationRounds = Annotated[int, typer.Option(help="Timed generations of each model.")]
SemiStructured = Annotated[
    bool, typer.Option("--semi-structured", help="Also run 2:4-masked weights on torch's 2:4 kernels.")
]
NoPlots = Annotated[bool, typer.Option("--no-plots", help="Draw no plots (they need matplotlib).")]


def bench(
    checkpoints: Checkpoints,
    out: Results = Path("structprune-bench"),
    batch: Batches = "1",
    length: Lengths = "512",
    compile: Compile = False,
    cache: Cache = "none",
    gen_length: GenLength = 128,
    steps: Steps = 32,
    block_length: BlockLength = None,
    rounds: Rounds = 20,
    generation_rounds: GenerationRounds = 5,
    semi_structured: SemiStructured = False,
    device: Device = None,
    dtype: Dtype = None,
    mask_id: MaskId = None,
    block_size: BlockSize = None,
    allow_pickle: Pickle = False,
    no_plots: NoPlots = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Lists are separated by commas."""
    from structprune.bench.settings import BenchSettings
    from structprune.runs.bench import BenchOutput

    place = read_model_settings(device, dtype, mask_id, block_size, allow_pickle)
    settings = BenchSettings(
        batches=_numbers("--batch", batch),
        lengths=_numbers("--length", length),
        gen_length=gen_length,
        steps=steps,
        block_length=block_length,
        caches=tuple(name.strip() for name in cache.split(",")),
        compiled=compile,
        semi_structured=semi_structured,
        rounds=rounds,
        generation_rounds=generation_rounds,
    )
    _measure(checkpoints, settings, BenchOutput(out, not no_plots, overwrite), place)


def _measure(checkpoints: list[str], settings: "BenchSettings", output: "BenchOutput", place: "ModelSettings") -> None:
    """Run the benchmark and show its tables."""
    import torch

    from structprune.cli.console import progress_bars, show
    from structprune.report.bench_tables import bench_tables
    from structprune.runs.bench import bench as measure

    try:
        with progress_bars() as track:
            benchmark = measure(checkpoints, settings, output, place, track)
    except torch.OutOfMemoryError as error:
        raise UserError(str(error)) from error
    show(*bench_tables(benchmark.result))
    if refusal := (benchmark.result["semi_structured"] or {}).get("refused"):
        show(f"2:4 kernels were not measured: {escape(refusal)}")
    show("Wrote " + ", ".join(map(str, benchmark.paths)))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas.

    Raises:
        UserError: it is something else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{option} {shown(text)} is not a list of whole numbers: write {option} 1,8") from error
