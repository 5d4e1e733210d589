"""A teacher's predictions of all of a training's windows, written once and replayed exactly.

Files of `CHUNK` windows in the order of training, so that a run that was killed goes on at the chunk it was at.
Shapes: M masked positions, k tokens that are kept of each prediction.
"""

import json
from functools import lru_cache
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch.utils.data import default_collate

from structprune.errors import UserError
from structprune.evaluation.fidelity import reference_predictions
from structprune.files import full_disk_errors, whole_file, write_whole
from structprune.models.checkpoint_files import read_json
from structprune.models.encode import Batches
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import compute_device
from structprune.progress import Track, untracked
from structprune.recovery.teacher import Predictions
from structprune.recovery.windows import NoisyWindows

CHUNK = 256  # windows in a file
IDENTITY = "identity.json"


def cache_bytes(windows: int, length: int, top: int) -> int:
    """Bytes on disk, with half of the tokens masked."""
    return windows * length // 2 * (8 * top + 4)


def begun(directory: Path | None) -> list[Path]:
    """The directory of a cache that holds predictions; none where it does not, or there is no cache."""
    return [directory] if directory is not None and any(directory.glob("*.npz")) else []


def write_cache(
    directory: Path, identity: dict, model: DiffusionLM, windows: NoisyWindows, top: int, track: Track = untracked
) -> None:
    """Write what the directory lacks of a teacher's predictions.

    Args:
        identity: plain data that decides the predictions.
        top: k.
    Raises:
        UserError: the directory holds predictions of something else.
    """
    open_cache(directory, identity)
    chunks = range(0, len(windows), CHUNK)
    for start in track(chunks, "teacher's predictions"):
        path = _chunk_path(directory, start)
        if _windows_in(directory, start) >= min(CHUNK, len(windows) - start):
            continue  # it has all of them; a shorter training may have written fewer
        items = default_collate([windows[index] for index in range(start, min(start + CHUNK, len(windows)))])
        noisy = items["noisy_ids"][:, None]  # (n, 1, T)
        batches = Batches.automatic(compute_device(model))
        predictions, own = reference_predictions(model, items["input_ids"], noisy, top, batches)
        counts = own.masked_tokens[:, 0].long().numpy()  # (n,)
        tokens, log_p = predictions.tokens.numpy(), predictions.outcomes.numpy()  # (M, k), (M, k + 1)
        with full_disk_errors(path), whole_file(path) as draft, open(draft, "wb") as file:
            np.savez(file, counts=counts, tokens=tokens, log_p=log_p)
        _chunk.cache_clear()


def open_cache(directory: Path, identity: dict) -> None:
    """Check or write the identity of a cache.

    Raises:
        UserError: it holds predictions of something else.
    """
    path, identity = directory / IDENTITY, json.loads(json.dumps(identity))
    if path.is_file() and read_json(path) != identity:
        raise UserError(
            f"'{directory}' holds predictions of another teacher, text or setting: set another teacher.cache, or"
            " delete it"
        )
    if not path.is_file():
        if directory.exists() and any(directory.iterdir()):
            raise UserError(f"'{directory}' is no cache of predictions: set teacher.cache to an empty place")
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(identity, indent=1).encode())


class CachedTeacher:
    """Predictions that `write_cache` wrote.

    Args:
        device: where the student computes.
    """

    def __init__(self, directory: Path, device: torch.device):
        self._directory, self._device = directory, device

    def predict(self, _windows: tuple, masked: torch.Tensor, items: torch.Tensor, _learnt=None) -> Predictions:
        """Predictions at the masked positions (B, T) of items (B,).

        Raises:
            UserError: a file of the cache was damaged since.
        """
        tokens, log_p = zip(*(self._item(int(item)) for item in items))
        assert sum(map(len, tokens)) == int(masked.sum()), "the cache has another number of masked positions"
        return Predictions(
            tokens=torch.from_numpy(np.concatenate(tokens)).long().to(self._device),
            log_p=torch.from_numpy(np.concatenate(log_p)).to(self._device),
        )

    def _item(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        start = index - index % CHUNK
        ends, tokens, log_p = _chunk(self._directory, start)
        first, last = ends[index - start], ends[index - start + 1]
        return tokens[first:last], log_p[first:last]


def _windows_in(directory: Path, start: int) -> int:
    """How many windows a file has; 0 where it is missing or damaged."""
    try:
        return len(_chunk(directory, start)[0]) - 1 if _chunk_path(directory, start).exists() else 0
    except UserError:
        return 0


@lru_cache(maxsize=2)
def _chunk(directory: Path, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where items begin and end (n + 1,), and their predictions."""
    path = _chunk_path(directory, start)
    try:
        with np.load(path) as file:
            ends = np.concatenate(([0], np.cumsum(file["counts"])))
            return ends, file["tokens"], file["log_p"]
    except (BadZipFile, ValueError, KeyError, EOFError, FileNotFoundError) as error:
        raise UserError(
            f"'{path}', predictions of the teacher, is missing or damaged: give the same command again, which writes"
            " it anew"
        ) from error


def _chunk_path(directory: Path, start: int) -> Path:
    return directory / f"windows-{start:08d}.npz"
