"""Names of evaluation tasks to tasks: `piqa:FILE` and `gsm8k:FILE` are read from disk, others are lm-eval's."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from structprune.errors import UserError, nearest
from structprune.evaluation.documents import Task, TaskOptions
from structprune.evaluation.local_tasks import LOCAL_TASKS
from structprune.evaluation.presets import preset_for
from structprune.evaluation.texts import Texts
from structprune.models.families import Family

DEFAULTS = TaskOptions()


@dataclass(frozen=True)
class LocalSpec:
    """The parts of `TASK:FILE` or `TASK:FILE:TRAIN`, of which TRAIN holds solved examples."""

    task: str
    path: Path
    train: Path | None = None


def parse_local(name: str) -> LocalSpec | None:
    """The parts of a local task's name; None of a name without a file.

    Raises:
        UserError: a task that has no local form, or more than two files.
    """
    task, colon, rest = name.partition(":")
    if not colon:
        return None
    if task not in LOCAL_TASKS:
        known = ", ".join(LOCAL_TASKS)
        raise UserError(f"'{task}' has no local form{nearest(task, list(LOCAL_TASKS))}: {known} can be read from files")
    files = rest.split(":")
    if len(files) > 2 or not all(files):
        raise UserError(f"'{name}' names no files: write {task}:FILE.jsonl, or {task}:FILE.jsonl:TRAIN.jsonl for shots")
    return LocalSpec(task, *map(Path, files))


def open_task(name: str, family: Family, texts: Texts, options: TaskOptions = DEFAULTS) -> Sequence[Task]:
    """A task with its documents, or the members of a group.

    Args:
        name: `piqa:FILE`, `gsm8k:FILE[:TRAIN]`, or a task, group, tag or YAML file of lm-eval.
        family: its published settings give the number of shots, where the options do not.
    Raises:
        UserError: an unknown task (with the nearest name), a file or data set that cannot be read, or a task that needs
            a package that is not installed.
    """
    spec = parse_local(name)
    if spec is None:
        from structprune.evaluation.lm_tasks import load_tasks  # lm-eval is an extra

        return load_tasks(name, texts, replace(options, shots=_shots(name, family, options)))
    with_shots = options.shots is not None or spec.train is not None
    shots = (_shots(spec.task, family, options) or 0) if with_shots else 0
    return [LOCAL_TASKS[spec.task](spec.path, spec.train, shots, options.limit, texts)]


def _shots(task: str, family: Family, options: TaskOptions) -> int | None:
    preset = preset_for(task, family)
    return options.shots if options.shots is not None or preset is None else preset.shots
