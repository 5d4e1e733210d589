"""`structprune export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from structprune.cli.options import BlockSize, Checkpoint, Debug, DryRun, MaskId, Overwrite, Pickle, without_dots
from structprune.errors import UserError

if TYPE_CHECKING:
    from structprune.runs.export import ExportRequest

OutDirectory = Annotated[
    Path | None,
    typer.Option(
        callback=without_dots,
        help="Directory to write. It appears complete or not at all.",
    ),
]
Compat = Annotated[
    str | None,
    typer.Option(
        help="Of --out: official (the family's own code loads it), uniform (its keys and a head size) or free.",
        show_default="free",
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="Of masked weights in --out: compressed-tensors, packed for transformers 4.51 to 4.57.",
        show_default="plain zeros",
    ),
]
Gguf = Annotated[
    Path | None,
    typer.Option(
        callback=without_dots, metavar="FILE",
        help="File to write for llama.cpp.",
    ),
]  # fmt: skip
GgufPre = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How llama.cpp splits text (tokenizer.ggml.pre); a name given is not checked.",
        show_default="by what the tokenizer does",
    ),
]
ExportDtype = Annotated[
    str | None,
    typer.Option(help="Of the weights: f32, f16, bf16, for --gguf also q8_0.", show_default="the checkpoint's own"),
]
Push = Annotated[str | None, typer.Option(metavar="REPO", help="Upload --out, or the checkpoint as it is, to the Hub.")]
Private = Annotated[bool, typer.Option("--private", help="Where --push makes a new repository, make it private.")]


def export(
    checkpoint: Checkpoint,
    out: OutDirectory = None,
    compat: Compat = None,
    packed: Format = None,
    gguf: Gguf = None,
    dtype: ExportDtype = None,
    gguf_pre: GgufPre = None,
    push: Push = None,
    private: Private = False,
    dry_run: DryRun = False,
    mask_id: MaskId = None,
    block_size: BlockSize = None,
    allow_pickle: Pickle = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Refuses options that have no effect on what is asked for."""
    from structprune.config import ModelSettings
    from structprune.runs.export import ExportRequest

    if out is None and gguf is None and push is None:
        raise UserError("nothing to write: give --out DIR, --gguf FILE or --push REPO")
    for name, value, needs, other in (
        ("--compat", compat, out, "--out DIR"),
        ("--format", packed, out, "--out DIR"),
        ("--gguf-pre", gguf_pre, gguf, "--gguf FILE"),
        ("--private", private or None, push, "--push REPO"),
        ("--dtype", dtype, out or gguf, "--out DIR or --gguf FILE"),
        ("--overwrite", overwrite or None, out or gguf, "--out DIR or --gguf FILE"),
    ):
        if value is not None and needs is None:
            raise UserError(f"{name} is for {other}: add it, or leave {name} out")
    model = ModelSettings(mask_id=mask_id, block_size=block_size, allow_pickle=allow_pickle)
    request = ExportRequest(
        checkpoint, out, "free" if compat is None else compat, gguf, gguf_pre, dtype, overwrite, model, packed
    )
    _export_and_show(request, push, private, dry_run)


def _export_and_show(request: "ExportRequest", push: str | None, private: bool, dry_run: bool) -> None:
    """The export, then the upload; each says what it made."""
    from structprune.cli.console import progress_bars, show
    from structprune.cli.pruned import NOTHING
    from structprune.report.export_lines import exported_lines, plan_lines
    from structprune.runs.export import checked_export, export_checkpoint, plan_facts
    from structprune.runs.push import check_push

    if push is not None:
        check_push(push, Path(request.source) if request.out is None else None, contacts=not dry_run)
    if dry_run:
        uploads = [f"Would upload {request.out or request.source} to {push}"] if push else []
        show(*plan_lines(plan_facts(request, checked_export(request))), *uploads, NOTHING)
        return
    if request.out is not None or request.gguf is not None:
        with progress_bars() as track:
            exported = export_checkpoint(request, track)
        show(*exported_lines(exported.facts))
    else:
        checked_export(request)
    if push is not None:
        _upload_and_show(request.out or Path(request.source), push, private)


def _upload_and_show(directory: Path, repo: str, private: bool) -> None:
    from structprune.cli.console import show
    from structprune.errors import Interrupted
    from structprune.runs.push import push_directory

    try:
        url, others = push_directory(directory, repo, private)
    except KeyboardInterrupt as error:
        raise Interrupted(f"the upload is not complete, '{directory}' stays: push it again") from error
    left_out = [f"Not uploaded: {', '.join(others)} (no files of a checkpoint)"] if others else []
    show(*left_out, f"Uploaded {directory} to {url}")
