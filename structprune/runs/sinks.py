"""A run of `structprune sinks`: models opened, trajectories measured, figures and pictures written."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from structprune import __version__
from structprune.assets import text_file
from structprune.checkpoint.output import check_output, output_draft
from structprune.config import ModelSettings
from structprune.errors import UserError
from structprune.generation.samplers import Generation, begins, check_states, low_confidence
from structprune.models.placement import pick_device
from structprune.report.plots import check_matplotlib
from structprune.report.sink_plots import draw_all
from structprune.runs.evaluate import ALONE, Session
from structprune.runs.ghost import read_ghost
from structprune.sinks.causal import check_window, generation_trajectory
from structprune.sinks.diffusion import forward_trajectory, reverse_trajectory
from structprune.sinks.figures import position_figures, pretty_json, trajectory_figures
from structprune.sinks.settings import SinkRun
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
from structprune.workers import check_shares

RESULT = "sinks.json"
OUTPUT_BYTES = 20_000_000  # of figures and pictures, at most


@dataclass(frozen=True)
class Sinks:
    """What a run measured: the contents of sinks.json, and the names of the files it wrote."""

    result: dict
    files: list[str]


def measure_sinks(
    sources: Sequence[str],
    run: SinkRun,
    out: Path,
    place: ModelSettings,
    overwrite: bool = False,
    session: Session = ALONE,
) -> Sinks:
    """Measure one model, or two side by side, and write figures and pictures.

    Args:
        sources: checkpoint directories, Hub ids or GGUF files.
        out: output directory; it appears complete or not at all.
        place: device, dtype, and how checkpoints are read.
        session: progress, and the processes that share the texts; the first one writes.
    Raises:
        UserError: anything the user can mend, before the long work where it can be known then.
    """
    workers = session.workers
    place = place.model_copy(update={"device": place.device or workers.device})
    subjects, plans = workers.in_turn(lambda: planned(sources, run, out, place, overwrite))
    check_shares(
        workers,
        [(len(texts), "text(s) (--windows, or one --prompt)") for plan in plans for texts in plan.texts.values()],
    )
    runs: list[dict] = []
    for source, subject, plan in zip(sources, subjects, plans, strict=True):
        loaded = open_subject(source, subject, place)
        runs += measure(loaded, plan, run, session)
        del loaded  # before the next one is loaded
    result = {"structprune": __version__, "settings": run.plain(), "runs": runs}
    return Sinks(result, workers.from_first(lambda: write_sinks(result, out, overwrite)))


def planned(
    sources: Sequence[str], run: SinkRun, out: Path, place: ModelSettings, overwrite: bool
) -> tuple[list[Subject], list["Plan"]]:
    """What is measured, and what each model reads; no weights are read. Arguments and errors as `measure_sinks`."""
    check_matplotlib()
    check_sources(sources, run, out, place, overwrite)
    pick_device(place.device)  # refuses an unknown one
    subjects = [describe_subject(source, place) for source in sources]
    for source, subject in zip(sources, subjects, strict=True):
        if not subject.causal:
            read_ghost(source, place)  # broken weights of a second model are refused before the first is measured
    return subjects, [plan_run(subject, run) for subject in subjects]


def write_sinks(result: dict, out: Path, overwrite: bool) -> list[str]:
    """Write figures and pictures, whole or not at all, and return the names of the files."""
    with output_draft(out, overwrite, marks=(RESULT,)) as draft:
        (draft / RESULT).write_text(pretty_json(result), encoding="utf-8")
        pictures = draw_all(result["runs"], draft)
    return [RESULT, *pictures]


def check_sources(sources: Sequence[str], run: SinkRun, out: Path, place: ModelSettings, overwrite: bool) -> None:
    """Check everything that names and kinds of checkpoints show.

    Raises:
        UserError: no such checkpoint or text, an output that is in the way, or an option without effect.
    """
    kinds = []
    for source in sources:
        directory, causal = find_kind(source)
        kinds.append(causal)
        check_output(out, directory, overwrite, OUTPUT_BYTES, marks=(RESULT,))
        if causal and run.trajectory in ("forward", "both"):
            remedy = "leave --trajectory out, or give reverse"
            raise UserError(f"'{source}' is a causal language model, which has no noise levels: {remedy}")
    run.check_kinds(all(kinds))
    for option, present in (
        ("--mask-id", place.mask_id is not None),
        ("--block-size", place.block_size is not None),
        ("--allow-pickle", place.allow_pickle),
    ):
        if present and all(kinds):
            raise UserError(f"{option} applies to diffusion LMs, and no model given is one: leave it out")
    if run.text is not None:
        check_text(Path(run.text))


@dataclass(frozen=True, eq=False)
class Plan:
    """What one model reads.

    Attributes:
        windows: (N, T) int64, text for the noise levels; None where they are not measured.
        prompts: (N, P) int64, what to generate from; None where generation is not measured.
        sampler: settings of a diffusion LM's generation; None for a causal LM.
    """

    windows: torch.Tensor | None
    prompts: torch.Tensor | None
    sampler: Generation | None

    @property
    def texts(self) -> dict[str, torch.Tensor]:
        """Kind of trajectory -> what is read for it, where it is measured."""
        kinds = {"forward": self.windows, "reverse": self.prompts}
        return {kind: texts for kind, texts in kinds.items() if texts is not None}


def plan_run(subject: Subject, run: SinkRun) -> Plan:
    """Texts and sampler for a model, from its configuration and tokenizer alone.

    Raises:
        UserError: texts that are too long or too short for it, or sampler settings that it does not allow.
    """
    forward, reverse = run.includes("forward") and not subject.causal, reads_generation(subject, run)
    if run.prompt is not None:
        windows = prompts = prompt_of(subject, run.prompt, run.generated_tokens if reverse else 0)  # (1, P)
    else:
        text = Path(run.text) if run.text is not None else text_file("heldout.txt")
        windows = windows_of(subject, text, run.window_count, run.window_tokens, run.random_seed)  # (N, T)
        prompts = windows[:, : run.window_tokens - run.generated_tokens]  # (N, P)
    if forward:
        _check_compared(subject, windows.shape[1], run)
        if windows.shape[1] < 3:
            raise UserError(
                f"{windows.shape[1]} tokens are too few for noise levels: give a longer --prompt or --length"
            )
    if reverse and subject.causal:
        _check_compared(subject, prompts.shape[1] - UNSEEN + 1, run)
        check_window(subject.config, prompts.shape[1] + run.generated_tokens, subject.name)
    elif reverse:
        _check_compared(subject, prompts.shape[1] + run.generated_tokens, run)
    sampler = None
    if reverse and not subject.causal:
        check_states(subject.config, "a reverse trajectory (--trajectory)")
        steps = run.steps or run.generated_tokens
        sampler = low_confidence(subject.config, run.generated_tokens, steps, run.block_length)
    return Plan(windows if forward else None, prompts if reverse else None, sampler)


def reads_generation(subject: Subject, run: SinkRun) -> bool:
    """Whether a model's own generation is measured: by default, where its states are denoised step by step."""
    if run.trajectory is None and not run.shapes_generation and not subject.causal and begins(subject.config):
        return False
    return run.includes("reverse")


