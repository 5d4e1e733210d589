"""`structprune recover`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from structprune.cli.options import (
    BlockSize,
    Checkpoint,
    Debug,
    Device,
    DryRun,
    MaskId,
    Out,
    Overwrite,
    Pickle,
    without_dots,
)

if TYPE_CHECKING:
    from structprune.recovery.settings import RecoverConfig

    Request = tuple[str, str, Path, RecoverConfig, bool]  # checkpoint, teacher, output, configuration, overwrite

Teacher = Annotated[str, typer.Option(metavar="CHECKPOINT", help="The dense checkpoint that it was pruned from.")]
Data = Annotated[
    str | None,
    typer.Option(help="Text to learn: wikitext2, c4, a Hub dataset, or a .txt, .jsonl or .parquet file."),
]
Tokens = Annotated[int | None, typer.Option(help="Tokens to learn from, repeats counted.", show_default="1000000")]
TeacherCache = Annotated[
    Path | None,
    typer.Option(
        callback=without_dots,
        help="Directory for the teacher's predictions, written once: later runs on the same text need no dense passes.",
        show_default="none; the teacher predicts on the way",
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(help="YAML file of settings; see configs/recover/.", show_default="built-in defaults"),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a configuration key: train.method=full. Repeatable."),
]


def recover(
    checkpoint: Checkpoint,
    teacher: Teacher,
    out: Out,
    data: Data = None,
    tokens: Tokens = None,
    teacher_cache: TeacherCache = None,
    config: ConfigFile = None,
    sets: Sets = None,
    dry_run: DryRun = False,
    device: Device = None,
    mask_id: MaskId = None,
    block_size: BlockSize = None,
    allow_pickle: Pickle = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Options with a name of their own override --set and --config."""
    from structprune.recovery.settings import RecoverConfig

    named = {
        "data.source": data,
        "train.tokens": tokens,
        "teacher.cache": None if teacher_cache is None else str(teacher_cache),
        "model.device": device,
        "model.mask_id": mask_id,
        "model.block_size": block_size,
        "model.allow_pickle": allow_pickle or None,
    }
    work = _show_plan if dry_run else _recover_and_show
    work((checkpoint, teacher, out, RecoverConfig.with_options(config, sets, named), overwrite))


def _show_plan(request: "Request") -> None:
    """What the training would take; of several processes, which check as for a run, the first shows it."""
    from structprune.cli.console import show
    from structprune.cli.pruned import NOTHING
    from structprune.progress import untracked
    from structprune.report.recover_table import plan_lines
    from structprune.runs.evaluate import Session
    from structprune.runs.recover import checked
    from structprune.workers import workers

    with workers(reduces=True) as place:
        lines = plan_lines(checked(*request, Session(untracked, place)).plan())
        show(*([*lines, NOTHING] if place.main else []))


def _recover_and_show(request: "Request") -> None:
    """Progress and warnings go to stderr, the table to stdout; of several processes, the first shows them.

    Args:
        request: the first arguments of `structprune.runs.recover.recover`.
    """
    from structprune.cli.console import progress_of, show, warner
    from structprune.cli.work import stopping
    from structprune.models.denormals import flushed_denormals
    from structprune.recovery.cache import begun
    from structprune.recovery.folder import has_learnt, training_folder
    from structprune.report.recover_table import no_gain, recover_table
    from structprune.runs.evaluate import Session
    from structprune.runs.recover import Recovered
    from structprune.runs.recover import recover as run
    from structprune.workers import workers

    out, cache, results = request[2], request[3].teacher.cache, list[Recovered]()

    def kept() -> str:
        folder = training_folder(out)
        places = [*([folder] if has_learnt(folder) else []), *begun(None if cache is None else Path(cache))]
        next_time = "begins anew, as --overwrite says" if request[4] else "goes on"
        names = " and ".join(map(str, places))
        return f"what is learnt is kept in {names}: the same command {next_time}" if places else ""

    main = False
    try:
        with (
            flushed_denormals(),  # the first: worker threads keep what they begin with
            workers(reduces=True) as place,
            progress_of(place) as track,
            stopping(kept, lambda: [out]) as stopper,
        ):
            main = place.main
            results.append(run(*request, Session(track, place, warner(main), stopper.watch)))
    finally:  # also where a signal came while the output was written
        for recovered in results if main else ():
            show(recover_table(recovered.report))
            show(*no_gain(recovered.report, "of the input"))
            show(f"Wrote {out} (model, report.json, README.md)")
