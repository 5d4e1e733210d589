"""The rows of results, one for each evaluated item: their metrics and their JSON; a damaged file is a UserError."""

import errno
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from structprune.errors import UserError
from structprune.evaluation.metrics import metric_of
from structprune.files import check_regular, full_disk_errors

FORMAT = 1  # raised when older readers would misread the files
DAMAGED = "evaluate again with --overwrite"


class _Graded:
    """A row whose metrics are its task's grades."""

    metrics: Mapping[str, float]

    @property
    def parts(self) -> dict[str, tuple[float, float]]:
        """Metric -> (numerator, denominator)."""
        return {name: (value, 1.0) for name, value in self.metrics.items()}


@dataclass(frozen=True)
class Choices(_Graded):
    """A multiple-choice item; its key is unique in its task and pairs it between checkpoints."""

    kind: Literal["choices"] = field(default="choices", kw_only=True)
    task: str
    key: str
    log_likelihoods: tuple[float, ...]  # nats of each answer, summed over its tokens
    errors: tuple[float | None, ...]  # Monte Carlo standard errors, 0 where exact, None with a single block of samples
    sizes: tuple[int, ...]  # characters of each answer, by which acc_norm divides
    gold: int | None  # index of the right answer, None where only the task's own code knows it
    samples: int  # Monte Carlo samples run for an answer
    full_samples: int  # the number allowed
    metrics: Mapping[str, float]

    def __post_init__(self) -> None:
        errors = [error for error in self.errors if error is not None]
        _check_finite(self, (*self.log_likelihoods, *errors, *self.metrics.values()))
        _check_metrics(self, self.metrics)
        if not len(self.log_likelihoods) == len(self.errors) == len(self.sizes) > 0 or min(self.sizes) < 1:
            raise UserError(f"{_named(self)}: every answer needs a log-likelihood, an error and a size of at least 1")
        if self.gold is not None and not 0 <= self.gold < len(self.log_likelihoods):
            raise UserError(f"{_named(self)}: gold answer {self.gold}, but there are {len(self.log_likelihoods)}")

    @property
    def choice(self) -> int:
        """The likeliest answer, the first of equals."""
        return int(np.argmax(self.log_likelihoods))

    @property
    def choice_norm(self) -> int:
        """The answer likeliest per character, the first of equals."""
        return int(np.argmax(np.divide(self.log_likelihoods, self.sizes)))


@dataclass(frozen=True)
class Window:
    """A window of text under noise, of `samples` noisy copies."""

    kind: Literal["window"] = field(default="window", kw_only=True)
    task: str
    key: str
    nelbo: float  # nats per maskable token
    masked_nats: float  # cross-entropy summed over the masked tokens of all copies
    masked_tokens: int
    samples: int
    full_samples: int
    correct: int | None = None  # masked tokens that were the likeliest; None where only the NELBO was asked for
    kl_nats: float | None = None  # KL(reference || model) summed like masked_nats; None of the reference itself
    agreed: int | None = None  # masked tokens whose likeliest prediction is the reference's; None likewise
    causal_nats: float | None = None  # mean of the next token; None of a model that is not causal too

    def __post_init__(self) -> None:
        others = (self.kl_nats or 0.0, self.causal_nats or 0.0)
        _check_finite(self, (self.nelbo, self.masked_nats, self.masked_tokens, *others))

    @property
    def parts(self) -> dict[str, tuple[float, float]]:
        """Metric -> (numerator, denominator)."""
        sums = (self.masked_nats, self.correct, self.kl_nats, self.agreed)
        of_tokens = zip(("masked_ce", "masked_acc", "kl", "agreement"), sums, strict=True)
        shares = {name: (float(value), float(self.masked_tokens)) for name, value in of_tokens if value is not None}
        causal = {} if self.causal_nats is None else {"causal_ce": (self.causal_nats, 1.0)}
        return {"nelbo": (self.nelbo, 1.0), **shares, **causal}


@dataclass(frozen=True)
class Generation(_Graded):
    """A generated answer, `text`; `gold` is None where only the task's own code knows it."""

    kind: Literal["generation"] = field(default="generation", kw_only=True)
    task: str
    key: str
    text: str
    gold: str | None
    metrics: Mapping[str, float]
    samples: int = 1
    full_samples: int = 1

    def __post_init__(self) -> None:
        _check_finite(self, tuple(self.metrics.values()))
        _check_metrics(self, self.metrics)


@dataclass(frozen=True)
class Continuation:
    """An opening of the text that was continued greedily: for fidelity, not graded."""

    kind: Literal["continuation"] = field(default="continuation", kw_only=True)
    task: str
    key: str
    tokens: tuple[int, ...]  # generated
    text: str
    kept: int | None = None  # tokens that are the reference's at their place; None of the reference itself
    samples: int = 1
    full_samples: int = 1

    def __post_init__(self) -> None:
        if len(self.tokens) < 2:
            raise UserError(f"{_named(self)} has {len(self.tokens)} generated tokens, and needs 2: {DAMAGED}")

    @property
    def parts(self) -> dict[str, tuple[float, float]]:
        """Metric -> (numerator, denominator); `distinct` counts different pairs of neighbours."""
        pairs = float(len(set(pairwise(self.tokens))))
        kept = {} if self.kept is None else {"kept": (float(self.kept), float(len(self.tokens)))}
        return {"distinct": (pairs, len(self.tokens) - 1.0), **kept}


