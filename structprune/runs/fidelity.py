"""Fidelity in an evaluation: which checkpoint is the reference, whether others compare, and where its files lie."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from structprune.errors import UserError
from structprune.evaluation.continuations import ContinuationUnit
from structprune.evaluation.fidelity import check_one_vocabulary
from structprune.evaluation.fidelity_units import FidelityUnit, Run
from structprune.evaluation.prediction_files import PredictionFiles
from structprune.evaluation.result_files import Results, ResultStore
from structprune.evaluation.results import DAMAGED, Continuation, Row
from structprune.evaluation.units import digest
from structprune.runs.evaluation_request import Subject


def comparable(subjects: Sequence[Subject], earlier: Results | None) -> list[Subject]:
    """Subjects whose predictions can be compared with a reference's, with the units that this run has weights for.

    The reference is the first subject, or the first checkpoint of an earlier run, which was measured on the same noise.

    Raises:
        UserError: predictions that cannot be compared, or an earlier run that does not keep what is compared.
    """
    _check_alike(subjects)
    if earlier is None:
        return list(subjects)
    _check_predictions(subjects[0], earlier)
    _check_continuations(subjects[0], earlier)
    units = [tuple(unit for unit in subject.units if not unit.by_reference) for subject in subjects]
    return [replace(subject, units=each) for subject, each in zip(subjects, units, strict=True)]


def bound(subjects: Sequence[Subject], store: ResultStore, earlier: Results | None) -> list[Subject]:
    """Subjects whose units know what the reference has left, and where to leave it."""

    def reference_rows(task: str) -> Mapping[str, Row]:
        return store.rows(subjects[0].label, task) if earlier is None else _first_rows(earlier, task)

    files = PredictionFiles(store.directory if earlier is None else earlier.directory)
    subjects = list(subjects)
    for index, subject in enumerate(subjects):
        run = Run(files, earlier is None and index == 0, reference_rows, partial(store.rows, subject.label))
        subjects[index] = replace(subject, units=tuple(unit.bound(run) for unit in subject.units))
    return subjects


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


def _check_predictions(subject: Subject, earlier: Results) -> None:
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


def _check_continuations(subject: Subject, earlier: Results) -> None:
    """Raise UserError unless an earlier run continued the same openings in the same way."""
    units = [unit for unit in subject.units if isinstance(unit, ContinuationUnit)]
    for unit in units:
        tasks = earlier.settings["tasks"]  # checked when it was read
        before = tasks.get(next(iter(earlier.rows)), {}).get(unit.task, {})
        rows = _first_rows(earlier, unit.task)
        lengths = {len(row.tokens) for key in unit.keys if isinstance(row := rows.get(key), Continuation)}
        same = before | {"items": None} == unit.settings | {"items": None}  # fewer openings than there are will do
        if not same or not rows.keys() >= set(unit.keys) or lengths != {unit.tokens}:
            was = ", ".join(f"{name} {value}" for name, value in before.items() if name != "items") or "none"
            raise UserError(
                f"the run in '{earlier.directory}' continued other openings ({was}): give its"
                " evaluation.fidelity_prompts, fidelity_opening, fidelity_tokens and fidelity_steps, or"
                " evaluation.fidelity_prompts=0"
            )


def _first_rows(earlier: Results, task: str) -> dict[str, Row]:
    """The rows of an earlier run's first checkpoint, by key."""
    first = next(iter(earlier.rows.values()))
    return {row.key: row for row in first.get(task, ())}


def _unit(subject: Subject) -> FidelityUnit:
    return next(unit for unit in subject.units if isinstance(unit, FidelityUnit))


def _vocabulary(subject: Subject) -> int:
    return getattr(subject.config, subject.family.keys["vocabulary"])
