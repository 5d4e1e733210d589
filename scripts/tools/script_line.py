"""The command line of scripts: bad input is one line and exit code 2; results are files that appear whole."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from structprune.checkpoint.output import check_place
from structprune.cli.console import show
from structprune.errors import UserError
from structprune.files import write_whole

BUSY = 0.5  # load average above which times mean little


class OneLineParser(argparse.ArgumentParser):
    """Shows its module's docstring as help; what argparse refuses is a UserError."""

    def __init__(self, description: str | None, add_help: bool = True):
        plain = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, add_help=add_help, formatter_class=plain)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")

    def add_counts(self, counts: dict[str, int]) -> None:
        """Options that take a whole number, with their defaults."""
        for name, value in counts.items():
            self.add_argument(flag(name), type=int, default=value, help="default %(default)s")

    def add_quick(self) -> None:
        self.add_argument(
            "--quick", action="store_true", help="tiny default sizes; nothing is written unless --out is given"
        )

    def add_device(self, default: str | None = None) -> None:
        shown = default or "cuda if available, else cpu"
        self.add_argument("--device", default=default, help=f"cpu or cuda[:N] (default: {shown})")


def flag(name: str) -> str:
    """An option from its name in code."""
    return "--" + name.replace("_", "-")


def check_counts(options: argparse.Namespace, names: Iterable[str], least: int = 1) -> None:
    """Refuse counts below `least`; None, for an option that was not given, passes.

    Raises:
        UserError: a count that is too small.
    """
    for name in names:
        value = getattr(options, name.replace("-", "_"))
        if value is not None and value < least:
            raise UserError(f"{flag(name)} = {value}: give at least {least}")


def parse_counts(
    about: str | None, counts: dict[str, tuple[int, str]], out: str, arguments: list[str] | None
) -> argparse.Namespace:
    """The options of a script that takes whole numbers, and `--out` for its result.

    Args:
        about: the module's docstring, of which the first line is shown.
        counts: name -> default and meaning. out: the default of --out.
    Raises:
        UserError: a number below 1.
    """
    parser = OneLineParser((about or "").splitlines()[0])
    for name, (value, text) in counts.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default %(default)s)")
    parser.add_argument("--out", type=result_file, default=Path(out), help="default %(default)s")
    options = parser.parse_args(arguments)
    check_counts(options, counts)
    return options


def parse_names(option: str, text: str, known: Iterable[str]) -> list[str]:
    """Names separated by commas.

    Raises:
        UserError: a name that is not among `known`.
    """
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{option} '{unknown[0]}': give {', '.join(known)}")
    return names


def parse_numbers(option: str, text: str, kind: type = int) -> list:
    """Numbers separated by commas.

    Raises:
        UserError: something else.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        example = "1,8" if kind is int else "0.3,0.5"
        raise UserError(f"{option} '{text}' is not a list of numbers: write {option} {example}") from error


def first_read(arguments: list[str] | None, name: str, **option: Any) -> Any:
    """The value of one option, on which the defaults of others depend.

    Args:
        arguments: of the command line; None for those of the process.
        name: of the option, without dashes.
        option: how it is read, as `add_argument` takes it.
    Raises:
        UserError: its value is missing.
    """
    first = OneLineParser(None, add_help=False)
    first.add_argument(f"--{name}", **option)
    return getattr(first.parse_known_args(arguments)[0], name)


def result_file(text: str) -> Path:
    """The file that --out names, an argparse type; its place is tried before any work."""
    path = Path(text)
    try:
        check_place(path)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"'{path}' is a directory: name a file")
    return path


def is_quick(arguments: list[str] | None) -> bool:
    """Whether --quick is among the arguments (None: those of the process)."""
    return first_read(arguments, "quick", action="store_true")


def one_line(name: str, work: Callable[[], object]) -> int:
    """Exit code of `work`: 0, the code it returns, or 2 with one line for what the user can mend."""
    try:
        code = work()
    except (UserError, OSError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


def write_result(path: Path, values: dict) -> None:
    """Plain values as JSON, completely or not at all."""
    write_whole(path, (json.dumps(values, indent=1) + "\n").encode())


def show_result(*parts: RenderableType, out: Path | None = None, width: int | None = None) -> None:
    """Print tables and lines, and where the result was written.

    Args:
        width: columns, unless stdout is a terminal.
    """
    parts = parts if out is None else (*parts, f"Wrote {out}")
    show(*parts, console=Console(width=None if sys.stdout.isatty() else width))


def warn_if_busy(name: str) -> float:
    """The machine's load average; a warning on stderr if it is too high for timing."""
    load = os.getloadavg()[0]
    if load > BUSY:
        print(f"{name}: the machine is busy (load {load:.1f}), so the times mean little", file=sys.stderr)
    return load


def run_json(command: list, failure: str, remedy: str, **options: Any) -> Any:
    """The JSON on the last line that a command prints.

    Raises:
        UserError: it failed; named by `failure`, the last line of its stderr and the remedy.
    """
    process = subprocess.run(command, capture_output=True, text=True, **options)
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{failure} ({last}): {remedy}")
    return json.loads(process.stdout.strip().splitlines()[-1])
