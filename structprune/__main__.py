"""`python -m structprune`."""

from structprune.cli import run

run()
