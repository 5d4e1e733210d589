"""The command line: arguments, printing and exit codes; one file a verb. Nothing else prints."""

from structprune.cli.main import main, run

__all__ = ["main", "run"]
