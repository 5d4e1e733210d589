"""`structprune bench`."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from structprune.cli.options import Debug, Device, MaskId, Overwrite, Pickle
from structprune.errors import UserError

BENCH_HELP = """Measure what pruning saves: latency, generation, memory, and the share of the ideal saving reached.

All checkpoints are held in memory at once and measured in turns, so that drift hits all of them alike.

[bold]Examples[/bold]

structprune bench ./llada ./llada-0.3 ./llada-0.5 --out speed

structprune bench ./llada ./llada-0.5 --out speed --batch 1,8 --length 512,2048 --compile --cache all

structprune bench ./llada ./llada-2of4 --out speed --semi-structured --gen-length 0
"""

Checkpoints = Annotated[
    list[str], typer.Argument(help="Checkpoint directories or Hub ids; the first is compared with.")
]
Results = Annotated[Path, typer.Option("--out", help="Directory of bench.json and pictures.")]
Batches = Annotated[str, typer.Option("--batch", metavar="LIST", help="Sequences in a pass; commas between.")]
Lengths = Annotated[
    str, typer.Option("--length", metavar="LIST", help="Tokens of a sequence, generated ones included.")
]
Compile = Annotated[bool, typer.Option("--compile", help="Also measure with torch.compile; caches are not for it.")]
Cache = Annotated[
    str,
    typer.Option(
        "--cache", metavar="LIST", help="Of none (full recomputation), prefix, dual; or all. Caches are approximate."
    ),
]
GenLength = Annotated[int, typer.Option("--gen-length", help="Generated tokens of a sequence; 0: no generation.")]
Steps = Annotated[int, typer.Option("--steps", help="Denoising steps of a generation.")]
BlockLength = Annotated[Optional[int], typer.Option("--block-length", help="Of LLaDA's generation.", show_default="32")]
Rounds = Annotated[int, typer.Option("--rounds", help="Timed forward passes of each model.")]
GenerationRounds = Annotated[int, typer.Option("--generation-rounds", help="Timed generations of each model.")]
SemiStructured = Annotated[
    bool, typer.Option("--semi-structured", help="Also run 2:4-masked weights through torch's 2:4 kernels.")
]
Dtype = Annotated[
    Optional[str],
    typer.Option("--dtype", help="float32, bfloat16 or float16.", show_default="float32 on CPU, else as stored"),
]
NoPlots = Annotated[bool, typer.Option("--no-plots", help="No pictures, which need matplotlib.")]


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
    allow_pickle: Pickle = False,
    no_plots: NoPlots = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Lists are written with commas."""
    from structprune.bench.settings import BenchSettings
    from structprune.cli.show import bench_and_show
    from structprune.config import Config

    place = {"device": device, "dtype": dtype, "mask_id": mask_id, "allow_pickle": allow_pickle}
    place = Config.load(overrides={f"model.{name}": value for name, value in place.items()}).model
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
    bench_and_show(checkpoints, settings, out, place, not no_plots, overwrite)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers between commas.

    Raises:
        UserError: something else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{option} '{text}' is no list of whole numbers: write them as in {option} 1,8") from error
