"""The text that a checkpoint and its ancestors were trained on, as hashes of token runs: enough to find it again in
evaluated text, and not to read it.

Shapes: U hashes.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from structprune.errors import UserError
from structprune.files import first_line
from structprune.models.tensor_files import write_tensors

LEARNT = "learnt.safetensors"  # beside the weights
RUNS = "runs"  # its tensor


def write_learnt(path: Path, runs: np.ndarray, source: Path) -> None:
    """Write hashes of a training's text, together with those of its input.

    Args:
        runs: (U,) uint64 of `structprune.evaluation.overlap.marks`. source: directory of the input.
    Raises:
        UserError: the input's file is damaged, or the file cannot be written.
    """
    runs = np.union1d(runs, read_learnt(source))  # (U',)
    # safetensors of all versions have int64; the bits are the same
    write_tensors(path, {RUNS: torch.from_numpy(runs.view(np.int64))}, {})


def read_learnt(directory: Path) -> np.ndarray:
    """Hashes of the text that a checkpoint was trained on: (U,) uint64, none where there is no file of them.

    Raises:
        UserError: the file is damaged.
    """
    path = directory / LEARNT
    if not path.is_file():
        return np.zeros(0, np.uint64)
    try:
        runs = load_file(path)[RUNS].numpy()
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): put the file back, or delete it") from error
    if runs.dtype != np.int64 or runs.ndim != 1:
        raise UserError(f"{path} holds no hashes of text: put the file back, or delete it")
    return runs.view(np.uint64)  # (U,)
