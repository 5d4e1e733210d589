"""Calibration along the model's own denoising: states of its generation as noisy copies (docs/methods.md section 3).

`forward` copies are noise at S levels, independent of the model. `reverse` copies of a window come from one generation:
the first quarter of the window is the prompt, and the model fills the rest in K steps, greedily and by low-confidence
remasking (in one block; Dream: alg maskgit_plus). The copy for the time t = s / N of a forward level is the state with
t K steps to go, in which about the share t of the generated part is masked. Shapes: N windows, S copies,
T tokens, P of them prompt, G = T - P generated.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch

from structprune.calibration.batches import Calibration
from structprune.calibration.noise import deal_levels, seeded
from structprune.config import CalibrationSettings, Config
from structprune.errors import UserError
from structprune.generation.generate import Options, Step, generate
from structprune.generation.samplers import Generation, low_confidence
from structprune.models.journal import NOWHERE, Entry, Journal
from structprune.models.modeling_structprune import DiffusionLM
from structprune.progress import Track, untracked
from structprune.workers import ALONE, Workers

States = tuple[torch.Tensor, torch.Tensor]  # final ids (N, T) and their states (N, S, T), int64 on CPU
PROMPT = 4  # the first 1 / PROMPT of a window is the prompt


def prompt_length(length: int) -> int:
    """P, the prompt's tokens, of a window of T."""
    return max(1, length // PROMPT)


def state_steps(steps: int, interval: int, count: int) -> list[int]:
    """Before which of K denoising steps (0 .. K - 1) each state is recorded.

    States are in the order of the forward levels s = interval, 2 interval, ..., so the last is recorded first. All
    differ where there are as many steps as states. N is `steps`, K `count`.
    """
    return [count + (-level * count // steps) for level in range(interval, steps + 1, interval)]


@torch.no_grad()
def reverse_states(
    model: DiffusionLM,
    prompts: torch.Tensor,
    settings: Generation,
    indices: torch.Tensor,
    batch: int = 1,
    track: Callable[[Iterable], Iterable] = lambda items: items,
) -> States:
    """States of one generation after each prompt; greedy, so without random draws.

    Args:
        prompts: (N, P) int64 on CPU, without a mask token.
        indices: (N, S) int64 denoising steps before which a state is recorded; where a step reveals nothing, before the
            next one that does, which is the same state.
        batch: sequences in a forward pass.
    Returns:
        final ids (N, T) and states (N, S, T) int64 on CPU. A state differs from the final ids by mask tokens only.
    """
    length = prompts.shape[1] + settings.gen_length
    states = torch.zeros(*indices.shape, length, dtype=torch.long)  # (N, S, T)
    filled = torch.zeros(indices.shape, dtype=torch.bool)  # (N, S)

    def record(step: Step) -> None:
        new = ~filled[step.prompts] & (step.index >= indices[step.prompts])  # (B, S)
        for slot in new.any(0).nonzero().flatten().tolist():
            rows = step.prompts[new[:, slot]]  # (b,)
            states[rows, slot] = step.ids.cpu()[new[:, slot], :length]  # (b, T), without what fills the last block
            filled[rows, slot] = True

    final = generate(model, prompts, settings, options=Options(batch=batch, track=track, record=record))  # (N, T)
    assert isinstance(final, torch.Tensor)  # prompts of one length
    return final, states


@dataclass(frozen=True)
class Generating:
    """How windows are generated: sequences in a forward pass, who watches, who shares them, where they are kept."""

    batch: int = 1
    track: Track = untracked
    workers: Workers = ALONE
    journal: Journal = NOWHERE


def reverse_calibration(
    model: DiffusionLM, calibration: Calibration, settings: CalibrationSettings, how: Generating = Generating()
) -> Calibration:
    """A calibration whose fit windows are the model's own generations, with their states as noisy copies.

    With `settings.copies`, the states of the forward levels are dealt to windows as those levels are.

    The mask probability of a copy is the masked share of its generated part, so that the weight 1 / p of a loss is that
    of a conditional generation, whose prompt is never masked. The label of a masked token, and the text of a clean arm,
    is the model's own final token. Held-out windows keep text with forward noise, so that both trajectories are judged
    alike.

    Args:
        calibration: with forward noise; only its windows are used.
    Raises:
        UserError: a prompt that holds the mask token.
    """
    fit, check = calibration.fit, calibration.check
    assert check.mask_probability is not None, "windows with forward noise have mask probabilities"
    prompt, mask_id = prompt_length(calibration.length), model.config.mask_token_id
    generated = calibration.length - prompt  # at most a step per token, at least one per block
    sampler = low_confidence(model.config, generated, min(settings.steps, generated))
    steps = sampler.step_count([prompt])
    stops = state_steps(settings.steps, settings.interval, steps)
    chosen = deal_levels(fit.windows, len(stops), settings.noisy_copies, seeded(settings.seed, 1))  # (n, S)
    make = partial(reverse_states, model, settings=sampler, batch=how.batch)
    final, states = kept_states(make, fit.input_ids[:, :prompt], torch.tensor(stops)[chosen], how)  # (n, T), (n, S, T)
    p = (states[..., prompt:] == mask_id).float().mean(-1)  # (n, S)
    return replace(
        calibration,
        input_ids=torch.cat((final, check.input_ids)),
        noisy_ids=torch.cat((states, check.noisy_ids)),
        mask_probability=torch.cat((p, check.mask_probability)),
        metadata=calibration.metadata
        | {"trajectory": "reverse", "prompt_tokens": str(prompt), "generation_steps": str(steps)},
    )


def kept_states(make: Callable[..., States], prompts: torch.Tensor, indices: torch.Tensor, how: Generating) -> States:
    """`make(prompts, indices=..., track=...)` of all windows, as many at a time as a pass of every process takes.

    What the journal has is not generated again: a part by as many processes and sequences, or the whole by any.

    Args:
        prompts: (N, P). indices: (N, S).
    Returns:
        As `reverse_states`, of all N windows in every process.
    """
    if whole := how.journal.read("whole"):
        return whole.tensors["final"], whole.tensors["states"]
    size = how.batch * how.workers.count
    starts, parts = range(0, len(prompts), size), []
    for number, start in enumerate(starts, 1):
        name = f"{number}-of-{len(starts)}-by-{how.batch}-in-{how.workers.count}"
        kept = how.journal.read(name)
        if kept is None:
            rows = range(start, min(start + size, len(prompts)))
            own = list(rows[how.workers.span(len(rows))])
            states: States = (prompts.new_empty(0), prompts.new_empty(0))  # of a process that has no window here
            if own:
                title = "reverse trajectories" + (f", {number} of {len(starts)}" if len(starts) > 1 else "")
                show = lambda items, title=title: how.track(items, title)  # noqa: E731
                states = make(prompts[own], indices=indices[own], track=show)
            tensors = dict(zip(("final", "states"), map(how.workers.rows, states)))
            how.journal.keep(name, tensors)
            kept = Entry(tensors, None)
        parts.append((kept.tensors["final"], kept.tensors["states"]))
    all_final, all_states = (torch.cat(each) for each in zip(*parts))  # (N, T), (N, S, T)
    how.journal.keep("whole", {"final": all_final, "states": all_states})
    return all_final, all_states


def check_trajectory(config: Config, levels: int | None = None) -> None:
    """Raise UserError where a policy compares levels but there are too few, or windows are too short for the states.

    Args:
        levels: S, the copies of a window, of an existing calibration; default the configuration's.
    """
    settings, exists = config.calibration, levels is not None
    if config.sink.policy == "unstable" and (settings.noisy_copies if levels is None else levels) < 2:
        raise UserError(_one_level(settings, exists))
    generated = settings.length - prompt_length(settings.length)
    if config.sink.trajectory == "reverse" and not exists and generated < settings.levels:
        raise UserError(
            f"calibration.length = {settings.length} leaves {generated} tokens to generate, which have no"
            f" {settings.levels} different states: raise it, or calibration.interval"
        )


def _one_level(settings: CalibrationSettings, exists: bool) -> str:
    """Why the policy `unstable` has nothing to compare, and what gives it that."""
    refused = "sink.policy = unstable compares the noise levels of a window, of which"
    if not exists and settings.copies is not None:
        return f"{refused} calibration.copies = {settings.copies} leaves 1: raise it, or use sink.policy = all"
    source = "the calibration has" if exists else f"calibration.interval = {settings.interval} leaves"
    remedy = "one made with calibration.interval" if exists else "calibration.interval"
    copies = " and calibration.copies 2 or more" if exists else ""
    return f"{refused} {source} 1: use {remedy} at most half of calibration.steps{copies}, or sink.policy = all"


def check_calibration(calibration: Calibration, config: Config) -> None:
    """Raise UserError where an existing calibration, replayed or passed in, has another trajectory than the
    configuration names, too few levels for its sink policy, no mask probabilities for a weighting of rows by them, or
    no windows for one of a run's two uses."""
    actual, requested = trajectory_of(calibration), config.sink.trajectory
    if "trajectory" in config.sink.model_fields_set and requested != actual:
        raise UserError(
            f"sink.trajectory = {requested} has no effect: the calibration, which is taken as it is, was made with"
            f" {actual}; leave it out, or calibrate anew from text"
        )
    check_trajectory(config, calibration.levels)
    refit = config.reconstruct
    if calibration.mask_probability is None and refit.enabled and refit.weighting in ("noise", "gradient"):
        raise UserError(
            f"reconstruct.weighting = {refit.weighting} needs mask probabilities, which the calibration file does not"
            " have: use uniform or certainty, or calibrate anew from text"
        )
    if calibration.held_out >= calibration.windows:
        raise UserError(f"all {calibration.windows} windows of the calibration are held out: leave some to fit on")
    if calibration.held_out < 1 and (config.method == "structured" or config.reconstruct.enabled):
        remedy = "" if config.method == "structured" else ", or set reconstruct.enabled = false"
        raise UserError(
            f"the calibration holds out no window to choose the refit's damping on: make one that does{remedy}"
        )


def trajectory_of(calibration: Calibration) -> str:
    """`forward`, also for files that do not say, or `reverse`."""
    return calibration.metadata.get("trajectory", "forward")
