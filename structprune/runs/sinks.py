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
from structprune.generation.samplers import Generation, low_confidence
from structprune.models.placement import pick_device
from structprune.report.plots import check_matplotlib
from structprune.report.progress import progress_bars
from structprune.report.sink_plots import draw_all
from structprune.report.sink_tables import property_table, token_tables
from structprune.sinks.causal import check_window, generation_trajectory
from structprune.sinks.diffusion import Track, forward_trajectory, reverse_trajectory
from structprune.sinks.figures import json_text, position_figures, trajectory_figures
from structprune.sinks.subjects import (
    Subject,
    check_text,
    describe_subject,
    find_kind,
    open_subject,
    prompt_of,
    windows_of,
)
from structprune.sinks.tokens import Vocabulary
from structprune.sinks.trajectory import UNSEEN

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
    windows: int | None = None
    """N: sequences of the text; default 8."""
    length: int | None = None
    """T: tokens of a window, of which the last are generated; default 128."""
    gen_length: int | None = None
    """Generated tokens; default half the length, with a prompt 64."""
    levels: int | None = None
    """Noise levels; default 10."""
    steps: int | None = None
    """Denoising steps of a diffusion LM; default one per generated token."""
    block_length: int | None = None
    """Of LLaDA's sampler; default the whole generation."""
    seed: int | None = None
    """Draws windows and noise; default 0."""
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
        if self.prompt is not None:
            self._refuse("of windows of text, which a --prompt takes the place of", "windows", "length")
        if self.trajectory == "forward":
            self._refuse("of generation, and --trajectory is forward", "gen_length", "steps", "block_length")
        elif self.prompt is None and self.generated >= self.tokens:
            raise UserError(f"--gen-length = {self.generated} leaves no prompt in windows of --length {self.tokens}")
        if self.trajectory == "reverse":
            self._refuse("of noise, and --trajectory is reverse", "levels")

    def check_kinds(self, causal: bool) -> None:
        """Raise what changes nothing where all models are causal LMs (or, if not `causal`, not all).

        Raises:
            UserError: an option of diffusion LMs only, or a seed where nothing is drawn.
        """
        if causal:
            self._refuse("of diffusion LMs, and no model given is one", "levels", "steps", "block_length")
        if self.prompt is not None and (causal or self.trajectory == "reverse"):
            self._refuse("of windows and noise, and generation from a --prompt draws nothing", "seed")

    def _refuse(self, why: str, *names: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} = {getattr(self, name)} is {why}: leave it out")

    @property
    def tokens(self) -> int:
        """Tokens of a window."""
        return self.length or 128

    @property
    def generated(self) -> int:
        """Tokens generated after a prompt."""
        return self.gen_length or (64 if self.prompt is not None else self.tokens // 2)

    @property
    def noise_levels(self) -> int:
        return self.levels or 10

    @property
    def drawn_with(self) -> int:
        """The seed."""
        return self.seed or 0

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
    check_sources(sources, out, run, mask_id, pickle, overwrite)
    place, subjects, measured = pick_device(device), [describe_subject(source, mask_id) for source in sources], []
    plans = [plan_run(subject, run) for subject in subjects]
    with progress_bars(Console(stderr=True)) as track:
        for source, subject, plan in zip(sources, subjects, plans):
            opened = open_subject(source, subject, place, dtype, mask_id, pickle)
            measured += measure(opened, plan, run, track)
            del opened  # before the next one is loaded
    result = {"structprune": __version__, "settings": _settings(run), "runs": measured}
    with whole_directory(out) as draft:
        (draft / RESULT).write_text(json_text(result), encoding="utf-8")
        made = draw_all(measured, draft)
    console = Console()
    console.print(property_table(measured))
    for table in token_tables(measured):
        console.print(table)
    console.print(f"Wrote {out} ({', '.join([RESULT, *made])})", soft_wrap=True)


def check_sources(
    sources: list[str], out: Path, run: SinkRun, mask_id: int | None, pickle: bool, overwrite: bool
) -> None:
    """Raise what a look at names and kinds shows.

    Raises:
        UserError: no such checkpoint or text, an output that is in the way, or an option that would change nothing.
    """
    kinds = []
    for source in sources:
        directory, causal = find_kind(source)
        kinds.append(causal)
        check_output(out, directory, overwrite, 20_000_000, marks=(RESULT,))
        if causal and run.trajectory in ("forward", "both"):
            remedy = "leave --trajectory out, or give reverse"
            raise UserError(f"'{source}' is a causal language model, which has no noise levels: {remedy}")
    run.check_kinds(all(kinds))
    for name, given in (("--mask-id", mask_id is not None), ("--allow-pickle", pickle)):
        if given and all(kinds):
            raise UserError(f"{name} is of diffusion LMs, and no model given is one: leave it out")
    if run.text is not None:
        check_text(Path(run.text))


@dataclass(frozen=True, eq=False)
class Plan:
    """What one model is given: `noised` (N, T) of noise levels and `prompts` (N, P) int64, None where not wanted.

    `sampler` are the settings of a diffusion LM's generation.
    """

    noised: torch.Tensor | None
    prompts: torch.Tensor | None
    sampler: Generation | None


def plan_run(subject: Subject, run: SinkRun) -> Plan:
    """Texts and sampler of a model, told from its configuration and tokenizer.

    Raises:
        UserError: texts that are too long or too short for it, or a sampler that cannot be.
    """
    forward, reverse = run.wants("forward") and not subject.causal, run.wants("reverse")
    if run.prompt is not None:
        noised = prompts = prompt_of(subject, run.prompt, run.generated if reverse else 0)  # (1, P)
    else:
        text = Path(run.text) if run.text is not None else text_file("heldout.txt")
        noised = windows_of(subject, text, run.windows or 8, run.tokens, run.drawn_with)  # (N, T)
        prompts = noised[:, : run.tokens - run.generated]  # (N, P)
    if forward:
        _check_compared(subject, noised.shape[1], run)
        if noised.shape[1] < 3:
            raise UserError(
                f"{noised.shape[1]} tokens are too few for noise levels: give a longer --prompt or --length"
            )
    if reverse and subject.causal:
        _check_compared(subject, prompts.shape[1] - UNSEEN + 1, run)
        check_window(subject.config, prompts.shape[1] + run.generated, subject.name)
    elif reverse:
        _check_compared(subject, prompts.shape[1] + run.generated, run)
    sampler = None
    if reverse and not subject.causal:
        sampler = low_confidence(subject.config, run.generated, run.steps or run.generated, run.block_length)
    return Plan(noised if forward else None, prompts if reverse else None, sampler)


def _check_compared(subject: Subject, count: int, run: SinkRun) -> None:
    """Of n positions none exceeds the mean by more than sqrt(n - 1) standard deviations."""
    kappa = run.sink.kappa
    if count - 1 <= kappa**2:
        last = f" (the last {UNSEEN - 1} of a causal LM's prompt are left out)" if subject.causal else ""
        raise UserError(
            f"{max(0, count)} positions of {subject.name} can be compared{last}, of which none can be a sink at --kappa"
            f" {kappa:g}: it takes more than {1 + kappa**2:g}; give a longer --prompt or --length"
        )


def measure(subject: Subject, plan: Plan, run: SinkRun, track: Track) -> list[dict]:
    """The figures of every trajectory of one model that is wanted, as plain data."""
    vocabulary, found = Vocabulary(subject.tokenizer, subject.mask_id), []
    for kind, texts in (("forward", plan.noised), ("reverse", plan.prompts)):
        if texts is None:
            continue
        start = time.perf_counter()
        if kind == "forward":
            trajectory = forward_trajectory(subject.model, texts, run.noise_levels, run.drawn_with, track)
        elif subject.causal:
            trajectory = generation_trajectory(subject.model, texts, run.generated, track)
        else:
            trajectory = reverse_trajectory(subject.model, texts, plan.sampler, run.drawn_with, track)
        figures = trajectory_figures(trajectory, run.sink, vocabulary)
        figures |= {"seconds": round(time.perf_counter() - start, 2)}
        found.append({"model": subject.name} | figures | {"detail": position_figures(trajectory, run.sink, vocabulary)})
    return found


def _settings(run: SinkRun) -> dict:
    """As they were asked for, defaults filled in, with φ's constants."""
    kept = {key: value for key, value in asdict(run).items() if key != "sink"}
    kept |= {"levels": run.noise_levels, "seed": run.drawn_with}
    if run.prompt is None:
        kept |= {"windows": run.windows or 8, "length": run.tokens}
    sink = run.sink
    return kept | {"alpha": sink.alpha, "kappa": sink.kappa, "scale_free": sink.scale_free, "torch": torch.__version__}
