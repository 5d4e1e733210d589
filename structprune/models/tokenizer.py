"""The checkpoint's own tokenizer and chat template, by transformers' classes only: no code from a checkpoint runs."""

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from structprune.errors import UserError, shown
from structprune.files import first_line
from structprune.models.checkpoint_files import TOKENIZER_FILES, check_file, is_byte_pair, read_json
from structprune.models.quiet import quiet_transformers

TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token", "sep_token", "cls_token")
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {  # file -> key -> types
    "tokenizer_config.json": dict.fromkeys(TOKENS, (str, dict))
    | {
        "added_tokens_decoder": (dict,), "model_max_length": (int, float), "tokenizer_class": (str,),
        "chat_template": (str, list, dict), "auto_map": (dict, list),
    },
    "tokenizer.json": {"added_tokens": (list,), "model": (dict,)},
}  # fmt: skip
TYPE_NAMES = {str: "text", dict: "an object", list: "a list", int: "a number", float: "a number"}
PROBE = "A few words,\nand 3.5."  # encoded once, because some damage shows only then
GENERATION = re.compile(r"{%[+-]?\s*(end)?generation\s*[+-]?%}")  # marks that only transformers' templates have
LARGEST_FACTOR = 10_000  # in a product of a chat template
TEMPLATE_SECONDS = 10.0  # that a chat template may take for one conversation; usual ones take milliseconds


def check_tokenizer_files(directory: Path) -> None:
    """Check the tokenizer's files and others that are read or copied, as far as there are any.

    Raises:
        UserError: one is no file, of JSON and no object, or has a field of another type than transformers expects.
    """
    for name in (*TOKENIZER_FILES, "generation_config.json", "README.md"):
        if (path := directory / name).exists():
            check_file(path)
            values = read_json(path) if path.suffix == ".json" else {}
            for key, kinds in FIELDS.get(name, {}).items():
                _check_field(path, key, values.get(key), kinds)
            _check_added(path, values)


def _check_field(path: Path, key: str, value: Any, kinds: tuple[type, ...]) -> None:
    """Raise UserError unless a value is null or of one of some types; text in an object is its `content`."""
    valid = value is None or isinstance(value, kinds)
    if key in TOKENS and isinstance(value, dict):
        valid = isinstance(value.get("content"), str)
    if not valid:
        names = " or ".join(dict.fromkeys(TYPE_NAMES[kind] for kind in kinds))
        names += " with its text as 'content'" if key in TOKENS else ""
        raise UserError(f"{path}: {key} = {shown(value)} is not {names}: correct it, or download the file again")


def _check_added(path: Path, values: dict) -> None:
    """Raise UserError for an added token that is none."""
    added = values.get("added_tokens_decoder" if path.name == "tokenizer_config.json" else "added_tokens") or []
    entries = added.items() if isinstance(added, dict) else enumerate(added)
    for number, entry in entries if path.name in FIELDS else ():
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not str(number).isdecimal():
            needs = "must be a number and an object with its text as 'content': download the file again"
            raise UserError(f"{path}: the added token {shown(number)}: {shown(entry)} {needs}")


def load_tokenizer(directory: str | Path) -> Any:
    """The checkpoint's own tokenizer, by transformers' classes only (no remote code).

    Raises:
        UserError: the directory has no tokenizer, or none that can be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

    directory, kind = Path(directory), cast(Any, AutoTokenizer)
    check_tokenizer_files(directory)
    # the official files name classes that only their remote code has: a fast tokenizer is its tokenizer.json, and
    # DreamTokenizer, which comes as vocabulary and merges, is Qwen2's under another name
    if complete := (directory / "tokenizer.json").exists():
        kind = PreTrainedTokenizerFast
    elif is_byte_pair(directory):
        kind = Qwen2Tokenizer
    try:
        with quiet_transformers(), hidden_panics():
            # never asks whether to run the checkpoint's code, which it would on a terminal without the argument
            tokenizer = kind.from_pretrained(directory, trust_remote_code=False)
            tokenizer(PROBE, verbose=False)
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        reason = f"no tokenizer that can be read without remote code ({first_line(error)})"
        remedy = "download tokenizer.json and tokenizer_config.json again" if complete else "add tokenizer.json"
        raise UserError(f"{directory}: {reason}: {remedy}") from error
    return tokenizer


def encode(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """The tokens of a text.

    Args:
        special: with those that the tokenizer adds, such as a BOS.
    Raises:
        UserError: the tokenizers library panics.
    """
    try:
        with hidden_panics():
            return tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
    except BaseException as error:
        if not is_panic(error):
            raise
        raise UserError(
            f"the tokenizer fails on the text ({first_line(error)}): download tokenizer.json again"
        ) from error


def is_panic(error: BaseException) -> bool:
    """Whether the tokenizers library panicked: its exception is not an `Exception`."""
    return type(error).__name__ == "PanicException"


@contextmanager
def hidden_panics() -> Iterator[None]:
    """Holds back what is written to file descriptor 2 meanwhile, and drops it if the tokenizers library panics.

    A panic writes dozens of lines there, past `sys.stderr`.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # closed
        yield
        return
    with tempfile.TemporaryFile() as hidden:
        os.dup2(hidden.fileno(), 2)
        panicked = False
        try:
            yield
        except BaseException as error:
            panicked = is_panic(error)
            raise
        finally:
            os.dup2(stderr, 2)
            if not panicked:
                hidden.seek(0)
                os.write(stderr, hidden.read())
            os.close(stderr)


@lru_cache
def check_template(template: str) -> None:
    """Refuse a chat template with an operation that alone may take for ever: a power, or a product with a large number.

    No template needs one; and between two steps of a template nothing can end it.

    Raises:
        ValueError: it has one.
    """
    import jinja2

    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION.sub("", template))
    except jinja2.TemplateError:  # transformers says why
        return
    if next(tree.find_all(jinja2.nodes.Pow), None) is not None:
        raise ValueError("it computes a power")
    for product in tree.find_all(jinja2.nodes.Mul):
        for factor in product.find_all(jinja2.nodes.Const):
            if isinstance(factor.value, int) and factor.value > LARGEST_FACTOR:
                raise ValueError(f"it multiplies by {shown(factor.value)}")


def render_chat(tokenizer: Any, messages: Sequence[dict[str, Any]], **options: Any) -> str:
    """A conversation as text, by the tokenizer's chat template, a program that came with the checkpoint.

    transformers runs it in a sandbox, where it can do no harm but may never end: `TEMPLATE_SECONDS` is its time.

    Args:
        options: of `apply_chat_template`.
    Raises:
        Exception: whatever the template raises; `TimeoutError`; ValueError: see `check_template`.
    """
    templates = getattr(tokenizer, "chat_template", None)
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        check_template(str(template))
    end, before = time.monotonic() + TEMPLATE_SECONDS, sys.gettrace()

    def watch(frame, event, argument):  # called at every line of Python that runs
        if time.monotonic() > end:
            raise TimeoutError(f"it did not end within {TEMPLATE_SECONDS:g} seconds")
        return watch

    sys.settrace(watch)
    try:
        # a diffusion LM has no room to think aloud first: Qwen3's template then leaves its thoughts empty
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **{"enable_thinking": False, **options})
    finally:
        sys.settrace(before)
