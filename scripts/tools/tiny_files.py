"""Files of training runs: text, tokenizer, the folder of an unfinished run, its state, and the finished checkpoint."""

import argparse
import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from structprune.assets import model_directory
from structprune.calibration.text import join_texts, read_texts
from structprune.calibration.windows import pieces, tokenize_corpus
from structprune.errors import UserError
from structprune.files import write_whole
from structprune.models.checkpoint_files import TOKENIZER_FILES, read_json
from structprune.models.modeling_structprune import StructpruneLLaDA
from structprune.models.official import find_mask_id
from structprune.models.tokenizer import load_tokenizer

STATE = "state.pt"  # of an unfinished run, in its training folder
END, MASK = "<|endoftext|>", "<|mdm_mask|>"
SMALLEST_VOCABULARY = 258  # every byte and the two special tokens
LONGEST = 1 << 28  # at most so many tokens of text (1 GB as int32)


def read_corpus(source: str, column: str | None) -> Iterator[str]:
    """The text of a .txt, .jsonl or .parquet file (or Hub dataset) in parts."""
    return join_texts(read_texts(source, column=column), source, None)


def train_tokenizer(texts: Iterator[str], vocabulary: int, longest: int, directory: Path) -> None:
    """Train byte-level BPE of at most `vocabulary` tokens for `longest` positions; end of text and mask come last."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - 2, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(pieces(texts), trainer)
    tokenizer.add_special_tokens([END, MASK])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"clean_up_tokenization_spaces": False, "eos_token": END, "mask_token": MASK, "pad_token": END}
    settings |= {"model_max_length": longest, "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(directory / "tokenizer_config.json", settings)


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy the tokenizer of a checkpoint directory.

    Raises:
        UserError: the directory has none.
    """
    if not (source / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer '{source}' has no tokenizer.json: give a checkpoint directory with one")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def open_tokenizer(directory: Path):
    """(tokenizer, size of its vocabulary, mask id).

    Raises:
        UserError: it has no mask token.
    """
    tokenizer = load_tokenizer(directory)
    try:
        mask_id = find_mask_id({}, directory)
    except UserError as error:
        raise UserError("the tokenizer given by --tokenizer has no mask token: leave --tokenizer out") from error
    return tokenizer, 1 + max(tokenizer.get_vocab().values()), mask_id


def tokenize(source: str, column: str | None, tokenizer, shortest: int) -> torch.Tensor:
    """Token ids of a text, (number of tokens,) int32.

    Raises:
        UserError: fewer than `shortest` tokens.
    """
    tokens = tokenize_corpus(read_corpus(source, column), tokenizer, LONGEST)
    if len(tokens) < shortest:
        raise UserError(
            f"'{source}' has {len(tokens):,} tokens, fewer than one window of {shortest}: give longer text"
            " or lower --length"
        )
    return tokens


def digest(tokens: torch.Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]


def config_values(tokenizer, vocabulary: int, mask_id: int, sizes: dict) -> dict:
    """config.json in LLaDA's official layout: the embedded model's with other sizes and ids."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else mask_id
    ids = {"mask_token_id": mask_id, "eos_token_id": end, "pad_token_id": end}
    ids |= {"vocab_size": vocabulary, "embedding_size": vocabulary}
    return read_json(model_directory() / "config.json") | ids | sizes


def save_state(path: Path, state: dict) -> None:
    """Replace the training state at once, so that an interruption at any time leaves a complete one."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue())


def load_state(path: Path, settings: dict) -> dict | None:
    """The last training state saved with the same settings; None if there is none.

    Raises:
        UserError: it cannot be read, or was saved with other settings.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises errors of many types
        raise UserError(f"{path} cannot be read ({type(error).__name__}): start anew with --overwrite") from error
    for key, value in settings.items():
        before = state["settings"].get(key)
        if before != value:
            remedy = "use the same value, or start anew with --overwrite"
            raise UserError(f"{path} was saved with {key} = {before}, not {value}: {remedy}")
    return state


def write_checkpoint(model: StructpruneLLaDA, values: dict, training: Path, draft: Path) -> None:
    """Write weights in bf16, config.json and the tokenizer of the training directory into `draft`."""
    state = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_file(state, draft / "model.safetensors", metadata={"format": "pt"})
    write_json(draft / "config.json", values)
    for name in TOKENIZER_FILES:
        if (training / name).is_file():
            shutil.copyfile(training / name, draft / name)


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def training_folder(options: argparse.Namespace) -> Iterator[Path]:
    """The folder beside `options.out` in which a run keeps its state; it stays only where there is a run to continue.

    Raises:
        UserError: it holds an unfinished run, and neither `options.resume` nor `options.overwrite` says what to do.
    """
    folder = options.out.absolute().with_name(options.out.name + ".training")
    if (folder / STATE).exists() and not options.resume:
        if not options.overwrite:
            raise UserError(f"{folder} holds an unfinished run: continue with --resume, or start anew with --overwrite")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except BaseException:
        if not (folder / STATE).exists():
            shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
