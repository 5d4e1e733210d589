"""Turn a Llama- or Qwen2-type causal LM into a masked diffusion LM in Dream's official layout, by LoRA, on CPU or GPU.

    python -m scripts.studies.adapt_causal ./SmolLM2-135M --text corpus.txt --out smollm2-dlm --resume

The source is a directory that transformers reads, or one with a GGUF file (or the file). Its weights stay; trained are
LoRA on the seven linears of every block, the norms and the mask token's embedding, with attention to all positions and
the masked-diffusion loss of Dream. Windows are masked at rates from --rate-low to a highest rate that grows from
--rate-high to 1 over the first --rate-rise of the run. The weights are fp32; on a GPU the products are bf16.

The state is saved every --save-every steps in OUT.training. After an interruption the same command with --resume goes
on from there and ends with the weights of an uninterrupted run. OUT appears complete or not at all: config.json,
safetensors, the tokenizer, and adaptation.json with the losses and the held-out figures before and after.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from scripts.studies import causal_layout as layout
from scripts.studies.causal_options import SHARES, parse_arguments
from scripts.studies.causal_training import Run, merge_adapters
from scripts.tools import tiny_files as files
from scripts.tools.script_line import one_line
from structprune import load_model, load_tokenizer
from structprune.calibration.noise import stratified_noise
from structprune.calibration.windows import cut_windows
from structprune.checkpoint.output import check_output, check_space, output_draft, write_json
from structprune.cli.console import progress_bars, show
from structprune.errors import Interrupted, UserError
from structprune.evaluation.nelbo import masked_nelbo
from structprune.models.encode import Batches
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.tokenizer import encode
from structprune.sinks.causal import gguf_file, load_causal, read_causal

REPORT = "adaptation.json"
RESULT_DEPENDS_ON = ("steps", "batch", "length", "rank", "alpha", "lr", "warmup", "seed", *SHARES)


def prepare_text(options: argparse.Namespace, tokenizer, mask: layout.MaskToken) -> tuple[torch.Tensor, torch.Tensor]:
    """Training tokens (number of tokens,) and held-out windows (N, T): of --valid-text, else the end of --text.

    Raises:
        UserError: too little text, or text that holds the mask token.
    """
    length, column = options.length, options.column
    tokens = files.tokenize(options.text, column, tokenizer, length)
    if options.valid_text:
        valid = files.tokenize(options.valid_text, column, tokenizer, length)
    else:
        held = min(options.valid_windows, len(tokens) // length // 10) * length
        if not held:
            raise UserError(
                f"--text '{options.text}' has {len(tokens):,} tokens, fewer than 10 windows of {length} of which one is"
                " held out: give longer text, lower --length, or give --valid-text"
            )
        tokens, valid = tokens[:-held], tokens[-held:]
    for source, ids in ((options.text, tokens), (options.valid_text or options.text, valid)):
        if count := int((ids == mask.id).sum()):
            raise UserError(f"'{source}' holds the mask token {mask.text} {count:,} times: choose another --mask-token")
    count = min(options.valid_windows, len(valid) // length)
    return tokens, cut_windows(valid, count, length, torch.Generator().manual_seed(1))


def prepare(options: argparse.Namespace, training: Path) -> tuple[Run, dict, torch.Tensor]:
    """The run (resumed if a state was saved), the contents of config.json, and held-out windows (N, T)."""
    config, tokenizer = read_causal(options.source)
    if (options.source / "tokenizer.json").is_file():  # transformers' class for a model type may replace parts of it
        tokenizer = load_tokenizer(options.source)
    layout.check_source(config, options.source)
    if name := gguf_file(options.source):
        layout.check_gguf(options.source if options.source.is_file() else options.source / name)
    if options.length > config.max_position_embeddings:
        limit = config.max_position_embeddings
        raise UserError(f"--length = {options.length}: {options.source} has {limit} positions, give at most that")
    mask = layout.choose_mask(tokenizer, config.vocab_size, options.mask_token)
    layout.save_tokenizer(tokenizer, training)
    written = load_tokenizer(training)
    sample = next(files.read_corpus(options.text, options.column))
    if encode(written, sample + mask.text) != encode(tokenizer, sample + mask.text):
        raise UserError(f"{options.source}: its tokenizer, written as tokenizer.json, encodes text differently")
    tokens, windows = prepare_text(options, written, mask)
    settings = {key: getattr(options, key) for key in RESULT_DEPENDS_ON}
    settings |= {"mask_token": mask.text, "text": files.digest(tokens), "held out": files.digest(windows)}
    state = files.load_state(training / files.STATE, settings)
    values = layout.dream_values(config, mask, written, getattr(torch, options.dtype))
    causal = load_causal(options.source, "float32", torch.device("cpu"))
    model = layout.build_dream(causal, values, options.source)
    del causal
    check_space(options.out, model.num_parameters() * getattr(torch, options.dtype).itemsize)
    token = escape(f"{mask.text} ({mask.where(config.vocab_size)})")
    show(f"Mask token {token}; {len(tokens):,} tokens of text", console=options.console)
    if state is None:
        before = measure(model.to(options.device), windows, options.device, "held out, before")
    run = Run(options, model, tokens, settings)
    if state is None:
        run.before = before
        files.save_state(training / files.STATE, run.state())
    else:
        run.restore(state)
        show(f"continuing from step {run.step:,}", console=options.console)
    return run, values, windows


def measure(model: DiffusionLM, windows: torch.Tensor, device: torch.device, title: str) -> dict[str, float]:
    """Held-out NELBO, its standard error, and masked cross-entropy, in nats per token; always under the same noise.

    Raises:
        UserError: one of them is no number.
    """
    noise = stratified_noise(
        windows, model.config.mask_token_id, torch.Generator().manual_seed(2), edges_visible=model.edges_visible
    )
    with progress_bars(Console(stderr=True)) as track:
        nelbo = masked_nelbo(model, windows, *noise, Batches.automatic(device), lambda items: track(items, title))
    result = {"nelbo": nelbo.mean, "standard_error": nelbo.standard_error, "cross_entropy": nelbo.cross_entropy}
    if not all(math.isfinite(value) for value in result.values()):
        raise UserError(f"{title}: the loss is no number, so the weights are damaged or training diverged: lower --lr")
    return result


def train(run: Run, training: Path) -> None:
    """Run all steps, and save the state regularly."""
    options, console = run.options, run.options.console
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(
        *columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=True,
        disable=not console.is_interactive,
    )  # fmt: skip
    with bar:
        task = bar.add_task("training", total=options.steps, completed=run.step)
        while run.step < options.steps:
            run.advance()
            bar.update(task, completed=run.step, description=f"training, loss {run.losses[-1]:.2f}")
            if run.step % options.log_every == 0:
                recent = sum(run.losses[-options.log_every :]) / options.log_every
                pace = run.seconds / run.step
                show(f"step {run.step:,} of {options.steps:,}: loss {recent:.3f}, {pace:.1f} s a step", console=console)
            if run.step % options.save_every == 0 or run.step == options.steps:
                files.save_state(training / files.STATE, run.state())


def finish(run: Run, values: dict, windows: torch.Tensor, training: Path) -> dict:
    """Write OUT and measure it; returns the contents of its adaptation.json."""
    options = run.options
    count = sum(p.numel() for p in run.trained.values())
    report = {"source": options.source.resolve().name, "settings": run.settings, "trained": count}
    report |= {"seconds": run.seconds, "losses": run.losses}
    model = merge_adapters(run.wrapper)
    size = model.num_parameters() * getattr(torch, options.dtype).itemsize
    with output_draft(options.out, options.overwrite, {}, size, (REPORT,)) as draft:
        layout.write_dream(model, values, training, draft)
        del model, run.model, run.wrapper, run.trained, run.optimizer  # two models might not fit the memory
        after = measure(load_model(draft, device=options.device), windows, options.device, "held out, after")
        report |= {"held_out": {"windows": len(windows), "before": run.before, "after": after}}
        write_json(draft / REPORT, report)
    return report


def run_training(options: argparse.Namespace) -> None:
    """Prepare, train and save.

    Raises:
        UserError: anything the user can mend.
    """
    if options.resume and not options.overwrite and (options.out / REPORT).exists():
        show(f"{options.out} is complete: nothing to do", console=options.console)
        return
    options.out = check_output(options.out, options.source, options.overwrite, marks=(REPORT,))
    with files.training_folder(options) as training:
        run, values, windows = prepare(options, training)
        train(run, training)
        report = finish(run, values, windows, training)
    show_report(report, values, options)


def show_report(report: dict, values: dict, options: argparse.Namespace) -> None:
    """What was made, where, and what to do with it."""
    before, after = report["held_out"]["before"], report["held_out"]["after"]
    size = sum(path.stat().st_size for path in options.out.glob("*.safetensors")) / 1e6
    show(
        f"Trained {report['trained'] / 1e6:.2f} M numbers: {options.steps:,} steps, {report['seconds']:,.0f} s",
        f"Held out, {report['held_out']['windows']} windows, nats per token:"
        f" NELBO {before['nelbo']:.3f} ± {before['standard_error']:.3f} before,"
        f" {after['nelbo']:.3f} ± {after['standard_error']:.3f} after;"
        f" masked cross-entropy {before['cross_entropy']:.3f} before, {after['cross_entropy']:.3f} after",
        f"Wrote {options.out} (Dream's layout, {values['num_hidden_layers']} blocks, mask id {values['mask_token_id']},"
        f" {size:.1f} MB of {options.dtype})",
    )
    if "head_dim" in values:
        show(f"It needs head_dim = {values['head_dim']}, a key that structprune reads and Dream's own code does not")
    example = f"structprune prune {options.out} --out {options.out}-0.5 --ratio 0.5 --calibration {options.text}"
    show(f"Prune it: {example} --set calibration.length={options.length}")


def main(arguments: list[str] | None = None) -> int:
    try:
        return one_line("adapt_causal", lambda: run_training(parse_arguments(__doc__, arguments)))
    except KeyboardInterrupt:
        print("adapt_causal: interrupted; --resume continues from the last saved state", file=sys.stderr)
    except Interrupted as error:
        print(f"adapt_causal: interrupted: {error}", file=sys.stderr)
    return 130


if __name__ == "__main__":
    sys.exit(main())
