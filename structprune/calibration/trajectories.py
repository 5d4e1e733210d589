"""Calibration along the model's own denoising: states of its generation as noisy copies (docs/methods.md section 3).

`forward` copies are noise at S levels, independent of the model. `reverse` copies of a window come from one generation:
its first quarter is the prompt, and the model fills the rest in K steps, greedily and by low confidence remasking (the
whole rest is one block; Dream: alg maskgit_plus). The copy at the time t = s / N of a forward level is what the model
is given with t K steps to go, so that about the share t of the generated part is masked. Shapes: N windows, S copies,
T tokens, P of them prompt, G = T - P generated.
"""

from dataclasses import replace
from typing import Callable, Iterable

import torch

from structprune.calibration.batches import Calibration
from structprune.calibration.build import calibrate
from structprune.config import CalibrationSettings, Config
from structprune.errors import UserError
from structprune.generation.generate import Step, generate
from structprune.generation.samplers import Generation, low_confidence
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import stream_target, streamed

PROMPT = 4  # one token in so many, the first of a window, is prompt


def prompt_length(length: int) -> int:
    """P of T tokens."""
    return max(1, length // PROMPT)


def state_steps(steps: int, interval: int, generated: int) -> tuple[int, list[int]]:
    """K denoising steps, one a token at most, and before which of them (0 .. K - 1) each state is taken.

    States are in the order of the forward levels s = interval, 2 interval, ...: the last is taken first. All differ.

    Args:
        steps: N. generated: G.
    """
    count = min(steps, generated)
    return count, [count + (-level * count // steps) for level in range(interval, steps + 1, interval)]


@torch.no_grad()
def reverse_states(
    model: DiffusionLM,
    prompts: torch.Tensor,
    settings: Generation,
    indices: list[int],
    batch: int = 1,
    track: Callable[[Iterable], Iterable] = lambda items: items,
) -> tuple[torch.Tensor, torch.Tensor]:
    """States of one generation after each prompt; greedy, so nothing is drawn.

    Args:
        prompts: (N, P) int64 on CPU, without a mask token.
        indices: S denoising steps, before which a state is taken; where a step reveals nothing, before the next that
            does, which is the same state.
        batch: sequences in a forward pass.
    Returns:
        final ids (N, T) and states (N, S, T) int64 on CPU. A state differs from the final ids by mask tokens only.
    """
    length = prompts.shape[1] + settings.gen_length
    states = torch.zeros(len(prompts), len(indices), length, dtype=torch.long)  # (N, S, T)
    filled = torch.zeros(states.shape[:2], dtype=torch.bool)  # (N, S)

    def record(step: Step) -> None:
        for slot, index in enumerate(indices):
            new = ~filled[step.prompts, slot]  # (B,)
            if step.index >= index and new.any():
                states[step.prompts[new], slot] = step.ids.cpu()[new]
                filled[step.prompts[new], slot] = True

    final = generate(model, prompts, settings, batch=batch, track=track, record=record)  # (N, T)
    return final, states


def reverse_calibration(
    model: DiffusionLM, calibration: Calibration, settings: CalibrationSettings, batch: int, track
) -> Calibration:
    """A calibration whose fit windows are the model's own generations, with their states as noisy copies.

    The mask probability of a copy is the masked share of its generated part, so that the 1 / p of a loss is that of
    a conditional generation, whose prompt is never masked. What is behind a mask, the label of a loss and the text of a
    clean arm, is what the model itself went on to say. Held-out windows stay as they are, text with forward noise:
    both trajectories are judged by the same.

    Args:
        calibration: with forward noise; only its windows are used.
        batch: sequences in a forward pass.
    Raises:
        UserError: a prompt that holds the mask token.
    """
    fit, check = calibration.fit, calibration.check
    prompt, mask_id = prompt_length(calibration.length), model.config.mask_token_id
    steps, indices = state_steps(settings.steps, settings.interval, calibration.length - prompt)
    sampler = low_confidence(model.config, calibration.length - prompt, steps)
    show = lambda items: track(items, "reverse trajectories")  # noqa: E731
    final, states = reverse_states(model, fit.input_ids[:, :prompt], sampler, indices, batch, show)  # (n, T), (n, S, T)
    p = (states[..., prompt:] == mask_id).float().mean(-1)  # (n, S)
    return replace(
        calibration,
        input_ids=torch.cat((final, check.input_ids)),
        noisy_ids=torch.cat((states, check.noisy_ids)),
        mask_probability=torch.cat((p, check.mask_probability)),
        metadata=calibration.metadata
        | {"trajectory": "reverse", "prompt_tokens": str(prompt), "generation_steps": str(steps)},
    )


def check_trajectory(config: Config, levels: int | None = None) -> None:
    """Raise what a sink policy or a trajectory rules out, before any forward pass.

    Args:
        levels: S of a calibration that is there already; default the configuration's.
    Raises:
        UserError: too few levels for the policy, or windows too short for as many states.
    """
    settings, made = config.calibration, levels is not None
    levels = settings.steps // settings.interval if levels is None else levels
    if config.sink.policy == "unstable" and levels < 2:
        source = "the calibration has" if made else f"calibration.interval = {settings.interval} leaves"
        remedy = "one made with calibration.interval" if made else "calibration.interval"
        raise UserError(
            f"sink.policy = unstable compares noise levels, of which {source} {levels}: use {remedy} at most half of"
            " calibration.steps, or sink.policy = all"
        )
    generated = settings.length - prompt_length(settings.length)
    if config.sink.trajectory == "reverse" and not made and generated < levels:
        raise UserError(
            f"calibration.length = {settings.length} leaves {generated} tokens to generate, which have no {levels}"
            " different states: raise it, or calibration.interval"
        )


def check_calibration(calibration: Calibration, config: Config) -> None:
    """Raise what does not go together with a calibration that is there already: replayed, or handed over.

    Raises:
        UserError: it has another trajectory than the configuration names, or too few levels for its sink policy.
    """
    made, asked = trajectory_of(calibration), config.sink.trajectory
    if "trajectory" in config.sink.model_fields_set and asked != made:
        raise UserError(
            f"sink.trajectory = {asked} has no effect: the calibration, which is taken as it is, was made with {made};"
            " leave it out, or calibrate anew from text"
        )
    check_trajectory(config, calibration.levels)


def trajectory_of(calibration: Calibration) -> str:
    """forward, which files that say nothing have, or reverse."""
    return calibration.metadata.get("trajectory", "forward")


def calibrated(model: DiffusionLM, config: Config, calibration: Calibration | None, track) -> Calibration:
    """What a run looks at: the calibration handed over, a replayed one, or one made along the trajectory asked for.

    Raises:
        UserError: as `calibrate`, `check_calibration` and `reverse_calibration`.
    """
    if calibration is not None or config.calibration.replays:
        calibration = calibration or calibrate(model, config)
        check_calibration(calibration, config)
        return calibration
    calibration = calibrate(model, config)
    if config.sink.trajectory == "forward":
        return calibration
    copies = calibration.levels if config.method == "structured" else 1  # what calibration.batch counts
    batch = config.calibration.batch * copies
    memory = config.memory
    with streamed(model, stream_target(memory.offload, config.model.device), memory.overlap):
        return reverse_calibration(model, calibration, config.calibration, batch, track)
