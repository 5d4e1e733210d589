"""What the studies on the embedded model share: held-out text with common noise, runs that resume, paired intervals."""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Callable

import torch
from rich.console import Console

from structprune.assets import model_directory, text_file
from structprune.calibration.noise import stratified_noise
from structprune.calibration.windows import cut_windows
from structprune.evaluation.compare import paired_difference
from structprune.evaluation.nelbo import Nelbo, masked_nelbo
from structprune.models.loading import load_tokenizer
from structprune.models.modeling_structprune import DiffusionLM
from structprune.report.progress import progress_bars


class HeldOut:
    """Windows of held-out text and noise of a seed, which all variants of that seed share."""

    def __init__(self, model: DiffusionLM, seed: int, windows: int, length: int):
        text = text_file("heldout.txt").read_text(encoding="utf-8")
        ids = torch.tensor(load_tokenizer(model_directory())(text, verbose=False)["input_ids"])  # (M,)
        generator = torch.Generator().manual_seed(1000 + seed)
        self.ids = cut_windows(ids, windows, length, generator)  # (N, T)
        self.noise = stratified_noise(self.ids, model.config.mask_token_id, generator)
        self.dense = self.nelbo(model)

    def nelbo(self, model: DiffusionLM) -> Nelbo:
        return masked_nelbo(model, self.ids, *self.noise, batch=32)

    def loss(self, model: DiffusionLM) -> list[float]:
        """Loss of NELBO against the dense model per window, nats per token."""
        return (self.nelbo(model).nelbo - self.dense.nelbo).tolist()


def run_all(
    measure: Callable[..., dict], tasks: list[tuple], partial: Path, jobs: int, console: Console
) -> dict[tuple[str, int], dict]:
    """Run what `partial` has not yet, in `jobs` processes, and keep every result there as it comes.

    Args:
        measure: a module's function, called as `measure(*task, threads)`; its rows have `variant` and `seed`.
        tasks: (variant, seed, ...) each.
    Returns:
        (variant, seed) -> row.
    """
    lines = partial.read_text(encoding="utf-8").splitlines() if partial.exists() else []
    done = {(row["variant"], row["seed"]): row for row in map(json.loads, lines)}
    left = [task for task in tasks if task[:2] not in done]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool, progress_bars(console) as track:
        running = [pool.submit(measure, *task, threads) for task in left]
        finished = as_completed(running)
        for _ in track(running, "variants x seeds"):
            row = next(finished).result()
            done[row["variant"], row["seed"]] = row
            with partial.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    return {task[:2]: done[task[:2]] for task in tasks}


def losses(done: dict, name: str, seeds: list[int], ratio: str) -> torch.Tensor:
    """Losses of one variant at one ratio over seeds and windows, (seeds, N) fp64."""
    return torch.tensor([done[name, seed]["ratios"][ratio]["loss"] for seed in seeds], dtype=torch.float64)


def loss_row(done: dict, name: str, seeds: list[int], ratio: str) -> dict:
    """Mean loss of one variant with its 95% interval over all windows and seeds, as plain data."""
    loss = losses(done, name, seeds, ratio)  # (seeds, N)
    return {**paired_difference(loss.flatten(), torch.zeros(loss.numel())), "by_seed": loss.mean(1).tolist()}


def contrast_row(done: dict, ours: tuple[str, str], theirs: tuple[str, str], seeds: list[int]) -> dict:
    """Paired difference of two (variant, ratio) with its 95% interval, as plain data; positive: ours loses more."""
    gap = losses(done, ours[0], seeds, ours[1]) - losses(done, theirs[0], seeds, theirs[1])  # (seeds, N)
    return {**paired_difference(gap.flatten(), torch.zeros(gap.numel())), "by_seed": gap.mean(1).tolist()}


def add_options(parser, out: str) -> None:
    """The arguments every study has."""
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=192, help="held-out windows per seed")
    parser.add_argument("--length", type=int, default=128, help="tokens in each")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")


def write_result(result: dict, out: Path, partial: Path) -> None:
    """The JSON whole or not at all; then what it was made of goes."""
    draft = out.with_suffix(".part")
    draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draft.replace(out)
    partial.unlink(missing_ok=True)
