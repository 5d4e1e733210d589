"""Arguments that several verbs share."""

from pathlib import Path
from typing import Annotated, Optional

import typer

Checkpoint = Annotated[str, typer.Argument(help="Checkpoint directory, or Hub id such as GSAI-ML/LLaDA-8B-Base.")]
ConfigFile = Annotated[
    Optional[Path], typer.Option("--config", help="YAML file; see configs/.", show_default="defaults")
]
Ratio = Annotated[Optional[float], typer.Option("--ratio", help="Share of the block projections to remove, in [0, 1).")]
Method = Annotated[
    Optional[str],
    typer.Option(
        "--method",
        help="structured (smaller and dense), unstructured or nm (zeros in place).",
        show_default="structured",
    ),
]
Pattern = Annotated[
    Optional[str],
    typer.Option("--nm", metavar="N:M", help="For --method nm: N of every M inputs go.", show_default="2:4"),
]
Sets = Annotated[
    Optional[list[str]],
    typer.Option("--set", metavar="KEY=VALUE", help="Override any config key: calibration.windows=64. Repeatable."),
]
Out = Annotated[Path, typer.Option("--out", help="Directory to write; appears complete or not at all.")]
CalibrationText = Annotated[
    Optional[str],
    typer.Option(
        "--calibration",
        help="wikitext2, c4, a Hub dataset, a .txt/.jsonl/.parquet file, or a calibration.safetensors.",
    ),
]
PlanFile = Annotated[Optional[Path], typer.Option("--plan", help="Apply this plan.json instead of scoring.")]
Device = Annotated[Optional[str], typer.Option("--device", help="cpu or cuda[:N].", show_default="cuda if there")]
MaskId = Annotated[Optional[int], typer.Option("--mask-id", help="Mask token id, where the checkpoint names none.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Also read .bin shards (weights only).")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output once the new one is complete.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
