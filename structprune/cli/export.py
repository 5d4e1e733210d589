"""`structprune export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from structprune.cli.options import Checkpoint, Debug, DryRun, MaskId, Overwrite, Pickle, without_dots
from structprune.errors import UserError

if TYPE_CHECKING:
    from structprune.runs.export import ExportRequest

OutDirectory = Annotated[
    Path | None,
    typer.Option(
        callback=lambda path: None if path is None else without_dots(path),
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
Gguf = Annotated[
    Path | None,
    typer.Option(
        callback=lambda path: None if path is None else without_dots(path), metavar="FILE",
        help="File to write for llama.cpp.",
    ),
]  # fmt: skip
GgufPre = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="How llama.cpp splits text: its tokenizer.ggml.pre.", show_default="found out"),
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
    gguf: Gguf = None,
    dtype: ExportDtype = None,
    gguf_pre: GgufPre = None,
    push: Push = None,
    private: Private = False,
    dry_run: DryRun = False,
    mask_id: MaskId = None,
    allow_pickle: Pickle = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Options that say nothing of what is written are refused."""
    from structprune.config import ModelSettings
    from structprune.runs.export import ExportRequest

    if out is None and gguf is None and push is None:
        raise UserError("nothing to write: give --out DIR, --gguf FILE or --push REPO")
    for name, value, needs, other in (
        ("--compat", compat, out, "--out DIR"),
        ("--gguf-pre", gguf_pre, gguf, "--gguf FILE"),
        ("--private", private or None, push, "--push REPO"),
        ("--dtype", dtype, out or gguf, "--out DIR or --gguf FILE"),
    ):
        if value is not None and needs is None:
            raise UserError(f"{name} is for {other}: add it, or leave {name} out")
    model = ModelSettings(mask_id=mask_id, allow_pickle=allow_pickle)
    request = ExportRequest(checkpoint, out, compat or "free", gguf, gguf_pre, dtype, overwrite, model)
    _export_and_show(request, push, private, dry_run)


def _export_and_show(request: "ExportRequest", push: str | None, private: bool, dry_run: bool) -> None:
    from structprune.cli.console import show
    from structprune.cli.pruned import NOTHING
    from structprune.report.export_lines import exported_lines, plan_lines
    from structprune.runs.export import checked_export, export_checkpoint, plan_facts
    from structprune.runs.push import check_push, push_directory

    if push is not None:
        check_push(push, request.out or Path(request.source), contacts=not dry_run)
    if dry_run:
        show(*plan_lines(plan_facts(request, checked_export(request))), NOTHING)
        return
    if request.out is not None or request.gguf is not None:
        show(*exported_lines(export_checkpoint(request).facts))
    if push is not None:
        url = push_directory(request.out or Path(request.source), push, private)
        show(f"Uploaded to {url}")
