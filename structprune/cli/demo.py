"""`structprune demo`."""

from pathlib import Path
from typing import Annotated

import typer

from structprune.cli.options import Debug, Overwrite


def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory for the models, demo.json and nelbo.png.")] = Path(
        "structprune-demo"
    ),
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Prune the small trained model that comes with the package; needs no network and no GPU. About 2 minutes."""
    from structprune.cli.show import demo_and_show

    demo_and_show(out, overwrite)
