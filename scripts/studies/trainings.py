"""What studies of trainings share: the text a training learns from, how many tokens of it, and what is measured of a
model that was trained."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from scripts.studies.checkpoint_texts import Continued
from scripts.studies.studies import Study, held_out_text, parse_options, run_study, study_parser
from scripts.tools.script_line import check_counts
from structprune.assets import model_directory, text_file
from structprune.errors import UserError
from structprune.models.loading import load_model

TOKENS = 150_000


class Corpus(NamedTuple):
    """Text to learn from.

    Attributes:
        path: its file. tokens: to learn, repeats counted.
    """

    path: Path
    tokens: int


class Yardstick:
    """Held-out text of a seed, and the embedded model's continuations of its openings."""

    def __init__(self, seed: int, windows: int, length: int):
        model = load_model(model_directory(), device="cpu")
        self._seed, self._held_out = seed, held_out_text(model, seed, windows, length)
        self._continued = Continued(model, self._held_out.ids, seed)

    def measure(self, checkpoint: Path) -> dict:
        """The loss of a model per held-out window, and what its generation keeps."""
        model = load_model(checkpoint, device="cpu")
        return {"loss": self._held_out.loss(model), **self._continued.compare(model)}

    def row(self, variant: str, ratios: dict[str, dict]) -> dict:
        """A row of a study: ratio -> what was measured there."""
        dense = {"nelbo": self._held_out.dense.mean, "generated_nelbo": self._continued.dense_nelbo}
        return {"variant": variant, "seed": self._seed, "dense": dense, "ratios": ratios}


@lru_cache(maxsize=1)
def yardstick(seed: int, windows: int, length: int) -> Yardstick:
    """That of a seed, for all its variants."""
    return Yardstick(seed, windows, length)


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
