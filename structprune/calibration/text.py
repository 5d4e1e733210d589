"""Text to calibrate or evaluate on: Hub datasets, or local files, one document or conversation at a time."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from structprune.errors import UserError, nearest, shown
from structprune.files import first_line
from structprune.models.tokenizer import render_chat

Conversation = list[dict[str, Any]]
Document = str | Conversation
LOCAL = (".txt", ".jsonl", ".parquet")
ALIASES: dict[str, dict[str, Any]] = {  # arguments of `datasets.load_dataset`; `data_files`: split -> its one file
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "streaming": False},
    "c4": {
        "path": "allenai/c4",
        "streaming": True,
        "data_files": {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    },
}


def read_texts(
    source: str,
    subset: str | None = None,
    split: str = "train",
    column: str | None = None,
    section: str = "calibration",
) -> Iterator[Document]:
    """The documents of a source, in its order: text, or conversations as lists of {"role", "content"}.

    Args:
        source: `wikitext2`, `c4`, a Hub dataset id, or a local .txt (its lines, ends kept), .jsonl or .parquet file.
        subset: configuration of a Hub dataset; None for its only or usual one.
        split: of a Hub dataset.
        column: of a dataset, .jsonl or .parquet; None for `messages` where there is one, else `text`.
        section: of the configuration that names the source, for messages; `sinks`, which has no keys, names none.
    Raises:
        UserError: no such file or dataset, a kind of file that is not read, a library that is not installed, a
            missing column, or an entry that is neither text nor a conversation.
    """
    path = Path(source)
    kind = path.suffix.lower()
    if kind not in LOCAL:
        if path.exists():
            raise UserError(
                f"{section} text '{source}' is not one of {', '.join(LOCAL)}: convert it, or name a Hub dataset"
            )
        yield from _documents(_hub_rows(source, subset, split, section), column, source, section)
        return
    if not path.is_file():
        raise UserError(f"no {section} text at '{source}'")
    for key, value in (("subset", subset), ("split", None if split == "train" else split)):
        if value is not None:
            raise UserError(f"{section}.{key} = '{value}' means nothing for the local file '{source}': leave it out")
    if kind == ".txt" and column is not None:
        raise UserError(
            f"{section}.column = '{column}' means nothing for '{source}', which is plain text: leave it out"
        )
    if kind == ".txt":
        yield from _lines(path)
    else:
        yield from _documents(_jsonl_rows(path) if kind == ".jsonl" else _parquet_rows(path), column, source, section)


def join_texts(documents: Iterable[Document], source: str, tokenizer, section: str = "calibration") -> Iterator[str]:
    """The documents as parts of one text, separators included.

    Between two goes a space for WikiText (the published choice), nothing for lines of a .txt file, which keep their
    ends, nor before a conversation, whose template has its own marks, and a newline elsewhere.

    Raises:
        UserError: a conversation, and no chat template that takes it; or no document at all.
    """
    separator = "" if Path(source).suffix.lower() == ".txt" else "\n"
    if source in ("wikitext2", ALIASES["wikitext2"]["path"]):
        separator = " "
    index = -1
    for index, document in enumerate(documents):
        text = render(document, tokenizer, section)
        yield separator + text if index and isinstance(document, str) else text
    if index < 0:
        raise UserError(f"{section} text '{source}' is empty")


def is_streamed(source: str) -> bool:
    """Whether a source is a Hub dataset read over the network as it goes, of which only the start should be read."""
    if source in ALIASES:
        return ALIASES[source]["streaming"]
    return Path(source).suffix.lower() not in LOCAL


def render(document: Document, tokenizer, section: str = "calibration") -> str:
    """A document as text: conversations go through the tokenizer's chat template.

    Raises:
        UserError: the tokenizer has no chat template, or the template refuses the conversation.
    """
    if isinstance(document, str):
        return document
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"the {section} text is conversations, but the tokenizer has no chat template: {_other_column(section)}"
        )
    try:
        return render_chat(tokenizer, document)
    except Exception as error:  # templates are programs: jinja raises what they raise
        raise UserError(
            f"the chat template refuses a conversation of the {section} text ({first_line(error)})"
        ) from error


def _documents(rows: Iterable[dict], column: str | None, source: str, section: str) -> Iterator[Document]:
    """The entries of one column of numbered rows; null entries, which Hub datasets have, are passed over."""
    for number, row in enumerate(rows, start=1):
        if column is None:  # settled by the first row, so that a column cannot change within a file
            column = "messages" if "messages" in row else "text"
        if column not in row:
            close = nearest(column, list(row)) or f": it has {', '.join(row)}; {_other_column(section)}"
            raise UserError(f"'{source}' has no column '{column}' in row {number}{close}")
        value, where = row[column], f"'{source}', row {number}, column '{column}'"
        if value is None:
            continue
        document = value if isinstance(value, str) else _conversation(value, where, section)
        _check_characters(document, where)
        yield document


def _check_characters(document: Document, where: str) -> None:
    """Raise UserError for half a surrogate pair, which JSON can name and no tokenizer can read."""
    text = document if isinstance(document, str) else json.dumps(document, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("ascii", "backslashreplace").decode()
        raise UserError(f"{where} holds {half}, which is no character: correct it, or leave it out") from error


def _conversation(value: Any, where: str, section: str) -> Conversation:
    turns = value if isinstance(value, list) else [None]
    if not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns):
        kind = "a list without role and content in every turn" if isinstance(value, list) else type(value).__name__
        raise UserError(f"{where} is neither text nor a conversation ({kind}): {_other_column(section)}")
    return value


def _other_column(section: str) -> str:
    """How to read another column, where the caller has a key for it."""
    return "call the text column 'text'" if section == "sinks" else f"set {section}.column"


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


def _jsonl_rows(path: Path) -> Iterator[dict]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
            raise UserError(
                f"{path}, line {number} is not valid JSON ({reason}): correct it, or leave it out"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} holds {shown(row)}, not an object with a text column: correct it")
        yield row


def _parquet_rows(path: Path) -> Iterator[dict]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs pyarrow: pip install pyarrow, or give a .txt or .jsonl file") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        raise UserError(f"{path} cannot be read as parquet ({first_line(error)}): write it anew") from error


def _hub_rows(source: str, subset: str | None, split: str, section: str) -> Iterator[dict]:
    """Rows of a Hub dataset; any failure of the Hub, at the start or on the way, is one line to the user."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        remedy = "pip install datasets, or give a .txt, .jsonl or .parquet file"
        raise UserError(f"{section} text '{source}' is a Hub dataset, which needs datasets: {remedy}") from error
    request, empty = _request(source, subset, split, section), True
    try:
        for row in load_dataset(**request):
            empty = False
            yield row
    except Exception as error:  # the Hub client raises a dozen types, all meaning the same to the user
        raise UserError(
            f"{section} text '{source}' is neither a local file nor a Hub dataset that can be read"
            f" ({first_line(error)}): check {section}.source, subset and split, or give a local file"
        ) from error
    if empty:
        raise UserError(f"the Hub dataset '{source}' has no rows in split '{split}'")


def _request(source: str, subset: str | None, split: str, section: str) -> dict[str, Any]:
    """The arguments of `datasets.load_dataset`."""
    alias = ALIASES.get(source, {"path": source, "streaming": True})
    request = alias | {"name": subset or alias.get("name"), "split": split}
    if files := alias.get("data_files"):
        if subset is not None:
            raise UserError(
                f"{section}.subset = '{subset}': '{source}' is one part of {alias['path']}; name that dataset instead"
            )
        if split not in files:
            raise UserError(f"{section}.split = '{split}': '{source}' has {', '.join(files)}")
        request["data_files"] = {split: files[split]}
    return request
