"""Trajectories of masked diffusion LMs: the noise levels of calibration, and the model's own generation."""

from typing import Callable, Iterable

import torch

from structprune.calibration.noise import noise_windows
from structprune.generation.generate import Step, generate
from structprune.generation.samplers import Generation
from structprune.models.adapter import Adapter
from structprune.models.encode import Batches
from structprune.models.modeling_structprune import DiffusionLM
from structprune.sinks.trajectory import Recorder, Trajectory
from structprune.statistics.capture import HeadMeter

Track = Callable[[Iterable, str], Iterable]


@torch.no_grad()
def forward_trajectory(model: DiffusionLM, windows: torch.Tensor, levels: int, seed: int, track: Track) -> Trajectory:
    """Every window at its noise levels, from the noisiest on, as denoising goes; each level's noise is drawn anew.

    Args:
        windows: (N, T) int64.
        levels: S, evenly spread over the trajectory (LLaDA), or as many independent draws (Dream).
    """
    adapter, generator = Adapter(model), torch.Generator().manual_seed(seed)
    noise = (adapter.mask_id, adapter.family.schedule, generator, levels, 1, model.edges_visible)
    noisy, p = noise_windows(windows, *noise)  # (N, S, T), (N, S)
    p, order = p.sort(dim=1, descending=True)  # (N, S)
    noisy = noisy.gather(1, order[..., None].expand_as(noisy))  # (N, S, T)
    recorder, places = Recorder(len(windows), causal=False), [divmod(index, levels) for index in range(p.numel())]
    rows = Batches.automatic(adapter.device).rows(windows.shape[1])
    with HeadMeter().on([block.core for block in adapter.blocks]) as meter:
        for start in track(range(0, len(places), rows), "noise levels"):
            ids = noisy.flatten(0, 1)[start : start + rows]  # (B, T)
            model.encode(ids.to(adapter.device))
            sequences, steps = zip(*places[start : start + rows])
            recorder.add(list(steps), list(sequences), ids, meter.take())
    return recorder.finish("forward", 0, 1 - p)


class _Follower:
    """Takes the meter's mass of every forward pass of a generation, which is there once the next one begins."""

    def __init__(self, meter: HeadMeter, recorder: Recorder):
        self.meter, self.recorder, self.waiting = meter, recorder, None

    def __call__(self, step: Step) -> None:
        self.flush()
        self.waiting = step

    def flush(self) -> None:
        if self.waiting is not None:
            rows = self.waiting.prompts.tolist()
            self.recorder.add([self.waiting.index] * len(rows), rows, self.waiting.ids, self.meter.take())
        self.waiting = None


@torch.no_grad()
def reverse_trajectory(
    model: DiffusionLM, prompts: torch.Tensor, settings: Generation, seed: int, track: Track
) -> Trajectory:
    """The model's own denoising run from every prompt.

    Args:
        prompts: (N, P) int64.
        settings: of the sampler, without guidance, which would add rows that are no steps of the text.
    """
    adapter, generator = Adapter(model), torch.Generator().manual_seed(seed)
    recorder = Recorder(len(prompts), causal=False)
    batch = Batches.automatic(adapter.device).rows(prompts.shape[1] + settings.gen_length)
    with HeadMeter().on([block.core for block in adapter.blocks]) as meter:
        follower = _Follower(meter, recorder)
        generate(
            model,
            prompts,
            settings,
            generator=generator,
            batch=batch,
            track=lambda items: track(items, "generation"),
            record=follower,
        )
        follower.flush()
    done = torch.arange(settings.steps).expand(len(prompts), -1) / settings.steps  # (N, S)
    return recorder.finish("reverse", prompts.shape[1], done)