Row = Annotated[Choices | Window | Generation | Continuation, Field(discriminator="kind")]
RunRows = Mapping[str, Mapping[str, Sequence[Row]]]  # checkpoint -> task -> rows
ROW: TypeAdapter[Row] = TypeAdapter(Row)


def to_json(row: Row) -> dict:
    """A row as plain values, and for readers of the file what follows from them (choice, choice_norm)."""
    return asdict(row) | {name: getattr(row, name) for name in ("choice", "choice_norm") if hasattr(row, name)}


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """The metrics that every row has, the main one first; those without any denominator are left out."""
    names = [name for name in rows[0].parts if all(name in row.parts for row in rows)] if rows else []
    return [name for name in names if sum(row.parts[name][1] for row in rows) > 0]


def item_parts(rows: Sequence[Row], metric: str) -> dict[str, tuple[float, float]]:
    """Item key -> (numerator, denominator) of a metric."""
    return {row.key: row.parts[metric] for row in rows}


def _named(row: Row) -> str:
    return f"item '{row.key}' of task '{row.task}'"


def _check_metrics(row: Row, metrics: Mapping[str, float]) -> None:
    if not metrics:
        raise UserError(f"{_named(row)} has no metric that can be averaged: leave the task out")
    for name in metrics:
        metric_of(name)


def _check_finite(row: Row, values: Sequence[float]) -> None:
    wrong = [value for value in values if not math.isfinite(value)]
    if wrong:
        raise UserError(f"{_named(row)}: the model gives {wrong[0]}: set model.dtype to float32 or bfloat16")


def json_text(values: dict) -> bytes:
    """The contents of a whole file, indented for people."""
    return json.dumps({"format": FORMAT, **values}, indent=2, ensure_ascii=False).encode() + b"\n"


def json_line(values: dict) -> bytes:
    """A line of a .jsonl file."""
    return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def read_object(path: Path) -> dict:
    """What `json_text` wrote.

    Raises:
        UserError: it is damaged, or of another format.
    """
    check_regular(path)
    try:
        values = json.loads(path.read_bytes())
        version, settings = values["format"], values["settings"]
        if not isinstance(settings, dict):
            raise TypeError("settings")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"'{path}' is damaged: {DAMAGED}") from error
    if version != FORMAT:
        raise UserError(f"'{path}' has format {version}, and this version reads {FORMAT}: {DAMAGED}")
    return values


def setting_differences(old: dict, new: dict) -> list[str]:
    """The differences in words, `seed was 0 and is 1`; nested settings under dotted names."""
    before, after = _flat(old), _flat(new)
    differences = []
    for name in {**before, **after}:
        if before.get(name) != after.get(name):
            texts = (values.get(name, "not set") for values in (before, after))
            was, now = (text if len(text) <= 80 else f"{text[:77]}..." for text in texts)
            differences.append(f"{name} was {was} and is {now}")
    return differences


def _flat(values: dict, prefix: str = "") -> dict[str, str]:
    """Dotted name -> the value as JSON."""
    texts: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            texts |= _flat(value, f"{prefix}{name}.")
        else:
            texts[f"{prefix}{name}"] = json.dumps(value, ensure_ascii=False)
    return texts


def parse_line(line: bytes, kind: TypeAdapter, path: Path, number: int) -> Any:
    """Line `number` of a .jsonl file as an object of a kind.

    Raises:
        UserError: it is none.
    """
    try:
        return kind.validate_json(line, strict=True)
    except ValidationError as error:
        raise UserError(f"line {number} of '{path}' is damaged: {DAMAGED}") from error


def read_rows(path: Path, count: int) -> list[Row]:
    """The rows of a file of `count` items.

    Raises:
        UserError: the file is missing, damaged or of another length.
    """
    if not path.is_file():
        raise UserError(f"'{path}' is missing: {DAMAGED}")
    lines = path.read_bytes().splitlines()
    if len(lines) != count:
        raise UserError(f"'{path}' has {len(lines)} items instead of {count}: {DAMAGED}")
    return [parse_line(line, ROW, path, number) for number, line in enumerate(lines, 1)]


@contextmanager
def plain_os_errors(path: Path) -> Iterator[None]:
    """While writing `path`: a full disk, or a path that cannot be written, is a UserError."""
    try:
        with full_disk_errors(path, "make room and run the same command again"):
            yield
    except OSError as error:
        unwritable = isinstance(error, (PermissionError, NotADirectoryError, FileExistsError, FileNotFoundError))
        if unwritable or error.errno in (errno.EROFS, errno.ENAMETOOLONG):
            raise UserError(f"output '{path}' cannot be written ({error.strerror}): choose another --out") from error
        raise
