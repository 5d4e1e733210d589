"""The folder of a training's checkpoints, beside its output: whose it is, and where a killed run goes on."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from structprune.errors import Interrupted, UserError
from structprune.files import lock, make_folders, remove_folders, write_whole
from structprune.models.checkpoint_files import read_json

IDENTITY = "identity.json"  # in the folder: what its checkpoints were made of
LOCK = ".lock"  # in the folder: held by the process that trains
LOGS = "runs"  # in the folder: what TensorBoard writes there
EMISSIONS = "emissions*.csv"  # in the folder: what CodeCarbon writes there
BLOCKS = "blocks"  # in the folder: what the first stage finished
STATE = "trainer_state.json"  # of a checkpoint
NEEDED = (STATE, "optimizer.*", "scheduler.pt", "*.safetensors", "rng_state*.pth")  # of a checkpoint


def training_folder(out: Path) -> Path:
    """Where the checkpoints of a training lie: beside its output."""
    return out.absolute().with_name(f"{out.name}.training")


def block_path(folder: Path, index: int) -> Path:
    """Where the first stage of a training keeps a block that it finished."""
    return folder / BLOCKS / f"block-{index:05d}.safetensors"


def has_learnt(folder: Path) -> bool:
    """Whether a folder keeps something of a training that a later run goes on from."""
    whole = (finished_step(path) is not None for path in folder.glob("checkpoint-*"))  # a kill leaves others too
    return any((folder / BLOCKS).glob("block-*")) or any(whole)


def check_folder(out: Path, identity: dict, overwrite: bool, aside: tuple[str, ...] = ()) -> Path:
    """The folder of checkpoints, as it is; arguments and errors as `open_folder`.

    Args:
        aside: keys of the identity that do not count, since they are not known yet.
    """
    folder = training_folder(out)
    if os.path.lexists(folder) and not is_training(folder):
        raise UserError(
            f"'{folder}', where the training would be kept, is something else: move it, or choose another --out"
        )
    if not overwrite and has_learnt(folder):
        before, now = read_identity(folder / IDENTITY) or {}, json.loads(json.dumps(identity))
        if any(before.get(key) != now.get(key) for key in {*before, *now} - {*aside}):
            raise UserError(
                f"'{folder}' holds another training: give the same checkpoints and settings, add --overwrite, or"
                " delete it"
            )
    return folder


def open_folder(out: Path, identity: dict, overwrite: bool) -> Path:
    """The folder of checkpoints, new or of the same training; one in which nothing was learnt is anyone's.

    Args:
        overwrite: forget an earlier training.
    Raises:
        UserError: it belongs to another training, or is no folder of one.
    """
    folder = check_folder(out, identity, overwrite)
    if folder.exists() and (overwrite or not has_learnt(folder)):
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
    if not (folder / IDENTITY).exists():
        write_whole(folder / IDENTITY, json.dumps(identity, indent=1).encode())
    return folder


@contextmanager
def opened_folder(out: Path, identity: dict, overwrite: bool) -> Iterator[Path]:
    """`open_folder`, which no other training opens meanwhile.

    Raises:
        UserError: as `open_folder`; or another process trains there.
    """
    folder = check_folder(out, identity, overwrite)
    made = make_folders(folder)
    with (folder / LOCK).open("w") as file:  # a file, since not every system can lock a folder
        if not lock(file.fileno()):
            raise UserError(f"another training works in '{folder}': wait for it, or choose another --out")
        try:
            yield open_folder(out, identity, overwrite)
        except (UserError, KeyboardInterrupt, Interrupted):
            if made and not has_learnt(folder):  # it is as if this had not begun
                shutil.rmtree(folder, ignore_errors=True)
                remove_folders(made[1:])
            raise


def logs_of(folder: Path) -> Path | None:
    """The directory of what loggers wrote in a folder; None where they wrote nothing."""
    logs = folder / LOGS
    for path in folder.glob(EMISSIONS):
        logs.mkdir(exist_ok=True)
        path.replace(logs / path.name)
    return logs if logs.exists() else None


def is_training(folder: Path) -> bool:
    """Whether a directory holds nothing but what a training of ours leaves there."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    names = {path.name for path in folder.iterdir()} - {LOCK}
    own = {IDENTITY, LOGS, BLOCKS, *(path.name for path in folder.glob(EMISSIONS))}
    others = {name for name in names - own if not name.startswith(("checkpoint-", "."))}
    return not others and (IDENTITY in names or not names)


def read_identity(path: Path) -> dict | None:
    """The identity of a folder; None where it cannot be read."""
    try:
        return read_json(path)
    except (OSError, UserError):
        return None


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint of a training; what a kill left unfinished, or what is damaged, is removed."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        if (step := finished_step(path)) is not None:
            whole.append((step, path))
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return max(whole)[1] if whole else None


def state_of(checkpoint: Path) -> dict:
    """What the Trainer wrote of itself in a checkpoint."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def adopt(checkpoint: Path, windows: int) -> None:
    """Let a training go on from a checkpoint with other windows in a pass, of which transformers may read the old
    number there.

    Args:
        windows: in a pass of a process.
    """
    state = state_of(checkpoint)
    if state.get("train_batch_size") not in (None, windows):
        write_whole(checkpoint / STATE, json.dumps(state | {"train_batch_size": windows}, indent=2).encode())


def finished_step(checkpoint: Path) -> int | None:
    """The step of a checkpoint that has all its files and readable weights; None of another one."""
    if not all(any(checkpoint.glob(name)) for name in NEEDED):
        return None
    try:
        for weights in checkpoint.glob("*.safetensors"):
            with safe_open(weights, framework="pt"):
                pass
        return state_of(checkpoint)["global_step"]
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
