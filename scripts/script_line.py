"""The command line of scripts: bad input is one line and exit code 2; results are files that appear whole."""

import argparse
import json
import sys
from pathlib import Path
from typing import Callable

from structprune.errors import UserError
from structprune.evaluation.result_io import write_whole


class OneLineParser(argparse.ArgumentParser):
    """Shows its module's docstring as help; what argparse finds wrong is a UserError."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def is_quick(arguments: list[str] | None) -> bool:
    """Whether --quick is among the arguments (None: of the process), which other defaults hang on."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--quick", action="store_true")
    return first.parse_known_args(arguments)[0].quick


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
