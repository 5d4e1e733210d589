"""`python -m structprune`."""

from structprune.cli.main import run

run()
