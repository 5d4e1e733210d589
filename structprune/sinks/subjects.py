"""The subject of a measurement: a diffusion or causal language model with its tokenizer, and the text it reads."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from structprune.assets import NAME, model_directory
from structprune.calibration.text import LOCAL, join_texts, read_texts
from structprune.calibration.windows import cut_windows, tokenize_corpus
from structprune.config import ModelSettings
from structprune.errors import UserError
from structprune.models.checkpoint_files import locate, read_config
from structprune.models.loading import load_config, load_model, source_name
from structprune.models.official import detect_family
from structprune.models.placement import pick_device
from structprune.models.tokenizer import encode, load_tokenizer
from structprune.sinks.causal import gguf_file, is_causal, load_causal, read_causal

LONGEST = 1 << 22  # at most so many tokens of a text are read


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, with or without its weights.

    Attributes:
        name: Hub id, or the directory's own name.
        causal: a causal language model of transformers, else a diffusion LM.
        model: None before weights are read.
        positions: maximum length of a text; None if its config names none.
        mask_id: mask token of a diffusion LM.
        config: from transformers for a causal LM, else ours.
    """

    name: str
    causal: bool
    model: Any
    tokenizer: Any
    positions: int | None
    mask_id: int | None
    config: Any = None


def find_kind(source: str) -> tuple[Path, bool]:
    """Where a checkpoint lies, and whether it is a causal LM; reads no weights.

    Raises:
        UserError: no such checkpoint, or neither a diffusion LM that structprune reads nor a causal LM of transformers.
    """
    path = Path(source)
    if path.is_file() and path.suffix == ".gguf":
        return path, True
    directory = locate(source, weights=False)
    if is_causal(directory):
        return directory, True
    try:
        detect_family(read_config(directory), directory)
    except UserError as error:
        raise UserError(f"{error}; nor is it a causal language model of transformers") from error
    return directory, False


def describe_subject(source: str, place: ModelSettings) -> Subject:
    """A checkpoint's configuration and tokenizer; reads no weights.

    Args:
        place: with what a diffusion LM's config.json may not say.
    Raises:
        UserError: anything wrong with them, in one line.
    """
    directory, causal = find_kind(source)
    name = source_name(source, directory)
    if not causal:
        directory, family, config, _ = load_config(source, place.mask_id, block_size=place.block_size)
        name = NAME if directory.resolve() == model_directory().resolve() else name
        longest = getattr(config, family.keys["positions"])
        return Subject(name, False, None, load_tokenizer(directory), longest, config.mask_token_id, config)
    config, tokenizer = read_causal(directory)
    file = gguf_file(directory)
    name = name if file is None else Path(file).stem
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return Subject(name, True, None, tokenizer, longest, None, config)


def open_subject(source: str, subject: Subject, place: ModelSettings) -> Subject:
    """The same subject with its weights loaded.

    Raises:
        UserError: anything wrong with the checkpoint, in one line.
    """
    device = pick_device(place.device)
    if not subject.causal:
        model = load_model(source, place.dtype, device, **place.reading)
        return replace(subject, model=model)
    path = Path(source)
    return replace(subject, model=load_causal(path if path.exists() else locate(source), place.dtype, device))


def check_text(text: Path) -> None:
    """Raise UserError for a text that does not exist or has an unknown file type."""
    if not text.is_file():
        raise UserError(f"no text at '{text}': give a {', '.join(LOCAL)} file")
    if text.suffix.lower() not in LOCAL:
        raise UserError(f"text '{text}' is not one of {', '.join(LOCAL)}: convert it")


def windows_of(subject: Subject, text: Path, count: int, length: int, seed: int) -> torch.Tensor:
    """`count` windows of `length` tokens of a text, (N, T) int64; each starts with a BOS if the tokenizer adds one.

    Raises:
        UserError: windows longer than the model's positions, or a text that is too short.
    """
    start = _start(subject.tokenizer)
    _check_length(subject, length, "--length")
    documents = join_texts(read_texts(str(text), section="sinks"), str(text), subject.tokenizer, "sinks")
    tokens = tokenize_corpus(documents, subject.tokenizer, LONGEST)  # (M,)
    inner = length - len(start)
    if len(tokens) < count * inner:
        raise UserError(
            f"text '{text}' has {len(tokens):,} tokens for {subject.name}, too short for {count} windows of {inner}:"
            " give a longer one, or lower --windows or --length"
        )
    windows = cut_windows(tokens, count, inner, torch.Generator().manual_seed(seed))  # (N, T or T - 1)
    return torch.cat((torch.tensor([start] * count, dtype=torch.long).view(count, -1), windows), dim=1)


def prompt_of(subject: Subject, prompt: str, gen_length: int) -> torch.Tensor:
    """A prompt's tokens, (1, P) int64.

    Raises:
        UserError: the prompt is empty, or too long for the model together with the generated tokens.
    """
    tokens = encode(subject.tokenizer, prompt)
    if not tokens:
        raise UserError("--prompt is empty: give it at least one word")
    tokens = [*_start(subject.tokenizer), *tokens]
    _check_length(subject, len(tokens) + gen_length, f"the prompt's {len(tokens)} tokens and --gen-length {gen_length}")
    return torch.tensor([tokens], dtype=torch.long)


def _start(tokenizer) -> list[int]:
    """The BOS, if the tokenizer puts one before a text."""
    first = encode(tokenizer, "a", special=True)[:1]
    return first if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else []


def _check_length(subject: Subject, length: int, what: str) -> None:
    if subject.positions is not None and length > subject.positions:
        remedy = "lower it" if what.startswith("--") else "shorten either"
        size = f"{what} = {length}" if what.startswith("--") else f"{what} make {length} tokens, which"
        raise UserError(f"{size} exceeds the {subject.positions} positions of {subject.name}: {remedy}")
