"""Train a small LLaDA on any text with the masked-diffusion objective, on CPU or GPU, and save it in LLaDA's layout.

    python -m scripts.tools.train_tiny --text corpus.txt --valid-text heldout.txt --out tiny-llada --minutes 80 --resume

The state is saved every --save-every steps in OUT.training. After an interruption, the same command with --resume
continues from there and, with --steps, ends with the weights of an uninterrupted run. OUT itself appears complete or
not at all: config.json, model.safetensors (bf16), the tokenizer and train.log.

The defaults train a model like the one in the package: 4.8 M parameters, 7,400 steps of 3,072 tokens, about 80 minutes
on 2 CPU cores.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from scripts.tools import tiny_files as files
from scripts.tools import tiny_training as maths
from scripts.tools.script_line import OneLineParser, flag, one_line
from structprune import load_model
from structprune.calibration.noise import stratified_noise
from structprune.calibration.windows import cut_windows
from structprune.checkpoint.atomic import whole_directory
from structprune.checkpoint.output import check_output
from structprune.errors import UserError
from structprune.evaluation.nelbo import Nelbo, masked_nelbo
from structprune.models.configuration_structprune import StructpruneLLaDAConfig
from structprune.models.modeling_structprune import StructpruneLLaDA
from structprune.models.placement import pick_device

LOG = "train.log"
STEPS = 7400
# option -> (default, help); all are positive whole numbers
NUMBERS = {
    "d_model": (256, "width C"), "heads": (8, "attention heads"), "blocks": (5, "transformer blocks"),
    "mlp": (640, "MLP channels"), "vocabulary": (2048, "BPE tokens at most, including end of text and mask"),
    "length": (128, "tokens in a window; every fourth step has twice as long ones"), "batch": (24, "windows in a step"),
    "save_every": (200, "steps between saved states"), "log_every": (50, "steps between lines of train.log"),
    "valid_windows": (1024, "held-out windows at most"),
}  # fmt: skip
RESULT_DEPENDS_ON = (
    "d_model", "heads", "blocks", "mlp", "length", "batch", "steps", "minutes", "seed", "muon_lr", "adam_lr",
)  # fmt: skip


class Run:
    """A training run between two steps: everything needed to resume it exactly."""

    def __init__(self, options: argparse.Namespace, tokens: torch.Tensor, values: dict, settings: dict):
        torch.manual_seed(options.seed)  # initial weights
        keys = ("vocab_size", "embedding_size", "mask_token_id", "rope_theta", "rms_norm_eps")
        own = {key: values[key] for key in keys}
        self.model = StructpruneLLaDA(StructpruneLLaDAConfig(**own, **sizes(options))).to(options.device).train()
        self.optimizers = maths.make_optimizers(self.model, options.muon_lr, options.adam_lr)
        self.generator = torch.Generator().manual_seed(options.seed)  # windows and noise
        self.options, self.tokens, self.settings = options, tokens, settings
        self.warmup = min(maths.WARMUP, max(1, options.steps // 10)) if options.steps else maths.WARMUP
        self.step, self.seconds, self.log = 0, 0.0, [json.dumps(settings)]
        self.recent = {"loss": 0.0, "steps": 0, "tokens": 0, "since": 0.0}  # since the last line of the log

    @property
    def progress(self) -> float:
        """Finished share of the run."""
        share = self.step / self.options.steps if self.options.steps else self.seconds / (60 * self.options.minutes)
        return min(1.0, share)

    def advance(self) -> None:
        """One step."""
        start, device = time.perf_counter(), self.options.device
        factor, rates = maths.rate_factor(self.step, self.progress, self.warmup), maths.mask_rates(self.progress)
        maths.set_rates(self.optimizers, factor)
        count, length = maths.batch_shape(self.step, self.options.batch, self.options.length)
        ids = maths.draw_windows(self.tokens, count, length, self.generator)  # (B, T)
        masked = maths.draw_masks(count, length, rates, self.generator)  # (B, T)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = maths.masked_loss(self.model, ids.to(device), masked.to(device))
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.recent["loss"] += loss.item()
        self.recent["steps"] += 1
        self.recent["tokens"] += count * length
        self.seconds += time.perf_counter() - start
        if self.step % self.options.log_every == 0 or self.progress >= 1:
            self._write_line(factor)

    def _write_line(self, factor: float) -> None:
        recent = self.recent
        loss, speed = recent["loss"] / recent["steps"], recent["tokens"] / max(1e-9, self.seconds - recent["since"])
        if not math.isfinite(loss):
            raise UserError(f"training diverged before step {self.step}: lower --muon-lr and --adam-lr and --overwrite")
        line = f"step {self.step} min {self.seconds / 60:.1f} loss {loss:.3f} lr {factor:.3f} tokens/s {speed:,.0f}"
        self.log.append(line)
        append(self.options.log, line)
        self.recent = {"loss": 0.0, "steps": 0, "tokens": 0, "since": self.seconds}

    def state(self) -> dict:
        state = {key: getattr(self, key) for key in ("settings", "step", "seconds", "log", "recent")}
        state |= {"model": self.model.state_dict(), "generator": self.generator.get_state()}
        return state | {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def restore(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.generator.set_state(state["generator"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.log, self.recent = list(state["log"]), dict(state["recent"])


def sizes(options: argparse.Namespace) -> dict:
    """The model's sizes with the names of config.json."""
    return {
        "d_model": options.d_model, "n_heads": options.heads, "n_kv_heads": options.heads, "n_layers": options.blocks,
        "mlp_hidden_size": options.mlp, "max_sequence_length": 2 * options.length,
    }  # fmt: skip


