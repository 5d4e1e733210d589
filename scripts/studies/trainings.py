"""What studies of trainings share: how many tokens a training learns from."""

from scripts.studies.studies import Study, parse_options, run_study, study_parser
from scripts.tools.script_line import check_counts

TOKENS = 200_000


def run_training_study(study: Study, arguments: list[str] | None, train: dict, meaning: str) -> None:
    """Run, resume or summarise a study with `--tokens`, which every measurement takes after windows and length.

    Args:
        train: keys of every training. meaning: whose tokens they are.
    """
    parser = study_parser(study)
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"{meaning} (default %(default)s)")
    parser.set_defaults(windows=96, jobs=1)
    options = parse_options(parser, arguments)
    check_counts(options, {"tokens"})
    given = (options.windows, options.length, options.tokens)
    run_study(study, options, given, {"tokens": options.tokens, "train": train})
