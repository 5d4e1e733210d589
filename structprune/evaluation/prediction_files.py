"""A reference's predictions on disk, a file per window: for the checkpoints after it, and for later runs."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from structprune.errors import UserError
from structprune.evaluation.fidelity import ReferencePredictions
from structprune.evaluation.result_state import PREDICTIONS
from structprune.evaluation.results import DAMAGED, plain_os_errors
from structprune.files import check_regular
from structprune.models.tensor_files import write_tensors

FORMAT = "structprune predictions 1"
ROUNDING = 1e-3  # of the logarithm of a probability near 1
DTYPES = {"tokens": torch.int32, "log_p": torch.float32, "rest": torch.float32}


@dataclass(frozen=True)
class PredictionFiles:
    """The predictions that the results in a directory keep, by the keys of windows."""

    directory: Path  # of the results

    def path(self, key: str) -> Path:
        return self.directory / PREDICTIONS / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        return self.path(key).is_file()

    def save(self, key: str, predictions: ReferencePredictions, noisy_ids: torch.Tensor) -> None:
        """Write the predictions for the noisy copies (S, T) of a window.

        Raises:
            UserError: no space left, or a place that cannot be written.
        """
        path = self.path(key)
        metadata = {"format": FORMAT, "noise": noise_digest(noisy_ids), "vocabulary": str(predictions.vocabulary)}
        tensors = {name: getattr(predictions, name) for name in DTYPES}
        with plain_os_errors(path):
            path.parent.mkdir(exist_ok=True)
            write_tensors(path, tensors, metadata)

    def load(self, key: str, noisy_ids: torch.Tensor) -> ReferencePredictions:
        """The predictions for the noisy copies (S, T) of a window, on CPU.

        Raises:
            UserError: the file is missing, damaged, or of other noise.
        """
        path = self.path(key)
        if not path.exists():
            raise UserError(f"'{path}' is missing, to which predictions are compared: {DAMAGED}")
        check_regular(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in DTYPES}
            predictions = ReferencePredictions(**tensors, vocabulary=int(metadata["vocabulary"]))
            if metadata.get("format") != FORMAT or not _is_sound(predictions):
                raise ValueError("contents")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"'{path}' is damaged: {DAMAGED}") from error
        if metadata.get("noise") != noise_digest(noisy_ids):
            raise UserError(
                f"'{path}' was made with other noise: give the evaluation.seed, noise and mask id of that run"
            )
        return predictions


def noise_digest(noisy_ids: torch.Tensor) -> str:
    """Sixteen hex digits of noisy copies (S, T): equal only for equal ones."""
    content = noisy_ids.to(torch.int64).contiguous().numpy().tobytes()
    return hashlib.sha256(str(tuple(noisy_ids.shape)).encode() + content).hexdigest()[:16]


def _is_sound(predictions: ReferencePredictions) -> bool:
    """Whether shapes, types and tokens are such as were written."""
    tokens, log_p, rest = predictions.tokens, predictions.log_p, predictions.rest
    if any(getattr(predictions, name).dtype != dtype for name, dtype in DTYPES.items()):
        return False
    if tokens.dim() != 2 or not 0 < tokens.shape[1] <= predictions.vocabulary or rest.shape != tokens.shape[:1]:
        return False
    inside = ((tokens >= 0) & (tokens < predictions.vocabulary)).all()
    logarithms = (log_p < ROUNDING).all() & (rest < ROUNDING).all()  # false for numbers that are none
    return log_p.shape == tokens.shape and bool(inside & logarithms)
