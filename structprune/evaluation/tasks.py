"""Names of evaluation tasks to tasks: `piqa:FILE` and `gsm8k:FILE` are read from disk, others are lm-eval's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from structprune.errors import UserError, nearest
from structprune.evaluation.documents import Task
from structprune.evaluation.local_tasks import LOCAL_TASKS
from structprune.evaluation.presets import preset_for
from structprune.evaluation.texts import Texts
from structprune.models.families import Family


@dataclass(frozen=True)
class LocalSpec:
    """`TASK:FILE` or `TASK:FILE:TRAIN`, taken apart.

    Attributes:
        train: where solved examples come from.
    """

    task: str
    path: Path
    train: Path | None = None


def parse_local(name: str) -> LocalSpec | None:
    """A task's name on the command line as a local one; None where it names no file.

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


def open_tasks(
    names: Sequence[str],
    family: Family,
    texts: Texts,
    shots: int | None = None,
    limit: int | None = None,
    seed: int = 1234,
    include: str | Path | None = None,
) -> list[Task]:
    """The tasks of a run with their documents, in the order they are named.

    Args:
        names: `piqa:FILE`, `gsm8k:FILE[:TRAIN]`, or a task, group, tag or YAML file of lm-eval.
        family: whose published settings say how many shots there are, where `shots` does not.
        shots: solved examples; None for the published number (0 for a local task without TRAIN), else the task's own.
        limit: documents per task (of a group, per member).
        seed: of lm-eval's choice of examples; its own default.
        include: a folder of further lm-eval task files.
    Raises:
        UserError: an unknown task (with the nearest name), a task named twice, a file or data set that cannot be read,
            or a task that needs what is not here.
    """
    specs = {name: parse_local(name) for name in names}
    if len(specs) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise UserError(f"'{twice}' is named twice in the list of tasks: name it once")
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} documents leaves none: give 1 or more")
    found: list[Task] = []
    for name, spec in specs.items():
        if spec is None:
            from structprune.evaluation.lm_tasks import load_tasks  # lm-eval is an extra

            found += load_tasks(name, _shots(name, family, shots), limit, seed, texts, include)
        else:
            count = _shots(spec.task, family, shots) if shots is not None or spec.train else 0
            found.append(LOCAL_TASKS[spec.task](spec.path, spec.train, count or 0, limit, texts))
    _unique(found)
    return found


def _shots(task: str, family: Family, asked: int | None) -> int | None:
    preset = preset_for(task, family)
    return asked if asked is not None or preset is None else preset.shots


def _unique(tasks: list[Task]) -> None:
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two of the tasks are called '{name}': leave one out, or rename its file")
