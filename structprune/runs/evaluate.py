"""An evaluation run: checkpoints x tasks -> rows per item, kept chunk by chunk, summarised and compared."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from structprune.errors import UserError
from structprune.evaluation.labels import safe_names
from structprune.evaluation.lm_tasks import LmTask
from structprune.evaluation.result_files import (
    Results,
    ResultStore,
    clear_results,
    goes_on,
    read_results,
    setting_differences,
)
from structprune.evaluation.result_io import json_text, plain_os_errors
from structprune.evaluation.results import Row
from structprune.evaluation.settings import EvaluationConfig
from structprune.evaluation.summary import summarise
from structprune.evaluation.units import Unit
from structprune.evaluation.workers import Workers
from structprune.files import write_whole
from structprune.models.checkpoint_files import locate
from structprune.models.encode import Batches
from structprune.models.fingerprint import fingerprint
from structprune.models.loading import load_model
from structprune.models.placement import compute_device, give_back_memory, pick_device
from structprune.progress import Track, untracked
from structprune.runs.evaluation_request import Subject, prepare

COMPARISON = "against.json"
ALONE = Workers()


@dataclass(frozen=True)
class Evaluation:
    """What a run found.

    Attributes:
        results: of its own checkpoints, as they are on disk.
        summary: of them, and of the earlier run it was compared with.
        warnings: a line each.
    """

    results: Results
    summary: dict
    warnings: tuple[str, ...]


def evaluate(
    checkpoints: Sequence[str],
    config: EvaluationConfig,
    out: str | Path,
    against: str | Path | None = None,
    overwrite: bool = False,
    track: Track = untracked,
    workers: Workers = ALONE,
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation | None:
    """Evaluate checkpoints one after the other, the first being what the others are compared with.

    What is done is kept in `out`: the same call goes on where an earlier one ended, however it ended.

    Args:
        checkpoints: directories or Hub ids.
        against: the directory of an earlier run, whose first checkpoint all are compared with instead.
        overwrite: forget what `out` holds, unless it is this very run, unfinished.
        track: wraps iterations that take long, `track(items, title)`.
        workers: this process's place among several; all make the same call.
        say: is told warnings, as soon as they are known.
    Returns:
        What was found; None in processes other than the first.
    Raises:
        UserError: anything the user can mend, before any weight is read where it can be known then.
    """
    earlier = None if against is None else read_results(against)
    subjects = prepare(checkpoints, config)
    device = pick_device(config.model.device or workers.device)
    settings = _settings(subjects, config, device)
    warnings = _warnings(subjects, settings, earlier)
    for line in warnings:
        say(line)
    workers.agree(_clear(out, settings) if overwrite and workers.main else None)
    store = ResultStore(out, settings, workers.rank)
    try:
        if not store.finished:
            for subject in subjects:
                with _memory_errors(subject):
                    _run(subject, config, device, store, track, workers)
        workers.wait()
        if not workers.main:
            return None
        items = {subject.label: {unit.task: unit.keys for unit in subject.units} for subject in subjects}
        results = store.finish(items, lambda rows: summarise(rows, seed=config.evaluation.seed))
    finally:
        store.close()
    summary = results.summary if earlier is None else _compare(results, earlier, config.evaluation.seed)
    return Evaluation(results, summary, warnings)


def _clear(out: str | Path, settings: dict) -> UserError | None:
    """Remove earlier results, unless these settings' are unfinished; what is wrong, for all processes to hear."""
    try:
        if not goes_on(out, settings):
            clear_results(out)
    except UserError as error:
        return error
    except OSError as error:  # a UserError too, for the others must not wait for a process that is gone
        return UserError(f"output '{out}' cannot be cleared ({error}): remove it, or choose another --out")
    return None


