"""PIQA and GSM8K from local files, with neither network nor lm-eval; prompts and metrics as lm-eval's tasks have them.

PIQA: arXiv 1911.11641. GSM8K: arXiv 2110.14168.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from structprune.errors import UserError, shown
from structprune.evaluation.documents import Choices, Document, Opening
from structprune.evaluation.texts import Texts
from structprune.files import check_regular

SOLUTIONS = ("sol1", "sol2")
INVALID = "[invalid]"  # stands for a missing answer in comparisons
STRICT = re.compile(r"#### (-?[0-9.,]+)")
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
GSM8K_STOPS = ("Question:", "</s>", "<|im_end|>")
Reader = Callable[[Path], Iterable[dict]]


@dataclass(frozen=True)
class LocalTask:
    """A task from a file; grades as `Task.grade`."""

    name: str
    documents: tuple[Document, ...]
    grade: Callable[[Any, Any], dict[str, float]] = field(repr=False)


def grade_gsm8k(document: Opening, outcome: str) -> dict[str, float]:
    """Exact match of the number after #### (strict-match), and of the last number (flexible-extract)."""
    gold = normalise(document.gold or "")
    answers = {"strict-match": strict_answer(outcome), "flexible-extract": flexible_answer(outcome)}
    return {f"exact_match,{name}": float(normalise(answer) == gold) for name, answer in answers.items()}


def grade_piqa(document: Choices, outcome: Sequence[float]) -> dict[str, float]:
    """As `choice_metrics`."""
    return choice_metrics(outcome, document.lengths, document.gold)


def choice_metrics(log_likelihoods: Sequence[float], lengths: Sequence[int], gold: int | None) -> dict[str, float]:
    """`acc` and `acc_norm` (per character) of one document; of equal answers the first is chosen."""
    rates = np.divide(log_likelihoods, lengths)  # (A,)
    return {"acc": float(np.argmax(log_likelihoods) == gold), "acc_norm": float(np.argmax(rates) == gold)}


def strict_answer(text: str) -> str:
    """The number after the first ####, or `INVALID`."""
    return next(iter(STRICT.findall(text)), INVALID)


def flexible_answer(text: str) -> str:
    """The last number of a text, or `INVALID`."""
    return next(reversed(FLEXIBLE.findall(text)), INVALID)


def normalise(answer: str) -> str:
    """An answer without text before ####, commas, dollar signs and a final full stop, in lower case."""
    answer = re.sub(r"(?s).*#### ", "", re.sub(r"[,$]", "", answer))
    return re.sub(r"\.$", "", answer).lower()


def read_piqa(path: Path, train: Path | None, shots: int, limit: int | None, texts: Texts) -> LocalTask:
    """PIQA's lines {goal, sol1, sol2}, with `label` in them or in a file of labels beside.

    Args:
        path: NAME.jsonl; labels are read from NAME-labels.lst where it exists, one 0 or 1 a line.
        train: a file of the same form, whose first `shots` lines are shown solved before every question.
        limit: the most documents to read.
    Raises:
        UserError: a file is missing, empty or damaged, or has fewer lines than shots.
    """
    prefix = _shots(_piqa_rows, train, shots, lambda row: f"{_question(row['goal'])} {row[SOLUTIONS[row['label']]]}")
    documents = []
    for index, row in enumerate(_first_rows(_piqa_rows, path, limit)):
        context = texts.question(prefix + _question(row["goal"]))
        solutions = [row[name] for name in SOLUTIONS]
        pairs = tuple((context, texts.delimiter() + solution) for solution in solutions)
        documents.append(Choices(f"piqa/{index}", pairs, tuple(map(len, solutions)), row["label"]))
    return LocalTask(f"piqa:{path.name}", tuple(documents), grade_piqa)


def read_gsm8k(path: Path, train: Path | None, shots: int, limit: int | None, texts: Texts) -> LocalTask:
    """GSM8K's lines {question, answer}, the answer ending in "#### 42"; arguments and errors as `read_piqa`."""
    prefix = _shots(_gsm8k_rows, train, shots, lambda row: f"{_question(row['question'])} {row['answer']}")
    documents = tuple(
        Opening(f"gsm8k/{index}", texts.question(prefix + _question(row["question"])), GSM8K_STOPS, gold=row["answer"])
        for index, row in enumerate(_first_rows(_gsm8k_rows, path, limit))
    )
    return LocalTask(f"gsm8k:{path.name}", documents, grade_gsm8k)


