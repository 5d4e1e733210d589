"""Where a run keeps what it has finished, so that the same command goes on after a kill."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers

from structprune import __version__
from structprune.checkpoint.output import check_apart, check_place
from structprune.config import Config
from structprune.errors import UserError, shown
from structprune.files import write_whole
from structprune.models.fingerprint import fingerprint
from structprune.models.journal import Journal, unwatched
from structprune.runs.ghost import Ghost
from structprune.runs.stages import digest, text_digest

IDENTITY, WRITTEN = "identity.json", "written"
FORMAT = "structprune-work-1"
Resume = Literal["auto", "required", "never"]
RESUMES = get_args(Resume)
FIXED = ("calibration", "sink", "model")  # sections that decide every part; others are in the names of parts
INDIFFERENT: Any = {"calibration": {"batch", "source"}, "model": {"device", "allow_pickle"}}  # only rounding, or apart


@dataclass(frozen=True)
class Work:
    """Where and how a run keeps its parts.

    Attributes:
        directory: of the parts.
        resume: auto: go on from them where there are any; required: refuse a run without; never: begin anew.
        stays: leave them there when all outputs are written, for other ratios, export classes and scores.
        watch: called after every part; what it raises ends the run.
    """

    directory: Path
    resume: Resume = "auto"
    stays: bool = False
    watch: Callable[[], None] = unwatched


def work_beside(out: Path) -> Path:
    """Where the parts of a run lie if nothing else is said: beside its output."""
    return out.absolute().with_name(f"{out.name}.work")


def work_identity(ghost: Ghost, config: Config, device: torch.device) -> dict[str, Any]:
    """What decides all parts of a run, as plain data without paths: key -> value.

    What only decides memory or rounding may change: `memory`, and `calibration.batch`.
    """
    sections = config.model_dump(mode="json", include=set(FIXED), exclude=INDIFFERENT)
    keys = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    versions = {"structprune": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "format": FORMAT,
        "checkpoint": fingerprint(ghost.directory, config.model.allow_pickle),
        "text": text_digest(config.calibration.source),
        **keys,
        "device": device.type,
        **{f"version of {name}": version for name, version in versions.items()},
    }


def check_work(work: Work, identity: dict[str, Any], outputs: Mapping[Any, Path], source: Path) -> None:
    """Raise UserError where the parts cannot be kept, are another run's, or are required and not there.

    Args:
        outputs: directories that the run writes. source: the checkpoint's directory.
    """
    directory, before = work.directory, _read(work.directory / IDENTITY)
    if work.resume not in RESUMES:
        raise UserError(f"unknown --resume '{work.resume}': give {', '.join(RESUMES)}")
    check_apart(directory, source, overwrite=True)
    for out in outputs.values():
        one, other = directory.resolve(), out.resolve()
        if one == other or one in other.parents or other in one.parents:
            raise UserError(f"--work {directory} and output '{out}' lie in each other: give them places of their own")
    if before is None and os.path.lexists(directory) and not _is_empty(directory):
        raise UserError(f"'{directory}', where finished parts would be kept, is something else: give another --work")
    check_place(directory)
    if work.resume == "required" and before is None:
        raise UserError(f"--resume required, and '{directory}' has no part of a run: leave it out to begin one")
    if work.resume != "never" and before is not None:
        _check_same(directory, before, identity)


def _check_same(directory: Path, before: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise UserError for parts of another run, naming the first thing that changed."""
    for key in [key for key in {**before, **identity} if before.get(key) != json.loads(json.dumps(identity.get(key)))]:
        hashed = key in ("checkpoint", "text")
        change = f"another {key}" if hashed else f"{key} = {shown(before.get(key))}, not {shown(identity.get(key))}"
        raise UserError(
            f"'{directory}' has parts of a run with {change}: give the same, --resume never to begin anew, or"
            " another --work"
        )


@contextmanager
def working(work: Work | None, identity: Callable[[], dict[str, Any]]) -> Iterator[Journal]:
    """A run's journal. Its directory goes at the end, unless it stays; after an error, if no part was finished.

    Args:
        work: checked by `check_work`; None: nothing is kept.
    """
    if work is None:
        yield Journal()
        return
    directory = work.directory
    if work.resume == "never" and _read(directory / IDENTITY) is not None:
        shutil.rmtree(directory)
    if not (directory / IDENTITY).exists():
        write_whole(directory / IDENTITY, (json.dumps(identity(), indent=1) + "\n").encode())
    try:
        yield Journal(directory, work.watch)
    except BaseException:
        if not has_parts(directory):
            shutil.rmtree(directory, ignore_errors=True)
        raise
    if not work.stays:
        shutil.rmtree(directory, ignore_errors=True)


def has_parts(directory: Path) -> bool:
    """Whether a run has finished any part there."""
    return any(directory.rglob("*.safetensors"))


def output_part(ratio: float | None, config: Config) -> str:
    """The name of the part that says that the output of a ratio was written."""
    return f"{ratio}-{digest(config.model_dump(mode='json', exclude={'memory'}))}"


def is_written(work: Work | None, ratio: float | None, out: Path, config: Config) -> bool:
    """Whether an earlier run of the same work wrote the output of a ratio."""
    if work is None or work.resume == "never" or not (out / "config.json").exists():
        return False
    return Journal(work.directory).within(WRITTEN).has(output_part(ratio, config))


def _read(path: Path) -> dict[str, Any] | None:
    """The identity of a run's parts; None where there is none."""
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return identity if isinstance(identity, dict) and identity.get("format") == FORMAT else None


def _is_empty(directory: Path) -> bool:
    return directory.is_dir() and not any(directory.iterdir())
