"""What `structprune eval` shows: progress on stderr, the table and warnings on stdout."""

import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from structprune.cli.console import progress_bars, show
from structprune.errors import Interrupted
from structprune.evaluation.settings import EvaluationConfig
from structprune.evaluation.workers import workers
from structprune.report.eval_tables import eval_table
from structprune.runs.evaluate import Session, evaluate


def evaluate_and_show(
    checkpoints: list[str], config: EvaluationConfig, out: Path, against: Path | None, overwrite: bool
) -> None:
    """Evaluate, and show progress, table and warnings on the first of several processes.

    Raises:
        UserError: anything the user can mend.
    """
    with workers() as place, progress_bars(Console(stderr=True, quiet=not place.main)) as track:

        def warn(line: str) -> None:
            if place.main:
                print(f"structprune: warning: {line}", file=sys.stderr)

        try:
            evaluation = evaluate(checkpoints, config, out, against, overwrite, Session(track, place, warn))
        except KeyboardInterrupt as error:
            if not out.exists():
                raise
            raise Interrupted(f"what is done is kept in {out}: the same command goes on") from error
    if evaluation is None:
        return
    extra = "" if against is None else ", against.json"
    show(
        eval_table(evaluation.summary, every_metric=True),
        *(f"[bold]Warning:[/bold] {escape(line)}" for line in evaluation.warnings),
        f"Wrote {out} (results.json, items/: a line per item{extra})",
    )
