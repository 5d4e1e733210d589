"""`structprune demo`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from structprune.cli.options import Debug, Overwrite, without_dots

Results = Annotated[
    Path, typer.Option("--out", callback=without_dots, help="Output directory for the models, demo.json and nelbo.png.")
]


Recover = Annotated[
    bool, typer.Option("--recover", help="Also train the model pruned at 0.5 back on the package's own text.")
]


def demo(
    out: Results = Path("structprune-demo"),
    recover: Recover = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Prune the small trained model that is part of the package. Takes about 2 minutes, without network or GPU."""
    from structprune.cli.console import progress_bars, show
    from structprune.models.denormals import flushed_denormals
    from structprune.report.demo_tables import demo_table
    from structprune.runs.demo import run_demo

    with flushed_denormals() if recover else nullcontext(), progress_bars() as track:
        result = run_demo(out, overwrite, track, recover)
    example = next(path for path in result.paths if path.is_dir())
    show(
        demo_table(result.rows, result.dense),
        "Wrote " + ", ".join(map(str, result.paths)),
        f"Load one anywhere: AutoModelForCausalLM.from_pretrained('{example}', trust_remote_code=True)",
    )