LOCAL_TASKS: dict[str, Callable] = {"piqa": read_piqa, "gsm8k": read_gsm8k}


def _question(text: str) -> str:
    return f"Question: {text}\nAnswer:"


def _first_rows(read: Reader, path: Path, limit: int | None) -> list[dict]:
    every = list(read(path))  # so that a damaged line shows at once, whatever the limit
    if not every:
        raise UserError(f"{path} is empty: give a file with one JSON object a line")
    return every[:limit]


def _shots(read: Reader, path: Path | None, count: int, show: Callable[[dict], str]) -> str:
    """The first rows of the train file, solved, each followed by an empty line."""
    if not count:
        return ""
    if path is None:
        raise UserError(f"{count} shots need a file of examples: write TASK:FILE:TRAIN, or set evaluation.shots=0")
    examples = _first_rows(read, path, None)
    if len(examples) < count:
        raise UserError(f"{path} has {len(examples)} lines, too few for {count} shots: lower evaluation.shots")
    return "".join(f"{show(row)}\n\n" for row in examples[:count])


def _piqa_rows(path: Path) -> Iterator[dict]:
    beside = path.with_name(f"{path.stem}-labels.lst")
    fields: dict[str, type] = {"goal": str, "sol1": str, "sol2": str}
    rows = list(_rows(path, fields if beside.is_file() else fields | {"label": int}))
    labels = _labels(beside, path, len(rows)) if beside.is_file() else [row["label"] for row in rows]
    for number, (row, label) in enumerate(zip(rows, labels, strict=True), start=1):
        if label not in (0, 1):
            raise UserError(f"{path}, line {number}: label {shown(label)} is neither 0 nor 1: give one of them")
        yield row | {"label": label}


def _labels(path: Path, texts: Path, count: int) -> list[int]:
    lines = _lines(path)
    for number, line in enumerate(lines, start=1):
        if line.strip() not in ("0", "1"):
            raise UserError(f"{path}, line {number}: {shown(line)} is not a label: give 0 or 1")
    if len(lines) != count:
        raise UserError(f"{path} has {len(lines)} labels for {count} lines of {texts.name}: give one a line")
    return [int(line) for line in lines]


def _gsm8k_rows(path: Path) -> Iterator[dict]:
    for number, row in enumerate(_rows(path, {"question": str, "answer": str}), start=1):
        if strict_answer(row["answer"]) == INVALID:
            raise UserError(f"{path}, line {number}: the field 'answer' does not end in '#### NUMBER': end it so")
        yield row


def _rows(path: Path, fields: Mapping[str, type]) -> Iterator[dict]:
    """The objects of a .jsonl file; blank lines at its end are skipped.

    Raises:
        UserError: a line is not a JSON object, or lacks a field of that type, or a text is empty.
    """
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}, line {number}"
        row = _parsed(line, where)
        if not isinstance(row, dict):
            raise UserError(f"{where} holds a {type(row).__name__}: give one object a line")
        for name, kind in fields.items():
            if name not in row:
                raise UserError(f"{where} lacks the field '{name}': add it")
            _check_field(f"{where}: the field '{name}'", row[name], kind)
        yield row


def _parsed(line: str, where: str) -> Any:
    """The value that a line writes."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}): give one object a line") from error
    except RecursionError as error:
        raise UserError(f"{where} has brackets nested too deep to be read: give one flat object a line") from error
    except ValueError as error:  # Python reads no number of thousands of digits
        raise UserError(f"{where} holds a number of too many digits to be read: leave it out") from error


def _check_field(what: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = "a text: give one in quotes" if kind is str else "a whole number: give 0 or 1"
        raise UserError(f"{what} is {shown(value)}, not {expected}")
    if not isinstance(value, str):
        return
    if not value.strip():
        raise UserError(f"{what} is empty ({shown(value)}): write a text there, or remove the line")
    if not value.isprintable() and value.encode(errors="ignore").decode() != value:
        raise UserError(f"{what} holds half a character (a lone surrogate): remove it")


def _lines(path: Path) -> list[str]:
    check_regular(path)
    try:
        text = path.read_text(encoding="utf-8-sig").rstrip()
        return text.split("\n") if text else []
    except FileNotFoundError as error:
        raise UserError(f"no file at '{path}'") from error
    except UnicodeDecodeError as error:
        number = len((error.object[: error.start] + b".").splitlines())
        raise UserError(f"{path}, line {number} is not UTF-8 text ({error.reason}): convert the file") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
