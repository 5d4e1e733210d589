"""What studies of trainings share: the text a training learns from, and how many tokens of it."""

from pathlib import Path
from typing import NamedTuple

from scripts.studies.studies import Study, parse_options, run_study, study_parser
from scripts.tools.script_line import check_counts
from structprune.assets import text_file
from structprune.errors import UserError

TOKENS = 150_000


class Corpus(NamedTuple):
    """Text to learn from.

    Attributes:
        path: its file. tokens: to learn, repeats counted.
    """

    path: Path
    tokens: int


def run_training_study(
    study: Study, arguments: list[str] | None, train: dict, meaning: str, defaults: dict | None = None
) -> None:
    """Run, resume or summarise a study whose measurements take a `Corpus` after windows and length.

    Args:
        train: keys of every training. meaning: whose tokens they are. defaults: of options, where they differ.
    """
    parser = study_parser(study)
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"{meaning} (default %(default)s)")
    text = "to learn (default: the package's calibration text)"
    parser.add_argument("--text", type=Path, default=text_file("calibration.txt"), help=text)
    parser.set_defaults(**{"windows": 96, "jobs": 1} | (defaults or {}))
    options = parse_options(parser, arguments)
    check_counts(options, {"tokens"})
    if not options.text.is_file():
        raise UserError(f"--text = '{options.text}' is no file")
    given = (options.windows, options.length, Corpus(options.text, options.tokens))
    run_study(study, options, given, {"tokens": options.tokens, "text": options.text.name, "train": train})
