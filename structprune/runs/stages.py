"""The pruned model that lies beside the output of its recovery until that is written, and what it was made of."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from structprune.errors import UserError
from structprune.files import make_folders, write_whole
from structprune.models.checkpoint_files import read_json
from structprune.recovery.folder import IDENTITY, has_learnt, is_training, read_identity, training_folder

REQUEST = "request"  # in the last recovery of report.json: a digest of what was asked for


def pruned_folder(out: Path) -> Path:
    """Where the pruned model lies that is trained back to `out`: beside it."""
    return out.absolute().with_name(f"{out.name}.pruned")


def pruned_model(out: Path) -> Path:
    """The checkpoint in `pruned_folder`, by the output's name, which is its name in reports."""
    return pruned_folder(out) / out.name


def is_pruned(out: Path) -> bool:
    """Whether the pruned model is there; it appears complete or not at all."""
    return (pruned_model(out) / "config.json").exists()


def check_pruned(out: Path, identity: dict | None, overwrite: bool) -> None:
    """Raise UserError for a pruned model of another run, or something else in its place.

    Args:
        identity: what the model is made of, as plain data; None: of a model that is not there yet, so that what is
            there cannot have been made of it.
        overwrite: what another run left will be removed.
    """
    folder = pruned_folder(out)
    if os.path.lexists(folder) and not _is_ours(folder, out.name):
        raise UserError(
            f"'{folder}', where the pruned model would be kept, is something else: move it, or choose another --out"
        )
    if is_pruned(out) and not overwrite and not _holds(folder, identity):
        raise UserError(
            f"'{folder}' holds a model that was pruned by another run: give the same checkpoint and settings, add"
            " --overwrite, or delete it"
        )


def open_pruned(out: Path, identity: dict) -> list[Path]:
    """Make a folder for a model that is not there yet; what a kill left of one is removed.

    Returns:
        Folders that were made, the innermost first.
    """
    folder = pruned_folder(out)
    shutil.rmtree(folder, ignore_errors=True)
    made = make_folders(folder)
    write_whole(folder / IDENTITY, json.dumps(identity, indent=1).encode())
    return made


def close_pruned(out: Path) -> None:
    """Remove the folder of a pruned model, which `check_pruned` let pass."""
    shutil.rmtree(pruned_folder(out), ignore_errors=True)


def clear_finished(out: Path, identity: dict) -> None:
    """Remove what a kill left beside a finished output: the pruned model of this identity, and its training."""
    folder = pruned_folder(out)
    if _is_ours(folder, out.name) and _holds(folder, identity):
        if is_training(training_folder(out)):
            shutil.rmtree(training_folder(out))
        shutil.rmtree(folder)


def left_behind(out: Path) -> list[Path]:
    """What a run that was ended has for the next one: the pruned model, and the folder of checkpoints."""
    training = training_folder(out)
    folders = [pruned_folder(out)] if is_pruned(out) else []
    return folders + ([training] if has_learnt(training) else [])


def digest(*parts: Mapping | str) -> str:
    """16 hex digits of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def text_digest(source: str) -> str:
    """16 hex digits of a local file, of any other text its name."""
    path = Path(source)
    if not path.is_file():
        return source
    result = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            result.update(block)
    return result.hexdigest()[:16]


def finished_report(out: Path, request: str) -> dict | None:
    """The report of an output that this request wrote; None where there is none."""
    try:
        report = read_json(out / "report.json")
        return report if report["recoveries"][-1][REQUEST] == request else None
    except (OSError, UserError, LookupError, TypeError):
        return None


def _holds(folder: Path, identity: dict | None) -> bool:
    return identity is not None and read_identity(folder / IDENTITY) == json.loads(json.dumps(identity))


def _is_ours(folder: Path, name: str) -> bool:
    """Whether a directory holds nothing but what a run of ours leaves there."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    names = {path.name for path in folder.iterdir()}
    others = {each for each in names if each not in (IDENTITY, name) and not each.startswith(".")}
    return not others and (IDENTITY in names or not names)
