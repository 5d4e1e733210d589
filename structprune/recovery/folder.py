"""The folder of a training's checkpoints, beside its output: whose it is, and where a killed run goes on."""

import json
import os
import shutil
from pathlib import Path

from structprune.errors import UserError
from structprune.files import write_whole
from structprune.models.checkpoint_files import read_json

IDENTITY = "identity.json"  # in the folder: what its checkpoints were made of


def training_folder(out: Path) -> Path:
    """Where the checkpoints of a training lie: beside its output."""
    return out.absolute().with_name(f"{out.name}.training")


def open_folder(out: Path, identity: dict, overwrite: bool) -> Path:
    """The folder of checkpoints, new or of the same training.

    Args:
        overwrite: forget another training that is there.
    Raises:
        UserError: it belongs to another training, or is no folder of one.
    """
    folder, identity = training_folder(out), json.loads(json.dumps(identity))
    path = folder / IDENTITY
    if os.path.lexists(folder) and not (folder.is_dir() and (path.is_file() or not any(folder.iterdir()))):
        raise UserError(
            f"'{folder}', where the training would be kept, is something else: move it, or choose another --out"
        )
    if path.is_file() and read_json(path) != identity:
        if not overwrite:
            raise UserError(
                f"'{folder}' holds another training: give the same checkpoints and settings, add --overwrite, or"
                " delete it"
            )
        shutil.rmtree(folder)
    write_whole(path, json.dumps(identity, indent=1).encode())
    return folder


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
