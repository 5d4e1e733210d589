"""A teacher's predictions of all of a training's windows, written once and replayed exactly.

Files of `CHUNK` windows in the order of training, so that a run that was killed goes on at the chunk it was at.
Shapes: M masked positions, k tokens that are kept of each prediction.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from structprune.errors import UserError
from structprune.files import full_disk_errors, whole_file, write_whole
from structprune.models.checkpoint_files import read_json
from structprune.models.modeling_structprune import DiffusionLM
from structprune.progress import Track, untracked
from structprune.recovery.student import masked_tokens
from structprune.recovery.teacher import LiveTeacher, Predictions, likeliest_and_rest
from structprune.recovery.windows import NoisyWindows

CHUNK = 256  # windows in a file
IDENTITY = "identity.json"


def cache_bytes(windows: int, length: int, top: int) -> int:
    """Bytes on disk, with half of the tokens masked."""
    return windows * length // 2 * (8 * top + 4)


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
    teacher = LiveTeacher(model)
    chunks = range(0, len(windows), CHUNK)
    for start in track(chunks, "teacher's predictions"):
        path = _chunk_path(directory, start)
        if path.exists() and len(_chunk(directory, start)[0]) > min(CHUNK, len(windows) - start):
            continue  # it has all of them; a shorter training may have written fewer
        parts = [_kept(teacher, model, windows, index, top) for index in range(start, min(start + CHUNK, len(windows)))]
        counts = np.array([len(tokens) for tokens, _ in parts])
        tokens, log_p = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
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


def _kept(
    teacher: LiveTeacher, model: DiffusionLM, windows: NoisyWindows, index: int, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest tokens (M, k) int32 of one window's masked positions, and (M, k + 1) fp32 log-probabilities."""
    item: dict[str, Any] = default_collate([windows[index]])
    masked = masked_tokens(model, item["input_ids"], item["noisy_ids"])  # (1, T)
    predictions = teacher.predict(item["noisy_ids"], masked, item["index"])
    assert predictions.states is not None and predictions.head is not None
    with torch.no_grad():
        logits = predictions.head(predictions.states).float()  # (M, V)
    tokens = logits.topk(min(top, logits.shape[-1]), dim=-1).indices  # (M, k)
    return tokens.int().cpu().numpy(), likeliest_and_rest(logits, tokens).cpu().numpy()


class CachedTeacher:
    """Predictions that `write_cache` wrote.

    Args:
        device: where the student computes.
    """

    def __init__(self, directory: Path, device: torch.device):
        self._directory, self._device = directory, device

    def predict(self, _noisy_ids: torch.Tensor, masked: torch.Tensor, items: torch.Tensor) -> Predictions:
        """Predictions at the masked positions (B, T) of items (B,)."""
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


@lru_cache(maxsize=2)
def _chunk(directory: Path, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where items begin and end (n + 1,), and their predictions."""
    with np.load(_chunk_path(directory, start)) as file:
        ends = np.concatenate(([0], np.cumsum(file["counts"])))
        return ends, file["tokens"], file["log_p"]


def _chunk_path(directory: Path, start: int) -> Path:
    return directory / f"windows-{start:08d}.npz"
