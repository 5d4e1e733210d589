"""`structprune sinks`."""

from typing import Annotated

import typer

from structprune.cli.configuration import read_model_settings
from structprune.cli.options import BlockSize, Debug, Device, Dtype, MaskId, Out, Overwrite, Pickle

Source = Annotated[
    str, typer.Argument(help="Checkpoint directory, Hub id or GGUF file of a diffusion LM or a causal LM.")
]
Text = Annotated[
    str | None, typer.Option(help="A .txt, .jsonl or .parquet file.", show_default="the package's held-out text")
]
Prompt = Annotated[str | None, typer.Option(help="Generate from this prompt instead of windows of text.")]
Trajectory = Annotated[
    str | None,
    typer.Option(
        help="forward (noise levels), reverse (the model's own generation) or both.",
        show_default="both; reverse for a causal LM",
    ),
]
Windows = Annotated[int | None, typer.Option(help="Number of text windows; not with --prompt.", show_default="8")]
Length = Annotated[
    int | None,
    typer.Option(help="Tokens in a window, generated ones included; not with --prompt.", show_default="128"),
]
GenLength = Annotated[
    int | None, typer.Option(help="Tokens to generate.", show_default="half the length; 64 after a prompt")
]
Levels = Annotated[int | None, typer.Option(help="Noise levels of the forward trajectory.", show_default="10")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps of a diffusion LM.", show_default="one per token")]
BlockLength = Annotated[
    int | None, typer.Option(help="Tokens in a block of LLaDA's sampler.", show_default="the whole generation")
]
Kappa = Annotated[float, typer.Option(help="A sink's attention exceeds the mean by this many standard deviations.")]
ScaleFree = Annotated[bool, typer.Option("--scale-free", help="Divide attention by its mean first.")]


def sinks(
    checkpoint: Source,
    out: Out,
    text: Text = None,
    prompt: Prompt = None,
    trajectory: Trajectory = None,
    against: Annotated[str | None, typer.Option(help="A second checkpoint to show beside the first.")] = None,
    windows: Windows = None,
    length: Length = None,
    gen_length: GenLength = None,
    levels: Levels = None,
    steps: Steps = None,
    block_length: BlockLength = None,
    seed: Annotated[int | None, typer.Option(help="Random seed of windows and noise.", show_default="0")] = None,
    alpha: Annotated[float, typer.Option(help="Steepness of the sink mask.")] = 5.0,
    kappa: Kappa = 2.0,
    scale_free: ScaleFree = False,
    device: Device = None,
    dtype: Dtype = None,
    mask_id: MaskId = None,
    block_size: BlockSize = None,
    allow_pickle: Pickle = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """The run refuses contradictions."""
    from structprune.cli.console import progress_of, show
    from structprune.config import Config
    from structprune.report.sink_tables import property_table, token_tables
    from structprune.runs.evaluate import Session
    from structprune.runs.sinks import SinkRun, measure_sinks
    from structprune.workers import workers

    sink = Config.load(overrides={"sink.alpha": alpha, "sink.kappa": kappa, "sink.scale_free": scale_free}).sink
    run = SinkRun(sink, text, prompt, trajectory, windows, length, gen_length, levels, steps, block_length, seed)
    place = read_model_settings(device, dtype, mask_id, block_size, allow_pickle)
    sources = [checkpoint] if against is None else [checkpoint, against]
    with workers() as shared, progress_of(shared) as track:
        measurement = measure_sinks(sources, run, out, place, overwrite, Session(track, shared))
    runs = measurement.result["runs"]
    lines: list = [property_table(runs), *token_tables(runs), f"Wrote {out} ({', '.join(measurement.files)})"]
    show(*lines, shown=shared.main)
