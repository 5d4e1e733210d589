"""The command line: its verbs and exit codes."""

import os
import signal
import sys
import threading
import traceback
from types import FrameType
from typing import Annotated

import typer

from structprune import __version__
from structprune.assets import help_text
from structprune.cli.bench import bench
from structprune.cli.demo import demo
from structprune.cli.evaluate import evaluate
from structprune.cli.export import export
from structprune.cli.generate import generate
from structprune.cli.inspect import inspect
from structprune.cli.prune import prune
from structprune.cli.recover import recover
from structprune.cli.sinks import sinks
from structprune.errors import Elsewhere, Interrupted, UserError, lacks_memory
from structprune.files import first_line

OUT_OF_MEMORY = {  # verb -> remedy
    "prune": "lower calibration.batch or memory.budget_gb (structprune inspect predicts the peak)",
    "recover": "lower train.pass_windows or data.length, or set train.checkpointing = true",
    "export": "export on a machine that holds the weights, in float32 where --dtype is another than theirs",
    "generate": "lower --gen-length or generation.batch, or give a half-precision --dtype",
    "sinks": "lower --length, --gen-length or --windows, or give a half-precision --dtype",
}
INTERRUPTED = 130  # the shell's code for it, which typer returns too
_signals: list[int] = []  # that ended the command

app = typer.Typer(
    name="structprune",
    help="Prune masked diffusion language models (LLaDA, Dream, A2D, SDAR, Nemotron, LLaDA2) into smaller dense ones.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

app.command(help=help_text("prune"))(prune)
app.command(help=help_text("recover"))(recover)
app.command()(inspect)
app.command(help=help_text("sinks"))(sinks)
app.command()(demo)
app.command(help=help_text("generate"))(generate)
app.command(help=help_text("export"))(export)
app.command("eval", help=help_text("eval"))(evaluate)
app.command(help=help_text("bench"))(bench)


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
        Exit code: 0; 2 for what the user can mend (one line on stderr); 128 plus the signal's number when interrupted
        (130 by Ctrl-C, 143 by SIGTERM); 1 otherwise.
    """
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    _signals.clear()
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):  # a run that is ended from outside also removes its drafts
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup's SIG_IGN stays
                signal.signal(number, _interrupt)
    try:
        code = app(arguments, standalone_mode=False)
        return _interrupted() if code == INTERRUPTED else code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return _interrupted()
    except Interrupted as error:
        return _interrupted(str(error), error.code)
    except BaseException as error:
        if type(error).__name__ == "Abort":
            return _interrupted()
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of the tokenizers library
            raise
        if "--debug" in arguments:
            traceback.print_exc()
        message, code = _explain(error, arguments[0])
        if isinstance(error, Elsewhere) or _repeated():
            return code
        print(f"structprune: error: {_printable(message)}", file=sys.stderr)
        return code


def _repeated() -> bool:
    """Whether another process of several says the same."""
    if "RANK" not in os.environ:  # torch takes a second to import
        return False
    from structprune.workers import repeats

    return repeats()


def _interrupt(number: int, _: FrameType | None) -> None:
    """The handler of signals that end a command as Ctrl-C does."""
    _signals.append(number)
    raise KeyboardInterrupt


def _interrupted(note: str = "nothing was written", code: int = INTERRUPTED) -> int:
    print(f"structprune: interrupted; {note}", file=sys.stderr)
    return 128 + _signals[0] if _signals and code == INTERRUPTED else code


def _printable(message: str) -> str:
    """A message in one line; control characters, which a terminal would obey, as their codes."""
    line = " ".join(message.split())
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)


def _explain(error: BaseException, verb: str) -> tuple[str, int]:
    """One line and an exit code for any exception that a verb raised."""
    if isinstance(error, UserError):
        return str(error), getattr(error, "code", 2)
    if hasattr(error, "format_message"):  # usage errors of typer, whichever click it carries
        return f"{error.format_message()} (see structprune --help)", 2
    if lacks_memory(error):
        return f"out of memory: {OUT_OF_MEMORY.get(verb, 'use a machine with more')}", 1
    name, line = type(error).__name__, first_line(error)
    return f"{name if line == name else f'{name}: {line}'} (--debug shows where)", 1


def run() -> None:
    """Console entry point."""
    sys.exit(main())
