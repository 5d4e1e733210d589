"""`structprune sinks`."""

from typing import Annotated, Optional

import typer

from structprune.cli.options import Debug, Device, MaskId, Out, Overwrite, Pickle

SINKS_HELP = """Measure where attention sinks are and how they move while a model denoises, or generates token by token.

Writes sinks.json with every figure, pictures and an animation. A causal LM (Llama, Qwen, ...; also a GGUF file) can be
measured too, and set beside a diffusion LM with --against.

[bold]Examples[/bold]

structprune sinks GSAI-ML/LLaDA-8B-Base --out llada-sinks --prompt "Explain why the sky is blue."

structprune sinks ./my-dream --out sinks --text notes.txt --against Qwen/Qwen2.5-7B

[bold]What is compared[/bold]

Positions that are there at every step. Those of a causal LM are its prompt's, and mass is per query that sees them.
"""
Source = Annotated[str, typer.Argument(help="Checkpoint directory, Hub id, or GGUF file; a diffusion or a causal LM.")]
Text = Annotated[
    Optional[str],
    typer.Option("--text", help="A .txt, .jsonl or .parquet file.", show_default="the package's held-out text"),
]
Prompt = Annotated[Optional[str], typer.Option("--prompt", help="Generate from this instead of from windows of text.")]
Trajectory = Annotated[
    Optional[str],
    typer.Option(
        "--trajectory",
        help="forward (noise levels), reverse (its own generation) or both.",
        show_default="all that the model has",
    ),
]
Against = Annotated[Optional[str], typer.Option("--against", help="A second checkpoint, to be set beside the first.")]
Windows = Annotated[
    Optional[int], typer.Option("--windows", help="Windows of the text; not with --prompt.", show_default="8")
]
Length = Annotated[
    Optional[int],
    typer.Option("--length", help="Tokens of a window; the last are generated. Not with --prompt.", show_default="128"),
]
GenLength = Annotated[
    Optional[int],
    typer.Option("--gen-length", help="Tokens to generate.", show_default="half the length; 64 after a prompt"),
]
Levels = Annotated[
    Optional[int], typer.Option("--levels", help="Noise levels of the forward trajectory.", show_default="10")
]
Steps = Annotated[
    Optional[int], typer.Option("--steps", help="Denoising steps of a diffusion LM.", show_default="one per token")
]
Blocks = Annotated[
    Optional[int], typer.Option("--block-length", help="Of LLaDA's sampler.", show_default="the whole generation")
]
Seed = Annotated[Optional[int], typer.Option("--seed", help="Draws windows and noise.", show_default="0")]
Alpha = Annotated[float, typer.Option("--alpha", help="Steepness of the sink mask.")]
Kappa = Annotated[float, typer.Option("--kappa", help="A sink's mass exceeds the mean by so many deviations.")]
ScaleFree = Annotated[bool, typer.Option("--scale-free", help="Divide the mass by its mean first.")]
Dtype = Annotated[
    Optional[str], typer.Option("--dtype", help="float32, bfloat16 or float16.", show_default="float32 on CPU")
]


def sinks(
    checkpoint: Source,
    out: Out,
    text: Text = None,
    prompt: Prompt = None,
    trajectory: Trajectory = None,
    against: Against = None,
    windows: Windows = None,
    length: Length = None,
    gen_length: GenLength = None,
    levels: Levels = None,
    steps: Steps = None,
    block_length: Blocks = None,
    seed: Seed = None,
    alpha: Alpha = 5.0,
    kappa: Kappa = 2.0,
    scale_free: ScaleFree = False,
    device: Device = None,
    dtype: Dtype = None,
    mask_id: MaskId = None,
    allow_pickle: Pickle = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Arguments only: what contradicts itself is refused by the run."""
    from structprune.config import Config
    from structprune.runs.sinks import SinkRun, sinks_and_show

    chosen = Config.load(overrides={"sink.alpha": alpha, "sink.kappa": kappa, "sink.scale_free": scale_free}).sink
    run = SinkRun(text, prompt, trajectory, windows, length, gen_length, levels, steps, block_length, seed, chosen)
    sinks_and_show(checkpoint, out, run, against, device, dtype, mask_id, allow_pickle, overwrite)