def _check_compared(subject: Subject, count: int, run: SinkRun) -> None:
    """Refuse too few positions: of n, none exceeds the mean by more than sqrt(n - 1) standard deviations."""
    kappa = run.sink.kappa
    if count - 1 <= kappa**2:
        note = f" (the last {UNSEEN - 1} of a causal LM's prompt are left out)" if subject.causal else ""
        raise UserError(
            f"{max(0, count)} positions of {subject.name} can be compared{note}, of which none can be a sink at --kappa"
            f" {kappa:g}: it takes more than {1 + kappa**2:g}; give a longer --prompt or --length"
        )


def measure(subject: Subject, plan: Plan, run: SinkRun, session: Session) -> list[dict]:
    """The figures of each planned trajectory of one model, as plain data."""
    vocabulary, shared = Vocabulary(subject.tokenizer, subject.mask_id), (session.track, session.workers)
    runs = []
    for kind, texts in plan.texts.items():
        start = time.perf_counter()
        if kind == "forward":
            trajectory = forward_trajectory(subject.model, texts, run.noise_levels, run.random_seed, *shared)
        elif plan.sampler is None:
            trajectory = generation_trajectory(subject.model, texts, run.generated_tokens, *shared)
        else:
            trajectory = reverse_trajectory(subject.model, texts, plan.sampler, run.random_seed, *shared)
        figures = trajectory_figures(trajectory, run.sink, vocabulary)
        figures |= {"seconds": round(time.perf_counter() - start, 2)}
        detail = position_figures(trajectory, run.sink, vocabulary)
        runs.append({"model": subject.name} | figures | {"detail": detail})
    return runs