def append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def prepare(options: argparse.Namespace, training: Path) -> tuple[Run, dict, torch.Tensor | None]:
    """The run (resumed if a state was saved), the contents of config.json, and held-out windows (N, T) or None."""
    if not (training / files.STATE).exists():
        if options.tokenizer:
            files.copy_tokenizer(options.tokenizer, training)
        else:
            texts = files.read_corpus(options.text, options.column)
            files.train_tokenizer(texts, options.vocabulary, 2 * options.length, training)
    tokenizer, vocabulary, mask_id = files.open_tokenizer(training)
    tokens = files.tokenize(options.text, options.column, tokenizer, 2 * options.length)
    windows = None
    if options.valid_text:
        valid = files.tokenize(options.valid_text, options.column, tokenizer, options.length)
        count = min(options.valid_windows, len(valid) // options.length)
        windows = cut_windows(valid, count, options.length, torch.Generator().manual_seed(1))  # (N, T)
    settings = {key: getattr(options, key) for key in RESULT_DEPENDS_ON}
    settings |= {"vocabulary": vocabulary, "text": files.digest(tokens)}
    values = files.config_values(tokenizer, vocabulary, mask_id, sizes(options))
    run = Run(options, tokens, values, settings)
    state = files.load_state(training / files.STATE, settings)
    if state:
        run.restore(state)
    options.log.write_text("\n".join(run.log) + "\n", encoding="utf-8")  # without lines later than the saved step
    return run, values, windows


def train(run: Run, training: Path, console: Console) -> None:
    """Run all steps, and save the state regularly."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("training", total=1.0)
        bar.update(task, completed=run.progress)
        while run.progress < 1:
            run.advance()
            last = run.log[-1] if len(run.log) > 1 else "training"
            bar.update(task, completed=run.progress, description=" ".join(last.split()[:6]))
            if run.step % run.options.save_every == 0 or run.progress >= 1:
                files.save_state(training / files.STATE, run.state())


def validate(directory: Path, windows: torch.Tensor, device: torch.device) -> Nelbo:
    """Held-out NELBO of the written checkpoint."""
    model = load_model(directory, device=device)
    noise = stratified_noise(windows, model.config.mask_token_id, torch.Generator().manual_seed(2))
    return masked_nelbo(model, windows, *noise, batch=32)


def finish(run: Run, values: dict, windows: torch.Tensor | None, training: Path) -> str:
    """Write OUT, with the held-out NELBO in its log; returns the last line of the log."""
    last = f"final steps {run.step}"
    with whole_directory(run.options.out, (LOG,) if run.options.overwrite else ()) as draft:
        files.write_checkpoint(run.model, values, training, draft)
        if windows is not None:
            nelbo = validate(draft, windows, run.options.device)
            score = f"{nelbo.mean:.4f} se {nelbo.standard_error:.4f} ce {nelbo.cross_entropy:.4f}"
            last += f" valid nelbo {score} windows {len(windows)}"
        append(run.options.log, last)
        (draft / LOG).write_text("\n".join([*run.log, last]) + "\n", encoding="utf-8")
    return last


def run_training(options: argparse.Namespace, console: Console) -> None:
    """Prepare, train and save.

    Raises:
        UserError: anything the user can mend.
    """
    if options.resume and not options.overwrite and (options.out / "config.json").exists():
        console.print(f"{options.out} is complete: nothing to do", soft_wrap=True)
        return
    options.out = check_output(options.out, None, options.overwrite, marks=(LOG,))
    with files.training_folder(options) as training:
        options.log = options.log or training / LOG
        run, values, windows = prepare(options, training)
        if run.step:
            console.print(f"continuing from step {run.step:,}")
        train(run, training, console)
        last = finish(run, values, windows, training)
    count, nbytes = run.model.num_parameters(), (options.out / "model.safetensors").stat().st_size
    console.print(f"Trained {count / 1e6:.1f} M parameters in {run.seconds / 60:.1f} minutes: {last}", soft_wrap=True)
    contents = f"config.json, model.safetensors {nbytes / 1e6:.1f} MB, tokenizer, {LOG}"
    console.print(f"Wrote {options.out} ({contents})", soft_wrap=True)
    example = f"structprune prune {options.out} --out {options.out}-0.5 --ratio 0.5 --calibration {options.text}"
    console.print(f"Prune it: {example} --set calibration.length={options.length}", soft_wrap=True)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Checked options; `device` as a torch device."""
    parser = OneLineParser(__doc__)
    parser.add_argument("--text", required=True, help="training text: .txt, .jsonl or .parquet")
    parser.add_argument("--valid-text", help="held-out text for the NELBO at the end")
    parser.add_argument("--column", help="of .jsonl and .parquet (default: text)")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory to write")
    parser.add_argument("--steps", type=int, help=f"length of the run (default {STEPS:,})")
    parser.add_argument("--minutes", type=float, help="length of the run in minutes, instead of --steps")
    for name, (default, text) in NUMBERS.items():
        parser.add_argument(flag(name), type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--muon-lr", type=float, default=0.007, help="peak rate, block matrices (default %(default)s)")
    parser.add_argument("--adam-lr", type=float, default=3e-3, help="peak rate, everything else (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of weights, windows and noise (default %(default)s)"
    )
    parser.add_device()
    parser.add_argument("--tokenizer", type=Path, help="reuse this checkpoint's tokenizer instead of training one")
    parser.add_argument("--log", type=Path, help="log file during training (default: OUT.training/train.log)")
    parser.add_argument("--resume", action="store_true", help="continue an unfinished run, if there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT once the new one is complete")
    options = parser.parse_args(arguments)
    if options.steps is not None and options.minutes is not None:
        raise UserError("--steps and --minutes both say how long to train: give one")
    if options.minutes is None:
        options.steps = STEPS if options.steps is None else options.steps
    for name in (*NUMBERS, "steps", "minutes", "muon_lr", "adam_lr"):
        value = getattr(options, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"{flag(name)} = {value}: give a positive number")
    if options.d_model % (2 * options.heads):
        raise UserError(f"--d-model = {options.d_model} does not divide into {options.heads} heads of even width")
    if options.vocabulary < files.SMALLEST_VOCABULARY:
        least = f"at least {files.SMALLEST_VOCABULARY} (every byte and two special tokens)"
        raise UserError(f"--vocabulary = {options.vocabulary}: give {least}")
    options.device = pick_device(options.device)
    return options


def main(arguments: list[str] | None = None) -> int:
    try:
        return one_line("train_tiny", lambda: run_training(parse_arguments(arguments), Console(stderr=True)))
    except KeyboardInterrupt:
        print("train_tiny: interrupted; --resume continues from the last saved step", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
