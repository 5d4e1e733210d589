"""An evaluation run: checkpoints x tasks -> rows per item, stored chunk by chunk, summarised and compared."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from structprune.checkpoint.output import check_apart
from structprune.errors import UserError, lacks_memory
from structprune.evaluation.continuations import ContinuationUnit
from structprune.evaluation.labels import safe_names
from structprune.evaluation.result_files import Results, ResultStore, read_results
from structprune.evaluation.result_state import COMPARISON, clear_results, has_rows, is_resumable
from structprune.evaluation.results import json_text, plain_os_errors, setting_differences
from structprune.evaluation.settings import EvaluationConfig
from structprune.evaluation.summary import summarise
from structprune.evaluation.units import GenerationUnit, Unit
from structprune.files import write_whole
from structprune.models.checkpoint_files import locate
from structprune.models.encode import Batches
from structprune.models.fingerprint import fingerprint
from structprune.models.journal import unwatched
from structprune.models.loading import load_model
from structprune.models.placement import compute_device, give_back_memory, pick_device
from structprune.progress import Track, untracked
from structprune.runs.evaluation_request import Subject, prepare, uses_lm_eval
from structprune.runs.fidelity import bound, comparable, reference_content
from structprune.workers import Workers


@dataclass(frozen=True)
class Session:
    """The surroundings of a run: progress, this process's place among several, and `say`, called with each warning.

    Attributes:
        watch: called after every part of a pruning, and after the steps of a training and between its phases; ends the
            run by `Interrupted`, and raises nothing else.
    """

    track: Track = untracked
    workers: Workers = Workers()
    say: Callable[[str], None] = lambda line: None
    watch: Callable[[], None] = unwatched


ALONE = Session()
UNJUDGED = (
    "what continuations cost under the reference is not measured, because its model is not at hand: name its"
    " checkpoint first instead of --against"
)
GENERATING = (GenerationUnit, ContinuationUnit)


@dataclass(frozen=True)
class Evaluation:
    """The results of a run as they are on disk, and the summary of them and of the run they were compared with."""

    results: Results
    summary: dict
    warnings: tuple[str, ...]


def evaluate(
    checkpoints: Sequence[str],
    config: EvaluationConfig,
    out: str | Path,
    against: str | Path | None = None,
    overwrite: bool = False,
    session: Session = ALONE,
) -> Evaluation | None:
    """Evaluate checkpoints one after the other, and compare the others with the first.

    Finished chunks are stored in `out`: the same call continues where an earlier one ended, in whichever way.

    Args:
        checkpoints: directories or Hub ids.
        against: the directory of an earlier run, with whose first checkpoint all are compared instead.
        overwrite: remove earlier results in `out`, unless they are unfinished ones of the same settings.
    Returns:
        The outcome; None in processes other than the first.
    Raises:
        UserError: anything the user can mend, before any weight is read where it is known then.
    """
    workers = session.workers
    earlier = None if against is None else _read_earlier(against, out)
    subjects = prepare(checkpoints, config)
    for subject in subjects:
        check_apart(out, subject.directory)
    if config.evaluation.fidelity:
        subjects = comparable(subjects, earlier)
    device = pick_device(config.model.device or workers.device)
    settings = _settings(subjects, config, device)
    if config.evaluation.fidelity:
        settings["reference"] = reference_content(settings, earlier)
    warnings = _warnings(subjects, settings, earlier)
    for line in warnings:
        session.say(line)
    workers.agree(_clear(out, settings, overwrite) if workers.main else None)
    with ResultStore(out, settings, workers.rank) as store:
        if not store.finished:
            _run_all(bound(subjects, store, earlier), config, device, store, session)
        workers.wait()
        if not workers.main:
            return None
        keys = {subject.label: {unit.task: unit.keys for unit in subject.units} for subject in subjects}
        results = store.finish(keys, lambda rows: summarise(rows, seed=config.evaluation.seed))
    summary = results.summary if earlier is None else _compare(results, earlier, config.evaluation.seed)
    return Evaluation(results, summary, warnings)


def _read_earlier(against: str | Path, out: str | Path) -> Results:
    """The results to compare with, which must not be those that are written."""
    if Path(against).resolve() == Path(out).resolve():
        raise UserError(f"output '{out}' is the earlier run to compare with: choose another --out")
    earlier = read_results(against)
    tasks = earlier.settings.get("tasks")
    tables = list(tasks.values()) if isinstance(tasks, dict) else []
    sound = all(isinstance(each, dict) and all(isinstance(task, dict) for task in each.values()) for each in tables)
    if not tables or not sound or not earlier.rows:
        raise UserError(f"'{against}' holds damaged results: run the command that made them again")
    return earlier


def _clear(out: str | Path, settings: dict, overwrite: bool) -> UserError | None:
    """Remove earlier results, unless they are unfinished ones of these settings; returns an error for all processes.

    Without `overwrite` only what a run has left that ended before it stored anything.
    """
    try:
        if (overwrite or not has_rows(Path(out))) and not is_resumable(out, settings):
            clear_results(out)
    except UserError as error:
        return error
    except OSError as error:  # returned as well, because the other processes must not wait for one that has ended
        return UserError(f"output '{out}' cannot be cleared ({error}): remove it, or choose another --out")
    return None


def _settings(subjects: Sequence[Subject], config: EvaluationConfig, device: torch.device) -> dict:
    """The settings that the numbers depend on."""
    allow_pickle = config.model.allow_pickle
    directories = [locate(subject.checkpoint, allow_pickle=allow_pickle) for subject in subjects]
    settings = {
        "checkpoints": {
            subject.label: {"content": fingerprint(directory, allow_pickle), "mask_id": subject.config.mask_token_id}
            for subject, directory in zip(subjects, directories, strict=True)
        },
        "dtype": config.model.dtype or ("float32" if device.type == "cpu" else "stored"),
        "seed": config.evaluation.seed,
        "chat": config.evaluation.chat,
        "tasks": {subject.label: {unit.task: unit.settings for unit in subject.units} for subject in subjects},
    }
    if uses_lm_eval(unit for subject in subjects for unit in subject.units):
        from lm_eval import __version__

        settings["lm_eval"] = __version__
    return settings


def _warnings(subjects: Sequence[Subject], settings: dict, earlier: Results | None) -> tuple[str, ...]:
    """Warnings of the checkpoints, and about an earlier run of other settings."""
    lines = [line for subject in subjects for line in subject.warnings]
    if earlier is None:
        return tuple(lines)
    if any(isinstance(unit, ContinuationUnit) for subject in subjects for unit in subject.units):
        lines.append(UNJUDGED)
    own = next(iter(settings["tasks"].values()))
    theirs = next(iter(earlier.settings["tasks"].values()))
    shared = [task for task in own if task in theirs]
    if not shared:
        raise UserError(f"the run in '{earlier.directory}' has none of these tasks: {', '.join(theirs)} were evaluated")
    for name in ("dtype", "seed", "chat", "lm_eval"):
        if (before := earlier.settings.get(name)) != (now := settings.get(name)):
            lines.append(f"'{earlier.directory}' was made with other settings: {name} was {before} and is {now}")
    for task in shared:
        before, now = ({**values[task], "items": None} for values in (theirs, own))  # --limit changes no estimate
        lines += [
            f"{task} was evaluated with other settings in '{earlier.directory}': {line}"
            for line in setting_differences(before, now)
        ]
    return tuple(lines)


def _run_all(
    subjects: Sequence[Subject], config: EvaluationConfig, device: torch.device, store: ResultStore, session: Session
) -> None:
    """Run this process's chunks: one checkpoint after the other, and at last what the first's model finds of all."""
    units = [(subject, unit) for subject in subjects for unit in subject.units]
    passes = [(each, [(each.label, unit) for unit in each.units if not unit.by_reference]) for each in subjects]
    passes.append((subjects[0], [(subject.label, unit) for subject, unit in units if unit.by_reference]))
    for index, (subject, labelled) in enumerate(passes):
        if index == len(subjects) and labelled:
            session.workers.wait()  # for the others' chunks, which the last pass reads
        with _memory_errors(subject, config.model.dtype):
            _run(subject, labelled, config, device, store, session)


def _run(
    subject: Subject,
    units: Sequence[tuple[str, Unit]],
    config: EvaluationConfig,
    device: torch.device,
    store: ResultStore,
    session: Session,
) -> None:
    """Run this process's chunks by one model, whose weights are read only if any chunk is missing.

    Args:
        units: each with the label of the checkpoint that its rows are of.
    """
    work: list[tuple[str, Unit, list[tuple[int, tuple[int, ...]]]]] = []
    for offset, (label, unit) in enumerate(units):
        done = store.done(label, unit.task)
        chunks = [(n, chunk) for n, chunk in enumerate(unit.chunks()) if session.workers.mine(n + offset)]
        if missing := [(n, chunk) for n, chunk in chunks if n not in done or not unit.is_kept(chunk)]:
            work.append((label, unit, missing))
    if not work:
        return
    settings, tokens = config.model, config.evaluation.batch
    model = load_model(subject.checkpoint, settings.dtype, device, **settings.reading)
    batch = Batches.automatic(compute_device(model)) if tokens is None else Batches(tokens)
    for label, unit, missing in work:
        for number, chunk in session.track(missing, f"{label}, {unit.task}"):
            store.add(label, unit.task, number, unit.run(model, chunk, batch))
    del model
    give_back_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def _memory_errors(subject: Subject, dtype: str | None) -> Iterator[None]:
    """Running out of memory where no smaller batch helps is a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        remedies = ["lower evaluation.prompts"] if any(isinstance(unit, GENERATING) for unit in subject.units) else []
        remedies += ["set model.dtype=bfloat16"] if dtype in (None, "float32") else []
        remedy = " or ".join([*remedies, "use another --device"])
        raise UserError(f"'{subject.checkpoint}' does not fit the memory: {remedy}") from error


def _compare(results: Results, earlier: Results, seed: int) -> dict:
    """A summary of both runs, the earlier one first; also written as against.json."""
    labels = [*(f"{earlier.directory.resolve().name}/{label}" for label in earlier.rows), *results.rows]
    runs = [*earlier.rows.values(), *results.rows.values()]
    summary = summarise(dict(zip(safe_names(labels).values(), runs, strict=True)), seed=seed)
    with plain_os_errors(results.directory):
        values = {"settings": {"earlier": earlier.settings, "own": results.settings}, "summary": summary}
        write_whole(results.directory / COMPARISON, json_text(values))
    return summary
