"""`structprune eval`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from structprune.cli.options import BlockSize, Checkpoints, Debug, Device, MaskId, Pickle, without_dots
from structprune.errors import Interrupted, UserError

if TYPE_CHECKING:
    from structprune.evaluation.settings import EvaluationConfig


ConfigFile = Annotated[
    Path | None,
    typer.Option(help="YAML file with sections model and evaluation.", show_default="built-in defaults"),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a configuration key: evaluation.samples=32. Repeatable."),
]
Text = Annotated[
    str | None,
    typer.Option(help="Text to measure the NELBO of: .txt, .jsonl, .parquet, wikitext2, c4, or a Hub dataset."),
]
Fidelity = Annotated[
    bool,
    typer.Option("--fidelity", help="Also measure what each keeps of the first one's predictions and generation."),
]
Tasks = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="piqa:FILE, gsm8k:FILE, or tasks of lm-eval; commas between."),
]
Limit = Annotated[int | None, typer.Option(help="The most documents of a task.")]
Adaptive = Annotated[bool, typer.Option("--adaptive", help="Stop sampling a question once its choice is decided.")]
Chat = Annotated[bool, typer.Option("--chat", help="Prompts go through the chat template (Instruct checkpoints).")]
Against = Annotated[Path | None, typer.Option(metavar="DIR", help="Also compare with the results of an earlier run.")]
Forget = Annotated[
    bool,
    typer.Option("--overwrite", help="Remove earlier results in --out (those of the same run only if it is finished)."),
]
Results = Annotated[Path, typer.Option("--out", callback=without_dots, help="Directory of the results.")]


def evaluate(
    checkpoints: Checkpoints,
    text: Text = None,
    fidelity: Fidelity = False,
    tasks: Tasks = None,
    limit: Limit = None,
    adaptive: Adaptive = False,
    chat: Chat = False,
    config: ConfigFile = None,
    sets: Sets = None,
    out: Results = Path("structprune-eval"),
    against: Against = None,
    device: Device = None,
    mask_id: MaskId = None,
    block_size: BlockSize = None,
    allow_pickle: Pickle = False,
    overwrite: Forget = False,
    debug: Debug = False,
) -> None:
    """Options with a name of their own override --set and --config."""
    from structprune.evaluation.settings import EvaluationConfig

    named = {
        "evaluation.source": text,
        "evaluation.fidelity": fidelity or None,
        "evaluation.tasks": None if tasks is None else _split(tasks),
        "evaluation.limit": limit,
        "evaluation.adaptive": adaptive or None,
        "evaluation.chat": chat or None,
        "model.device": device,
        "model.mask_id": mask_id,
        "model.block_size": block_size,
        "model.allow_pickle": allow_pickle or None,
    }
    settings = EvaluationConfig.with_options(config, sets, named)
    _evaluate_and_show(checkpoints, settings, out, against, overwrite)


def _split(tasks: str) -> list[str]:
    """The names between commas.

    Raises:
        UserError: one is empty.
    """
    names = [name.strip() for name in tasks.split(",")]
    if not all(names):
        raise UserError(f"--tasks '{tasks}' has an empty name: write them with single commas between")
    return names


def _evaluate_and_show(
    checkpoints: list[str], config: "EvaluationConfig", out: Path, against: Path | None, overwrite: bool
) -> None:
    """Progress and warnings go to stderr, the table to stdout; of several processes, the first shows them."""
    from rich.markup import escape

    from structprune.cli.console import progress_of, show, warner
    from structprune.report.eval_tables import eval_table
    from structprune.runs.evaluate import Session
    from structprune.runs.evaluate import evaluate as run
    from structprune.workers import workers

    with workers() as place, progress_of(place) as track:
        try:
            evaluation = run(checkpoints, config, out, against, overwrite, Session(track, place, warner(place.main)))
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
