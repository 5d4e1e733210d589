"""A run of `structprune sinks`: models opened, trajectories measured, figures and pictures written."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from rich.console import Console

from structprune import __version__
from structprune.assets import text_file
from structprune.checkpoint.atomic import whole_directory
from structprune.checkpoint.output import check_output
from structprune.config import SinkSettings
from structprune.errors import UserError, nearest
from structprune.evaluation.samplers import generation_settings
from structprune.models.families import family_of
from structprune.models.placement import pick_device
from structprune.report.plots import check_matplotlib
from structprune.report.progress import progress_bars
from structprune.report.sink_plots import draw_all
from structprune.report.sink_tables import property_table, token_tables
from structprune.sinks.causal import generation_trajectory
from structprune.sinks.diffusion import Track, forward_trajectory, reverse_trajectory
from structprune.sinks.figures import json_text, position_figures, trajectory_figures
from structprune.sinks.subjects import Subject, check_text, find_kind, open_subject, prompt_of, windows_of
from structprune.sinks.tokens import Vocabulary
from structprune.sinks.trajectory import Trajectory

Which = Literal["forward", "reverse", "both"]
RESULT = "sinks.json"


@dataclass(frozen=True)
class SinkRun:
    """What is measured, and on what.

    Raises:
        UserError: values that contradict each other or cannot be used.
    """

    text: str | None = None
    """A .txt, .jsonl or .parquet file; default the package's own held-out text."""
    prompt: str | None = None
    """Generate from this instead of from the first half of every window; the noise levels are then of the prompt."""
    trajectory: str | None = None
    """forward, reverse or both; default both, of a causal LM reverse."""
    windows: int = 8
    """N: sequences of the text."""
    length: int = 128
    """T: tokens of a window, and of a prompt together with what is generated."""
    gen_length: int | None = None
    """Generated tokens; default half the length, with a prompt 64."""
    levels: int = 10
    """Noise levels."""
    steps: int | None = None
    """Denoising steps; default one per generated token."""
    block_length: int | None = None
    """Of LLaDA's sampler; default the whole generation."""
    seed: int = 0
    """Draws windows and noise."""
    sink: SinkSettings = field(default_factory=SinkSettings)
    """α, κ and scale_free of φ."""

    def __post_init__(self):
        for name in ("windows", "length", "gen_length", "levels", "steps", "block_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} = {value} is no count: give a whole number from 1")
        if self.trajectory is not None and self.trajectory not in get_args(Which):
            known = list(get_args(Which))
            raise UserError(
                f"unknown trajectory '{self.trajectory}'{nearest(self.trajectory, known)}: {', '.join(known)}"
            )
        if self.text is not None and self.prompt is not None:
            raise UserError("--text and --prompt both say what the model is given: leave one out")
        if self.prompt is not None and not self.prompt.strip():
            raise UserError("--prompt is empty: give it at least one word")
        if self.prompt is None and self.generated >= self.length:
            raise UserError(f"--gen-length = {self.generated} leaves no prompt in windows of --length {self.length}")
        if self.trajectory == "forward" and any(value is not None for value in (self.steps, self.block_length)):
            raise UserError("--steps and --block-length are of generation: leave them out for --trajectory forward")

    @property
    def generated(self) -> int:
        """Tokens generated after a prompt."""
        return self.gen_length or (64 if self.prompt is not None else self.length // 2)

    def wants(self, kind: str) -> bool:
        return self.trajectory in (None, "both", kind)


def sinks_and_show(
    checkpoint: str,
    out: Path,
    run: SinkRun,
    against: str | None,
    device: str | None,
    dtype: str | None,
    mask_id: int | None,
    pickle: bool,
    overwrite: bool,
) -> None:
    """`structprune sinks`: measure one model, or two, write figures and pictures, and say what was found.

    Raises:
        UserError: anything the user can mend, before the long work where it can be known then.
    """
    check_matplotlib()
    sources = [checkpoint] if against is None else [checkpoint, against]
    for source in sources:
        directory, causal = find_kind(source)
        check_output(out, directory, overwrite, 20_000_000, marks=(RESULT,))
        if causal and run.trajectory in ("forward", "both"):
            remedy = "leave --trajectory out, or give reverse"
            raise UserError(f"'{source}' is a causal language model, which has no noise levels: {remedy}")
    if run.text is not None:
        check_text(Path(run.text))
    place, measured = pick_device(device), []
    with progress_bars(Console(stderr=True)) as track:
        for source in sources:
            subject = open_subject(source, place, dtype, mask_id, pickle)
            measured += measure(subject, run, track)
            del subject  # before the next one is loaded
    result = {"structprune": __version__, "settings": _settings(run), "runs": measured}
    with whole_directory(out) as draft:
        (draft / RESULT).write_text(json_text(result), encoding="utf-8")
        made = draw_all(measured, draft)
    console = Console()
    console.print(property_table(measured))
    for table in token_tables(measured):
        console.print(table)
    console.print(f"Wrote {out} ({', '.join([RESULT, *made])})", soft_wrap=True)


def measure(subject: Subject, run: SinkRun, track: Track) -> list[dict]:
    """The figures of every trajectory of one model that is wanted, as plain data."""
    vocabulary, found = Vocabulary(subject.tokenizer, subject.mask_id), []
    for kind in ("forward", "reverse"):
        if not run.wants(kind) or (kind == "forward" and subject.causal):
            continue
        start = time.perf_counter()
        trajectory = _trajectory(subject, run, kind, track)
        figures = trajectory_figures(trajectory, run.sink, vocabulary)
        figures |= {"seconds": round(time.perf_counter() - start, 2)}
        found.append({"model": subject.name} | figures | {"detail": position_figures(trajectory, run.sink, vocabulary)})
    return found


def _trajectory(subject: Subject, run: SinkRun, kind: str, track: Track) -> Trajectory:
    if run.prompt is not None:
        texts = prompt_of(subject, run.prompt, run.generated if kind == "reverse" else 0)  # (1, P)
    else:
        text = Path(run.text) if run.text is not None else text_file("heldout.txt")
        texts = windows_of(subject, text, run.windows, run.length, run.seed)  # (N, T)
    if kind == "forward":
        if texts.shape[1] < 3:
            raise UserError(f"{texts.shape[1]} tokens are too few for noise levels: give a longer --prompt or --length")
        return forward_trajectory(subject.model, texts, run.levels, run.seed, track)
    prompts = texts if run.prompt is not None else texts[:, : run.length - run.generated]  # (N, P)
    if subject.causal:
        if run.steps is not None or run.block_length is not None:
            raise UserError(f"--steps and --block-length mean nothing for {subject.name}, a causal LM: leave them out")
        return generation_trajectory(subject.model, prompts, run.generated, track)
    asked = {"gen_length": run.generated, "steps": run.steps or run.generated, "block_length": run.block_length}
    if run.block_length is None and family_of(subject.model.config).name == "llada":
        asked["block_length"] = run.generated
    settings = generation_settings(
        subject.model.config, {key: value for key, value in asked.items() if value is not None}
    )
    return reverse_trajectory(subject.model, prompts, settings, run.seed, track)


def _settings(run: SinkRun) -> dict:
    """As they were asked for, with φ's constants."""
    kept = {key: value for key, value in asdict(run).items() if key != "sink"}
    sink = run.sink
    return kept | {"alpha": sink.alpha, "kappa": sink.kappa, "scale_free": sink.scale_free, "torch": torch.__version__}