def _settings(subjects: Sequence[Subject], config: EvaluationConfig, device: torch.device) -> dict:
    """What the numbers depend on."""
    allow_pickle = config.model.allow_pickle
    directories = [locate(subject.checkpoint, allow_pickle=allow_pickle) for subject in subjects]
    dtype = config.model.dtype or ("float32" if device.type == "cpu" else "stored")
    settings = {
        "checkpoints": {
            subject.label: {"content": fingerprint(directory, allow_pickle), "mask_id": subject.config.mask_token_id}
            for subject, directory in zip(subjects, directories)
        },
        "dtype": dtype,
        "seed": config.evaluation.seed,
        "chat": config.evaluation.chat,
        "tasks": {subject.label: {unit.task: unit.settings for unit in subject.units} for subject in subjects},
    }
    members = [task for subject in subjects for unit in subject.units for task in getattr(unit, "members", ())]
    if any(isinstance(task, LmTask) for task in members):
        from lm_eval import __version__

        settings["lm_eval"] = __version__
    return settings


def _warnings(subjects: Sequence[Subject], settings: dict, earlier: Results | None) -> tuple[str, ...]:
    """Of the checkpoints, and of an earlier run that was made otherwise."""
    found = [line for subject in subjects for line in subject.warnings]
    if earlier is None:
        return tuple(found)
    own = next(iter(settings["tasks"].values()))
    theirs = next(iter(earlier.settings["tasks"].values()))
    shared = [task for task in own if task in theirs]
    if not shared:
        raise UserError(f"the run in '{earlier.directory}' has none of these tasks: {', '.join(theirs)} were evaluated")
    for name in ("dtype", "seed", "chat", "lm_eval"):
        if (before := earlier.settings.get(name)) != (now := settings.get(name)):
            found.append(f"'{earlier.directory}' was made otherwise: {name} was {before} and is {now}")
    for task in shared:
        plain = [{**values[task], "items": None} for values in (theirs, own)]  # another --limit is no other estimate
        found += [
            f"{task} was evaluated otherwise in '{earlier.directory}': {line}" for line in setting_differences(*plain)
        ]
    return tuple(found)


def _run(
    subject: Subject,
    config: EvaluationConfig,
    device: torch.device,
    store: ResultStore,
    track: Track,
    workers: Workers,
) -> None:
    """This process's chunks of one checkpoint; its weights are read only where some are left."""
    left: list[tuple[Unit, list[tuple[int, tuple[int, ...]]]]] = []
    for offset, unit in enumerate(subject.units):
        done = store.done(subject.label, unit.task)
        mine = [(n, chosen) for n, chosen in enumerate(unit.chunks()) if n not in done and workers.mine(n + offset)]
        if mine:
            left.append((unit, mine))
    if not left:
        return
    settings = config.model
    model = load_model(subject.checkpoint, settings.dtype, device, settings.mask_id, settings.allow_pickle)
    asked = config.evaluation.batch
    batch = Batches.automatic(compute_device(model)) if asked is None else Batches(asked)
    for unit, mine in left:
        for number, chosen in track(mine, f"{subject.label}, {unit.task}"):
            store.add(subject.label, unit.task, number, unit.run(model, chosen, batch))
    del model
    give_back_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def _memory_errors(subject: Subject) -> Iterator[None]:
    """Running out of memory where no smaller batch helps is a UserError."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(
            f"'{subject.checkpoint}' does not fit the memory: lower evaluation.prompts (of generation), set"
            " model.dtype=bfloat16, or use another --device"
        ) from error


def _compare(results: Results, earlier: Results, seed: int) -> dict:
    """A summary of both runs, the earlier one first; also written as against.json."""
    rows: dict[str, dict[str, list[Row]]] = {}
    labels = [*(f"{earlier.directory.resolve().name}/{label}" for label in earlier.rows), *results.rows]
    for label, tasks in zip(safe_names(labels).values(), [*earlier.rows.values(), *results.rows.values()]):
        rows[label] = tasks
    summary = summarise(rows, seed=seed)
    with plain_os_errors(results.directory):
        values = {"settings": {"earlier": earlier.settings, "own": results.settings}, "summary": summary}
        write_whole(results.directory / COMPARISON, json_text(values))
    return summary
