"""Trajectories of masked diffusion LMs: noise levels as in calibration, and the model's own generation."""

import torch

from structprune.calibration.noise import level_times, noise_windows
from structprune.generation.generate import Options, Step, generate
from structprune.generation.samplers import Generation
from structprune.models.adapter import Adapter
from structprune.models.encode import Batches, encode_rows
from structprune.models.modeling_structprune import DiffusionLM
from structprune.progress import Track
from structprune.sinks.trajectory import Recorder, Trajectory
from structprune.statistics.capture import HeadMeter
from structprune.workers import ALONE, Workers


@torch.no_grad()
def forward_trajectory(
    model: DiffusionLM, windows: torch.Tensor, levels: int, seed: int, track: Track, workers: Workers = ALONE
) -> Trajectory:
    """Every window at its noise levels, from most noise to least, as in denoising; each level has its own noise.

    Args:
        windows: (N, T) int64.
        levels: S, evenly spaced over the trajectory (LLaDA), or as many independent draws (Dream).
        workers: the processes that share the windows.
    """
    adapter, generator = Adapter(model), torch.Generator().manual_seed(seed)
    times = level_times(levels, 1)  # (S,)
    noisy, p = noise_windows(windows, adapter.mask_id, adapter.family.schedule, generator, times, model.edges_visible)
    p, order = p.sort(dim=1, descending=True)  # (N, S)
    noisy = noisy.gather(1, order[..., None].expand_as(noisy))  # (N, S, T)
    own, layout = workers.span(len(windows)), model.layout
    noisy, rows = noisy[own], layout.rows(noisy[own], windows[own, None])  # (n, S, T), (n, S, .)
    count, noisy, rows = len(noisy), noisy.flatten(0, 1), rows.flatten(0, 1)  # (n * S, T), (n * S, .)
    sequences = torch.arange(count).repeat_interleave(levels).tolist()  # of every row
    steps = list(range(levels)) * count
    recorder = Recorder(count, causal=False)
    batch = Batches.automatic(adapter.device).rows(rows.shape[1])
    with HeadMeter().on(adapter.cores) as meter:
        for start in track(range(0, len(noisy), batch), "noise levels"):
            part = slice(start, start + batch)
            encode_rows(model, rows[part].to(adapter.device))
            masses = [torch.stack(layout.windows(mass)).mean(0) for mass in block_masses(adapter, meter.take())]
            recorder.add(steps[part], sequences[part], noisy[part], masses)  # (B, H, T) each
    return recorder.joined(workers).finish("forward", 0, 1 - p)


def block_masses(adapter: Adapter, masses: list[torch.Tensor]) -> list[torch.Tensor]:
    """The mass (B, H, T) of every block, from that of those with attention; H is 0 for the others."""
    attending = iter(masses)
    return [next(attending) if "attention" in block.kinds else masses[0][:, :0] for block in adapter.blocks]


class _Observer:
    """Hands the mass of every forward pass of a generation to a recorder.

    `generate` announces a step before its forward pass, so the mass of a step is read when the next one is announced.
    """

    def __init__(self, adapter: Adapter, meter: HeadMeter, recorder: Recorder):
        self.adapter, self.meter, self.recorder = adapter, meter, recorder
        self.pending: Step | None = None

    def __call__(self, step: Step) -> None:
        self.flush()
        self.pending = step

    def flush(self) -> None:
        """Read the mass of the pending step."""
        if self.pending is not None:
            rows = self.pending.prompts.tolist()
            masses = block_masses(self.adapter, self.meter.take())  # (B, H, T) of every block
            self.recorder.add([self.pending.index] * len(rows), rows, self.pending.ids, masses)
        self.pending = None


@torch.no_grad()
def reverse_trajectory(
    model: DiffusionLM,
    prompts: torch.Tensor,
    settings: Generation,
    seed: int,
    track: Track,
    workers: Workers = ALONE,
) -> Trajectory:
    """The model's own denoising, from every prompt.

    Args:
        prompts: (N, P) int64.
        settings: of the sampler, without guidance, whose additional rows are not steps of the text.
        workers: the processes that share the prompts.
    """
    adapter, generator = Adapter(model), torch.Generator().manual_seed(seed)
    own = prompts[workers.span(len(prompts))]  # (n, P)
    recorder = Recorder(len(own), causal=False)
    batch = Batches.automatic(adapter.device).rows(prompts.shape[1] + settings.gen_length)
    with HeadMeter().on(adapter.cores) as meter:
        observer = _Observer(adapter, meter, recorder)
        generate(
            model,
            own,
            settings,
            options=Options(
                generator=generator, batch=batch, track=lambda items: track(items, "generation"), record=observer
            ),
        )
        observer.flush()
    steps = settings.step_count([prompts.shape[1]])  # S
    progress = torch.arange(steps).expand(len(prompts), -1) / steps  # (N, S)
    return recorder.joined(workers).finish("reverse", prompts.shape[1], progress)
