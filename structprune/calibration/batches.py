"""The calibration set of a run, in memory and as calibration.safetensors, which replays ids and noise exactly."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from structprune.config.settings import MOST_STEPS
from structprune.errors import UserError, shown
from structprune.files import first_line
from structprune.models.tensor_files import write_tensors
from structprune.workers import Workers

TENSORS = {"input_ids": ("int64", "N, T"), "noisy_ids": ("int64", "N, S, T"), "mask_probability": ("float32", "N, S")}


@dataclass(frozen=True, eq=False)
class Calibration:
    """N windows of T tokens with S noisy copies each, on CPU; S is fewer than the noise levels where these were dealt.

    Attributes:
        input_ids: (N, T) int64.
        noisy_ids: (N, S, T) int64.
        mask_probability: (N, S) float32 each copy was masked with, or None where a replayed file has none.
        metadata: strings; of our own files `schedule`, `noise_levels` (the times t), `copies` (S), `steps`, `interval`,
            `mask_id`, `edges_visible`, `source`, `subset`, `split`, `seed`, `corpus_tokens`, and once saved `held_out`.
        held_out: the last so many windows choose damping and split and make the final check; none is scored on.
    """

    input_ids: torch.Tensor
    noisy_ids: torch.Tensor
    mask_probability: torch.Tensor | None
    metadata: dict[str, str]
    held_out: int

    @property
    def windows(self) -> int:
        return self.input_ids.shape[0]

    @property
    def levels(self) -> int:
        """S, the noisy copies of a window, each at another level."""
        return self.noisy_ids.shape[1]

    @property
    def check_samples(self) -> int:
        """Noisy copies of a held-out window in a run's final check: as many as there were noise levels to deal."""
        if "copies" not in self.metadata:
            return self.levels
        return int(self.metadata["steps"]) // int(self.metadata["interval"])

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    @property
    def sizes(self) -> dict[str, int]:
        """As values of `calibration.*`: windows to fit on, held-out ones, tokens, copies, and the steps and interval of
        their levels."""
        return _sizes(tuple(self.noisy_ids.shape), self.held_out, self.metadata)

    @property
    def fit(self) -> "Calibration":
        """The windows that scores and refit see (a view, of which none is held out)."""
        return self.part(self._rows(False), held_out=0)

    @property
    def check(self) -> "Calibration":
        """The held-out windows (a view, of which all are held out)."""
        return self.part(self._rows(True), held_out=self.held_out)

    def first(self, windows: int) -> "Calibration":
        """At most the first `windows` fit windows, and all held-out ones."""
        count = min(windows, self.windows - self.held_out)
        chosen = torch.cat((torch.arange(count), torch.arange(self.windows - self.held_out, self.windows)))
        return self if len(chosen) == self.windows else self.part(chosen, held_out=self.held_out)

    def share(self, workers: Workers) -> "Calibration":
        """This process's part of the fit windows, and of the held-out ones."""
        if not workers.several:
            return self
        parts = [torch.arange(self.windows)[self._rows(held_out)] for held_out in (False, True)]  # (n,), (h,)
        chosen = torch.cat([part[workers.span(len(part))] for part in parts])
        return self.part(chosen, held_out=len(parts[1][workers.span(len(parts[1]))]))

    def _rows(self, held_out: bool) -> slice:
        edge = self.windows - self.held_out
        return slice(edge, None) if held_out else slice(0, edge)

    def part(self, rows: slice | torch.Tensor, held_out: int) -> "Calibration":
        """Some of the windows, of which the last are held out."""
        p = self.mask_probability
        return replace(
            self,
            input_ids=self.input_ids[rows],
            noisy_ids=self.noisy_ids[rows],
            mask_probability=None if p is None else p[rows],
            held_out=held_out,
        )

    @property
    def digest(self) -> str:
        """SHA-256 (first 16 hex digits) of the clean and noisy ids and of the number of held-out windows."""
        digest = hashlib.sha256(str(self.held_out).encode())
        for ids in (self.input_ids, self.noisy_ids):
            digest.update(ids.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all.

        Raises:
            UserError: the file cannot be written.
        """
        tensors = {name: getattr(self, name) for name in TENSORS}
        present = {name: value for name, value in tensors.items() if value is not None}
        write_tensors(path, present, self.metadata | {"held_out": str(self.held_out)})

    @classmethod
    def load(cls, path: str | Path, held_out: int | None = None, mask_id: int | None = None) -> "Calibration":
        """Read a calibration file, ids and noise exactly as saved.

        Args:
            held_out: held-out windows where the file's metadata names none (None: 0).
            mask_id: the model's mask id, which the file's noise must use.
        Raises:
            UserError: the file is missing or unreadable, lacks a tensor, has a wrong shape or dtype, a mask
                probability outside (0, 1] or NaN, a held-out count beyond its windows, or noisy ids that differ from
                the clean ones by anything but the mask id.
        """
        tensors, metadata = _read(Path(path))
        _check_shapes(tensors, path)
        stored = _integer(metadata, "mask_id", path)
        if None not in (stored, mask_id) and stored != mask_id:
            raise UserError(
                f"{path} was noised with mask id {stored}, but the model's is {mask_id}: calibrate anew from text"
            )
        _check_values(tensors, mask_id if stored is None else stored, path)
        _check_dealt(tensors["noisy_ids"].shape[1], metadata, path)
        held_out = _held_out(metadata, held_out or 0, len(tensors["input_ids"]), path)
        ids, noisy = tensors["input_ids"], tensors["noisy_ids"]  # (N, T), (N, S, T)
        return cls(ids, noisy, tensors.get("mask_probability"), metadata, held_out)


def saved_sizes(path: str | Path, held_out: int) -> dict[str, int]:
    """`Calibration.sizes` of a file, of which no tensor is read.

    Args:
        held_out: held-out windows where the file's metadata names none.
    Raises:
        UserError: the file is missing, unreadable, none of a calibration, or has no window to fit on.
    """
    path = Path(path)
    with _opened(path) as (file, metadata):
        shape = tuple(file.get_slice("noisy_ids").get_shape())
    _check_shape("noisy_ids", shape, path)
    held_out = _held_out(metadata, held_out, shape[0], path)
    check_fitted(shape[0], held_out, metadata, path)
    _check_dealt(shape[1], metadata, path)
    return _sizes(shape, held_out, metadata)


def _sizes(shape: tuple[int, ...], held_out: int, metadata: dict[str, str]) -> dict[str, int]:
    """`Calibration.sizes`, of noisy ids of a shape (N, S, T)."""
    windows, copies, length = shape
    levels = {"steps": copies, "interval": 1}
    if "copies" in metadata:  # they were dealt from so many levels
        levels = {name: int(metadata[name]) for name in levels}
    return {"windows": windows - held_out, "held_out": held_out, "length": length, "copies": copies, **levels}


def _held_out(metadata: dict[str, str], configured: int, windows: int, path: str | Path) -> int:
    """Held-out windows of a file: those that its metadata name, or the configured ones.

    Raises:
        UserError: it has no such number of windows.
    """
    recorded = _integer(metadata, "held_out", path)
    held_out = configured if recorded is None else recorded
    if not 0 <= held_out <= windows:
        remedy = _fewer(metadata)
        raise UserError(f"{path} has {windows} windows, of which {held_out} cannot be held out: {remedy}")
    return held_out


def check_fitted(windows: int, held_out: int, metadata: dict[str, str], path: str | Path) -> None:
    """Raise UserError where a calibration file has no window that is not held out."""
    if held_out >= windows:
        raise UserError(
            f"{path} has {windows} windows and {held_out} are to be held out, which leaves none to fit on"
            f": {_fewer(metadata)}"
        )


def _fewer(metadata: dict[str, str]) -> str:
    """How to hold out fewer windows of a file."""
    return "calibrate anew from text" if "held_out" in metadata else "lower calibration.held_out"


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """A file that has the tensors of a calibration, open, and its metadata."""
    if not path.is_file():
        raise UserError(f"no calibration file at '{path}'")
    try:
        with safe_open(path, framework="pt") as file:
            for name in ("input_ids", "noisy_ids"):
                if name not in file.keys():  # noqa: SIM118
                    raise UserError(f"{path} has no tensor '{name}' ({TENSORS[name][1]}): it is not a calibration file")
            yield file, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({first_line(error)}): calibrate anew from text"
        ) from error


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors a calibration file has of those we know, and its metadata."""
    with _opened(path) as (file, metadata):
        return {name: file.get_tensor(name) for name in TENSORS if name in file.keys()}, metadata  # noqa: SIM118


def _check_shape(name: str, shape: tuple[int, ...], path: str | Path) -> None:
    """Raise UserError for a tensor that lacks a dimension, or has nothing in one."""
    names = TENSORS[name][1]
    if len(shape) != len(names.split(", ")) or 0 in shape:
        raise UserError(f"{path}: {name} has shape {shape}, not ({names}) with all of them positive")


def _check_shapes(tensors: dict[str, torch.Tensor], path: str | Path) -> None:
    """Raise UserError unless every tensor is non-empty and has the dtype and shape that the others imply."""
    sizes: dict[str, int] = {}  # N, S and T, as the first tensor with that dimension has it
    for name, value in tensors.items():
        (dtype, dimensions), shape = TENSORS[name], tuple(value.shape)
        if str(value.dtype) != f"torch.{dtype}":
            raise UserError(f"{path}: {name} is {str(value.dtype).removeprefix('torch.')}, not {dtype}")
        _check_shape(name, shape, path)
        expected = tuple(sizes.setdefault(key, size) for key, size in zip(dimensions.split(", "), shape))
        if shape != expected:
            raise UserError(f"{path}: {name} has shape {shape}, not {expected} as the other tensors imply")


def _check_values(tensors: dict[str, torch.Tensor], mask_id: int | None, path: str | Path) -> None:
    """Raise UserError for negative ids, impossible probabilities, and noise that is not one mask id.

    Without a mask id known from elsewhere, the changed positions must at least agree on one.
    """
    clean, noisy, p = tensors["input_ids"], tensors["noisy_ids"], tensors.get("mask_probability")
    if clean.min() < 0:
        raise UserError(f"{path}: input_ids holds the negative token id {clean.min().item()}")
    wrong = [] if p is None else p[~((p > 0) & (p <= 1))].tolist()  # NaN fails every comparison
    if wrong:
        raise UserError(f"{path}: mask_probability holds {wrong[0]}, not a probability in (0, 1]")
    changed = noisy[noisy != clean[:, None]]  # (number of masked positions,)
    if not len(changed):
        return
    if mask_id is None:
        mask_id = int(changed[0])
    others = changed[changed != mask_id]  # (number of positions with another id,)
    if len(others):
        raise UserError(
            f"{path}: noisy_ids differ from input_ids by id {others[0].item()}, where only mask id {mask_id} may"
        )


def _check_dealt(copies: int, metadata: dict[str, str], path: str | Path) -> None:
    """Raise UserError where metadata that say what copies were dealt from contradict the S `copies` or our settings."""
    recorded, steps, interval = (_integer(metadata, key, path) for key in ("copies", "steps", "interval"))
    if recorded is None:
        return
    if steps is None or interval is None or not 1 <= interval <= steps <= MOST_STEPS:
        raise UserError(f"{path}: metadata 'steps' and 'interval' give no noise levels: calibrate anew from text")
    if recorded != copies or copies > steps // interval:
        raise UserError(
            f"{path} has {copies} noisy copies of a window, but its metadata say {recorded} of"
            f" {steps // interval} noise levels: calibrate anew from text"
        )


def _integer(metadata: dict[str, str], key: str, path: str | Path) -> int | None:
    """The integer that the metadata hold under `key`, None where they have none."""
    if key not in metadata:
        return None
    text = metadata[key]
    if not re.fullmatch(r"[+-]?\d{1,18}", text.strip(), re.ASCII):  # of 64 bits, which ids have
        raise UserError(
            f"{path}: metadata '{key}' is {shown(text)}, not an integer of 64 bits: calibrate anew from text"
        )
    return int(text)
