"""The command line of adapt_causal.py: its options, their defaults and bounds."""

import argparse
import math
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from scripts.tools.script_line import OneLineParser, check_counts, flag
from structprune.calibration.text import LOCAL
from structprune.errors import UserError
from structprune.models.placement import pick_device

COUNTS = {  # option -> (default, help)
    "steps": (240, "length of the run"), "batch": (8, "windows in a step"), "length": (128, "tokens in a window"),
    "rank": (32, "of LoRA"), "save_every": (20, "steps between saved states"),
    "log_every": (10, "steps between lines about the loss"), "valid_windows": (64, "held-out windows at most"),
}  # fmt: skip
SHARES = {
    "rate_low": (0.05, "lowest mask rate"), "rate_high": (0.5, "highest mask rate at the start"),
    "rate_rise": (0.33, "share of the run over which it grows to 1; 0: it is 1 throughout"),
}  # fmt: skip


def parse_arguments(description: str | None, arguments: list[str] | None) -> argparse.Namespace:
    """Checked options; `device` as a torch device."""
    parser = OneLineParser(description)
    parser.add_argument("source", type=Path, help="causal checkpoint: a directory, or a GGUF file")
    parser.add_argument("--text", required=True, help="training text: .txt, .jsonl or .parquet")
    parser.add_argument("--valid-text", help="held-out text (default: the end of --text, up to a tenth of it)")
    parser.add_argument("--column", help="of .jsonl and .parquet (default: text)")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory to write")
    parser.add_argument("--mask-token", help="an added token of the vocabulary without another use (default: the mask"
                        " token, else a reserved token, else a new one)")  # fmt: skip
    for name, (default, text) in COUNTS.items():
        parser.add_argument(flag(name), type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--micro-batch", type=int, help="windows in a forward pass, gradients added (default: --batch)")
    parser.add_argument("--alpha", type=int, help="LoRA's: its part is scaled by alpha / rank (default: --rank)")
    parser.add_argument("--warmup", type=int, help="steps over which the learning rate rises (default: a twentieth)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate; it falls to 0 over the last 60%% of"
                        " the run (default %(default)s)")  # fmt: skip
    for name, (share, text) in SHARES.items():
        parser.add_argument(flag(name), type=float, default=share, help=f"{text} (default {share})")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the written"
                        " weights (default %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of LoRA, windows and noise (default %(default)s)")
    parser.add_device()
    parser.add_argument("--resume", action="store_true", help="continue an unfinished run, if there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT once the new one is complete")
    return check_options(parser.parse_args(arguments))


def check_options(options: argparse.Namespace) -> argparse.Namespace:
    """The options with defaults that depend on others filled in.

    Raises:
        UserError: a value out of bounds, a source or text that is not there, peft missing.
    """
    options.micro_batch = options.batch if options.micro_batch is None else options.micro_batch
    options.alpha = options.rank if options.alpha is None else options.alpha
    options.warmup = max(1, options.steps // 20) if options.warmup is None else options.warmup
    check_counts(options, (*COUNTS, "micro_batch", "alpha", "warmup"))
    if options.micro_batch > options.batch:
        raise UserError(f"--micro-batch = {options.micro_batch} exceeds --batch = {options.batch}: lower it")
    if options.length < 3:
        raise UserError(f"--length = {options.length}: give at least 3, as the first and last token are never masked")
    if not (options.lr > 0 and math.isfinite(options.lr)):
        raise UserError(f"--lr = {options.lr}: give a positive number")
    if not 0 < options.rate_low < options.rate_high <= 1:
        given = f"--rate-low {options.rate_low:g} --rate-high {options.rate_high:g}"
        raise UserError(f"{given}: give mask rates with 0 < low < high, high at most 1")
    if not 0 <= options.rate_rise <= 1:
        raise UserError(f"--rate-rise = {options.rate_rise:g} is no share of the run: give 0 to 1")
    if not options.source.exists():
        raise UserError(f"no causal checkpoint at '{options.source}': give a directory, or a GGUF file")
    for option, text in (("--text", options.text), ("--valid-text", options.valid_text)):
        if text is not None and not (Path(text).is_file() and Path(text).suffix.lower() in LOCAL):
            raise UserError(f"{option} '{text}' is no file of {', '.join(LOCAL)}: give one")
        if text is not None and options.column and Path(text).suffix.lower() == ".txt":
            raise UserError(f"--column '{options.column}' means nothing for {option} '{text}': leave it out")
    if find_spec("peft") is None:
        raise UserError("LoRA needs peft: pip install peft")
    options.device, options.console = pick_device(options.device), Console(stderr=True)
    return options
