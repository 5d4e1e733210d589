"""Fidelity in an evaluation: which checkpoint is the reference, whether others compare, and where its files lie."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from structprune.errors import UserError
from structprune.evaluation.fidelity import check_one_vocabulary
from structprune.evaluation.fidelity_units import FidelityUnit, Run
from structprune.evaluation.prediction_files import PredictionFiles
from structprune.evaluation.result_files import Results
from structprune.evaluation.results import DAMAGED
from structprune.evaluation.units import digest
from structprune.runs.evaluation_request import Subject


def with_reference(subjects: Sequence[Subject], out: Path, earlier: Results | None) -> list[Subject]:
    """Subjects whose units know where the reference's predictions are, or are to be kept.

    The reference is the first subject, or the first checkpoint of an earlier run, which was measured on the same noise.

    Args:
        out: directory of this run's results.
    Raises:
        UserError: predictions that cannot be compared, or an earlier run without them.
    """
    _check_alike(subjects)
    if earlier is not None:
        _check_earlier(subjects[0], earlier)
    files = PredictionFiles(out if earlier is None else earlier.directory)
    bound = []
    for index, subject in enumerate(subjects):
        run = Run(files, is_reference=earlier is None and index == 0)
        bound.append(replace(subject, units=tuple(unit.bound(run) for unit in subject.units)))
    return bound


def reference_content(settings: dict, earlier: Results | None) -> str:
    """The fingerprint of the reference: of this run's first checkpoint, or of the earlier one's.

    Raises:
        UserError: the earlier run does not say it.
    """
    if earlier is None:
        return next(iter(settings["checkpoints"].values()))["content"]
    try:
        return str(earlier.settings["checkpoints"][next(iter(earlier.rows))]["content"])
    except (KeyError, TypeError) as error:
        raise UserError(f"'{earlier.directory}' does not say what its checkpoints were: {DAMAGED}") from error


def _check_alike(subjects: Sequence[Subject]) -> None:
    """Raise UserError for checkpoints whose predictions cannot be compared with the first one's."""
    first, *others = subjects
    theirs = _facts(first)
    for subject in others:
        for name, value in _facts(subject).items():
            if value != theirs[name]:
                raise UserError(
                    f"--fidelity compares predictions over one {name}, but '{subject.checkpoint}' has {value} and"
                    f" '{first.checkpoint}' {theirs[name]}: leave it out, or compare checkpoints of one model"
                )


def _facts(subject: Subject) -> dict[str, Any]:
    """What two checkpoints share where their predictions can be compared."""
    return {
        "family": subject.family.name,
        "vocabulary": _vocabulary(subject),
        "mask id": subject.config.mask_token_id,
        "tokenizer": f"one that makes windows {digest(*_unit(subject).keys)}",
    }


def _check_earlier(subject: Subject, earlier: Results) -> None:
    """Raise UserError unless an earlier run keeps predictions of these windows under this noise."""
    unit, files = _unit(subject), PredictionFiles(earlier.directory)
    missing = sum(not files.has(key) for key in unit.keys)
    if missing:
        raise UserError(
            f"the run in '{earlier.directory}' keeps no predictions of {missing} of {len(unit.keys)} windows: make it"
            " with --fidelity on the same text, evaluation.windows, length and seed"
        )
    kept = files.load(unit.keys[0], unit.noised(0)[0][0])
    check_one_vocabulary(kept.vocabulary, _vocabulary(subject))
    if kept.tokens.shape[1] != min(unit.top, kept.vocabulary):
        raise UserError(
            f"evaluation.fidelity_top = {unit.top}, but the run in '{earlier.directory}' kept {kept.tokens.shape[1]}"
            " tokens of a prediction: give that number"
        )


def _unit(subject: Subject) -> FidelityUnit:
    return next(unit for unit in subject.units if isinstance(unit, FidelityUnit))


def _vocabulary(subject: Subject) -> int:
    return getattr(subject.config, subject.family.keys["vocabulary"])
