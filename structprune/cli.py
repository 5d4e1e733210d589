"""The command line: verbs, arguments and exit codes only."""

import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Annotated, Optional

import typer

from structprune import __version__
from structprune.errors import UserError

OF_TEXT = [f"calibration.{key}" for key in ("windows", "length", "steps", "interval", "subset", "split", "column")]
INTERRUPTED = 130  # the shell's code for it, which typer returns too

app = typer.Typer(
    name="structprune",
    help="Make masked diffusion language models (LLaDA, LLaDA-1.5, MMaDA, Dream) smaller, and dense still.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

PRUNE_HELP = """Prune a checkpoint: remove heads and MLP channels, refit what is left, write a smaller dense model.

With --method unstructured or nm: set single weights to zero, in the checkpoint's own layout.

[bold]Examples[/bold]

structprune prune GSAI-ML/LLaDA-8B-Base --out llada-0.5 --config configs/llada-0.5.yaml

structprune prune ./my-dream --out small --ratio 0.3 --calibration notes.txt --set calibration.length=512

[bold]Keys worth knowing[/bold] (all of them, with defaults: structprune/config.py)

structured.score: obs, wanda, fluctuation, taylor, magnitude

structured.arm (default masked+sink) and reconstruct.arm (default masked): also clean, clean+sink

structured.allocation: global, uniform, depth

structured.split: measured, equal, by-cost, joint, or a number of heads (per block; over all blocks under global)

structured.gqa: query_heads, kv_groups; structured.protect_first, structured.protect_last, structured.round_to

reconstruct.enabled, reconstruct.target: dense, layer; export.compat: free, uniform, official; memory.budget_gb

[bold]For masks[/bold] (--method unstructured or nm; presets of the published choices: configs/published)

structprune prune GSAI-ML/LLaDA-8B-Base --out llada-2of4 --method nm --nm 2:4

masking.score: sparsegpt, wanda, ria, magnitude, sink-wanda, sink-sparsegpt; masking.arm as above (default masked)

masking.order: sequential, one-shot; masking.allocation: uniform, owl, depth; reconstruct.enabled: refit what stays
"""

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


def _settings(config: Path | None, ratio: float | None, sets: list[str] | None, nm: str | None = None, **extra):
    """The run's configuration: file, then --set, then the options that have a name of their own."""
    from structprune.config import Config

    named = {key.replace("__", "."): value for key, value in extra.items()} | {"masking.nm": nm and f"'{nm}'"}
    given = [*(sets or []), *(f"{key}={value}" for key, value in named.items() if value is not None)]
    asked = _named(sets)
    if nm is not None and ratio is None and "masking.ratio" not in asked:
        given.append("masking.ratio=null")  # a preset's ratio is of its own pattern
    if ratio is not None:
        key = f"{'structured' if Config.load(config, given).method == 'structured' else 'masking'}.ratio"
        if key in asked:
            raise UserError(f"--ratio {ratio} and --set {key} both name the ratio: leave one out")
        given.append(f"{key}={ratio}")
    settings = Config.load(config, given)
    if nm is not None and settings.method != "nm":
        raise UserError(f"--nm {nm} means nothing with method {settings.method}: add --method nm, or leave it out")
    _check_method(settings.method, asked)
    return settings


def _named(sets: list[str] | None) -> set[str]:
    """The keys that --set names."""
    return {text.partition("=")[0].strip() for text in sets or []}


def _check_method(method: str, asked: set[str]) -> None:
    """Raise UserError for a key of another method: values that happen to be the default go unnoticed elsewhere."""
    structured = method == "structured"
    other = ("masking.",) if structured else ("structured.", "export.")
    idle = sorted(key for key in asked if key.startswith(other) or (key == "masking.nm" and method != "nm"))
    if idle:
        wanted = "nm" if idle[0] == "masking.nm" else "unstructured or nm" if structured else "structured"
        raise UserError(f"--set {idle[0]} means nothing with method {method}: add --method {wanted}, or leave it out")


@app.command(help=PRUNE_HELP)
def prune(
    checkpoint: Checkpoint,
    out: Out,
    method: Method = None,
    config: ConfigFile = None,
    ratio: Ratio = None,
    nm: Pattern = None,
    sets: Sets = None,
    calibration: CalibrationText = None,
    plan: PlanFile = None,
    device: Device = None,
    mask_id: MaskId = None,
    allow_pickle: Pickle = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Only what contradicts itself on the command line is refused here; the rest by the run itself."""
    from structprune.runs import mask_checkpoint, prune_checkpoint

    extra = {"calibration__source": calibration, "model__device": device, "model__mask_id": mask_id, "method": method}
    settings = _settings(config, ratio, sets, nm, **extra, model__allow_pickle=allow_pickle or None)
    if plan is not None and settings.method != "structured":
        raise UserError(f"--plan removes heads and channels: leave it out, or --method {settings.method}")
    if plan is not None and (ratio is not None or any(text.startswith("structured.") for text in sets or [])):
        raise UserError("--plan says what goes already: leave out --ratio and --set structured.*")
    if idle := [key for key in OF_TEXT if key in _named(sets) and settings.calibration.replays]:
        raise UserError(f"{idle[0]} means nothing for a saved calibration, which is replayed as it is: leave it out")
    if settings.method == "structured":
        prune_checkpoint(checkpoint, out, settings, plan, overwrite)
    else:
        mask_checkpoint(checkpoint, out, settings, overwrite)


@app.command()
def inspect(
    checkpoint: Checkpoint,
    method: Method = None,
    config: ConfigFile = None,
    ratio: Ratio = None,
    nm: Pattern = None,
    sets: Sets = None,
    mask_id: MaskId = None,
    allow_pickle: Pickle = False,
    json_out: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    debug: Debug = False,
) -> None:
    """Dry run: units, parameters, bytes and MACs before and after, and predicted peak memory. Reads no weights."""
    from structprune.runs import inspect_and_show

    extra = {"model__mask_id": mask_id, "model__allow_pickle": allow_pickle or None, "method": method}
    inspect_and_show(checkpoint, _settings(config, ratio, sets, nm, **extra), json_out)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory for the models, demo.json and nelbo.png.")] = Path(
        "structprune-demo"
    ),
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Prune the small trained model that comes with the package; needs no network and no GPU. About 2 minutes."""
    from structprune.runs import demo_and_show

    demo_and_show(out, overwrite)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"structprune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit code: 0, 2 for anything the user can mend (one line on stderr), 130 when interrupted, 1 otherwise.
    """
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):  # so that a run that is ended from outside removes its drafts too
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup's SIG_IGN stays
                signal.signal(number, signal.default_int_handler)
    try:
        code = app(arguments, standalone_mode=False)
        return _interrupted() if code == INTERRUPTED else code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        if type(error).__name__ == "Abort":
            return _interrupted()
        if "--debug" in arguments:
            traceback.print_exc()
        message, code = _explain(error)
        print(f"structprune: error: {' '.join(message.split())}", file=sys.stderr)
        return code


def _interrupted() -> int:
    print("structprune: interrupted; nothing was written", file=sys.stderr)
    return INTERRUPTED


def _explain(error: Exception) -> tuple[str, int]:
    """One line and an exit code for any exception."""
    if isinstance(error, UserError):
        return str(error), 2
    if hasattr(error, "format_message"):  # usage errors of typer, whichever click it carries
        return f"{error.format_message()} (see structprune --help)", 2
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return "out of memory: lower calibration.batch or memory.budget_gb (structprune inspect predicts the peak)", 1
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'} (--debug shows where)", 1


def run() -> None:
    """Console entry point."""
    sys.exit(main())
