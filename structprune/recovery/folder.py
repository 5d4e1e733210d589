"""The folder of a training's checkpoints, beside its output: whose it is, and where a killed run goes on."""

import json
import shutil
from pathlib import Path

from structprune.errors import UserError
from structprune.models.checkpoint_files import read_json

IDENTITY = "identity.json"  # in the folder: what its checkpoints were made of


def training_folder(out: Path) -> Path:
    """Where the checkpoints of a training lie: beside its output."""
    return out.absolute().with_name(f"{out.name}.training")


def open_folder(out: Path, identity: dict, overwrite: bool) -> Path:
    """The folder of checkpoints, new or of the same training.

    Raises:
        UserError: it belongs to another training.
    """
    folder = training_folder(out)
    if overwrite and folder.exists() and not _is_of(folder, identity):
        shutil.rmtree(folder)
    if folder.exists() and not _is_of(folder, identity):
        raise UserError(
            f"'{folder}' holds another training: give the same checkpoints and settings, add --overwrite, or delete it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / IDENTITY).write_text(json.dumps(identity, indent=1), encoding="utf-8")
    return folder


def _is_of(folder: Path, identity: dict) -> bool:
    path = folder / IDENTITY
    return path.is_file() and read_json(path) == json.loads(json.dumps(identity))


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint of a training; what a kill left unfinished is removed.

    The Trainer writes its own state last, so a checkpoint that has it is whole.
    """
    whole = []
    for path in folder.glob("checkpoint-*"):
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            whole.append((state["global_step"], path))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path)
    return max(whole)[1] if whole else None
