"""Arguments that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer


def without_dots(path: Path | None) -> Path | None:
    """A path to write, where one is given, without `..`, which leads nowhere where what is before it does not exist."""
    from structprune.checkpoint.atomic import output_place

    return output_place(path) if path is not None and ".." in path.parts else path


Checkpoint = Annotated[str, typer.Argument(help="Checkpoint directory, or Hub id such as GSAI-ML/LLaDA-8B-Base.")]
Checkpoints = Annotated[
    list[str], typer.Argument(help="Checkpoint directories or Hub ids; the others are compared with the first.")
]
ConfigFile = Annotated[
    Path | None, typer.Option(help="YAML file of settings; see configs/.", show_default="built-in defaults")
]


def numbers(text: str | None) -> str | None:
    """Numbers with commas between them, such as 0.3,0.5, unchanged."""
    for part in text.split(",") if text is not None else ():
        try:
            float(part)
        except ValueError as error:
            raise typer.BadParameter(f"'{part}' is no number: give 0.5, or several as 0.3,0.5") from error
    return text


Ratio = Annotated[
    str | None,
    typer.Option(
        callback=numbers, metavar="FLOAT", help="Share of the blocks' projection weights to remove, in [0, 1)."
    ),
]
Ratios = Annotated[
    str | None,
    typer.Option(
        callback=numbers,
        metavar="FLOAT[,FLOAT...]",
        help="Share of the blocks' projection weights to remove, in [0, 1). Of several, such as 0.3,0.5, each gets a"
        " directory in --out, and they share the work.",
    ),
]
TargetLatency = Annotated[
    float | None,
    typer.Option(
        metavar="MS",
        help="Most milliseconds of a forward pass, in place of a ratio: a search by times measured on this device.",
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="structured (a smaller dense model), unstructured or nm (zeros, shapes unchanged).",
        show_default="structured",
    ),
]
Pattern = Annotated[
    str | None,
    typer.Option(metavar="N:M", help="For --method nm: N zeros in every M inputs.", show_default="2:4"),
]
Score = Annotated[
    str | None,
    typer.Option(help="How units, or weights of masks, are scored; names below.", show_default="obs; masks: sparsegpt"),
]
Arm = Annotated[
    str | None,
    typer.Option(
        help="The activations that scores read: masked, masked+sink, clean or clean+sink.",
        show_default="masked+sink; masks: masked",
    ),
]
NoRefit = Annotated[bool, typer.Option("--no-refit", help="Leave the remaining weights as they are.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a configuration key: calibration.windows=64. Repeatable."),
]
Out = Annotated[
    Path, typer.Option(callback=without_dots, help="Directory to write. It appears complete or not at all.")
]
CalibrationText = Annotated[
    str | None,
    typer.Option(
        help="Calibration text: wikitext2, c4, a Hub dataset, a .txt, .jsonl or .parquet file, or a saved"
        " calibration.safetensors.",
    ),
]
PlanFile = Annotated[Path | None, typer.Option(help="Apply this plan.json instead of computing scores.")]
Levels = Annotated[
    Path | None,
    typer.Option(
        callback=without_dots,
        help="Directory for the levels of a search (--set search.enabled=true). They stay there: a run that was"
        " killed goes on from them, and other ratios and budgets share them.",
        show_default="a temporary one",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda[:N].", show_default="cuda if available, else cpu")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16.", show_default="float32 on CPU, else the checkpoint's own"),
]
MaskId = Annotated[int | None, typer.Option(help="Mask token id, if the checkpoint does not name one.")]
BlockSize = Annotated[
    int | None,
    typer.Option(help="Tokens of a block, of a block diffusion checkpoint that does not say so (dllm's: 32)."),
]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Also read .bin shards (weights only).")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing output once the new one is complete.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only check, and predict sizes, steps and memory; no weights are read.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
