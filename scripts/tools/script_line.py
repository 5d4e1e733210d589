"""The command line of scripts: bad input is one line and exit code 2; results are files that appear whole."""

import argparse
import json
import sys
from pathlib import Path
from typing import Callable

from structprune.checkpoint.output import check_place
from structprune.errors import UserError
from structprune.files import write_whole


class OneLineParser(argparse.ArgumentParser):
    """Shows its module's docstring as help; what argparse finds wrong is a UserError."""

    def __init__(self, description: str | None, add_help: bool = True):
        plain = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, add_help=add_help, formatter_class=plain)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def first_read(arguments: list[str] | None, name: str, **option) -> object:
    """What one option will be, which the defaults of others hang on.

    Args:
        arguments: of the command line; None for those of the process.
        name: the option's, without dashes.
        option: how it is read, as `add_argument` takes it.
    Raises:
        UserError: it lacks its value.
    """
    first = OneLineParser(None, add_help=False)
    first.add_argument(f"--{name}", **option)
    return getattr(first.parse_known_args(arguments)[0], name)


def result_file(text: str) -> Path:
    """What --out names, an argparse type: a file, whose place is tried before any work."""
    path = Path(text)
    try:
        check_place(path)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"'{path}' is a directory: name a file")
    return path


def is_quick(arguments: list[str] | None) -> bool:
    """Whether --quick is among the arguments (None: of the process)."""
    return first_read(arguments, "quick", action="store_true")


def one_line(name: str, work: Callable[[], object]) -> int:
    """Exit code of `work`: 0, what it returns, or 2 with one line for what the user can mend."""
    try:
        code = work()
    except (UserError, OSError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


def write_result(path: Path, values: dict) -> None:
    """Plain values as JSON, whole or not at all."""
    write_whole(path, (json.dumps(values, indent=1) + "\n").encode())
