"""How much calibration fits the available time, estimated from three runs of the model's first blocks.

A run over `blocks` blocks and `copies` noisy copies takes start + blocks (each + copies per_copy) seconds. Three short
runs (one block, two blocks, two blocks with twice the windows) of the real model at the real window length determine
the three numbers. Nothing else is assumed about a run.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from scripts.bench.bench_pruned import STEPS
from structprune.bench.latency import elapsed
from structprune.models.adapter import Adapter, set_widths
from structprune.models.modeling_structprune import DiffusionLM

PUBLISHED = {"windows": 128, "window": 4096, "levels": 10}
LEVELS = (10, 5, 2, 1)  # tried in turn if not even one window fits at more levels
PILOT_LEVELS, SHORT = 2, 64  # levels of the pilot's windows; tokens of its warm-up run
HIDDEN_BYTES = 8e9  # hidden states in host memory (`memory.budget_gb`); the rest is in temporary files
Work = Callable[[DiffusionLM, dict], object]  # a whole run on a model, at windows, levels, window


@dataclass(frozen=True)
class Cost:
    """Seconds of a run: once, for each block, and for each noisy copy in a block."""

    start: float
    block: float
    copy: float

    @classmethod
    def of(cls, one: float, two: float, twice: float, copies: int, more: int) -> "Cost":
        """From three runs: one block and two blocks on `copies` noisy copies, and two blocks on `more` additional ones.

        Noise may make a part negative; a copy counts at least a twentieth of its share of a block.
        """
        least = two / 40 / copies
        copy = max((twice - two) / (2 * more), least)
        block = max(two - one - copies * copy, 0.0)
        return cls(max(one - block - copies * copy, 0.0), block, copy)

    def seconds(self, blocks: int, copies: int) -> float:
        return self.start + blocks * (self.block + copies * self.copy)

    def copies(self, blocks: int, seconds: float) -> int:
        """Number of noisy copies that fit."""
        return max(0, int(((seconds - self.start) / blocks - self.block) / self.copy))


def share_out(copies: int, levels: int, held_out: int, most: int) -> tuple[int, int]:
    """Windows and levels that use at most `copies` noisy copies, including held-out windows.

    Levels are lowered only if not even one window fits at more; the minimum is one window at one level.

    Args:
        most: upper limit of windows.
    """
    for count in (levels, *(each for each in LEVELS if each < levels)):
        windows = copies // count - held_out
        if windows >= 1:
            return min(windows, most), count
    return 1, 1


def first_blocks(model: DiffusionLM, count: int) -> DiffusionLM:
    """A model of the first blocks with embedding, last norm and head; tensors are shared."""
    adapter = Adapter(model)
    values = set_widths(model.config.to_dict(), adapter.family, [block.widths for block in adapter.blocks[:count]])
    config = adapter.family.config_class(**values)
    config.dtype = model.dtype
    with torch.device("meta"):
        small = type(model)(config)
    names = small.state_dict().keys()
    tensors = {name: value for name, value in model.state_dict(keep_vars=True).items() if name in names}
    small.load_state_dict(tensors, assign=True)
    vars(small)["source"] = getattr(model, "source", None)
    return small.eval()


def pilot(work: Work, model: DiffusionLM, options: argparse.Namespace, held_out: int) -> Cost:
    """The cost of `work` on this model, from three runs on its first two blocks."""
    levels, device = min(PILOT_LEVELS, options.levels), model.device
    one, two = (first_blocks(model, count) for count in (1, 2))

    def seconds(part: DiffusionLM, windows: int) -> float:
        volume = {"windows": windows, "levels": levels, "window": options.window}
        return elapsed(lambda: work(part, volume), device)

    times = (seconds(one, 1), seconds(two, 1), seconds(two, 2))
    return Cost.of(*times, copies=(1 + held_out) * levels, more=levels)


def room(model: DiffusionLM, options: argparse.Namespace) -> int:
    """Windows whose hidden states fit in memory or, for both streams of a run, on the temporary disk."""
    each = options.levels * options.window * Adapter(model).hidden_size * model.dtype.itemsize
    return int(max(HIDDEN_BYTES, 0.4 * shutil.disk_usage(tempfile.gettempdir()).free) // each)


def choose_volume(
    work: Work, model: DiffusionLM, options: argparse.Namespace, seconds: float, held_out: int, blocks: int
) -> tuple[dict, dict]:
    """The calibration volume to run at: the number of windows in the options, else as many as fit `seconds`.

    `work` is first run on one block and a short window, so that libraries are loaded.

    Args:
        blocks: number of blocks of the run.
    Returns:
        Windows, levels and window; and how they were chosen, with the pilot's time, figures and estimate.
    """
    volume = {"windows": options.windows, "levels": options.levels, "window": options.window}
    start = time.perf_counter()
    work(first_blocks(model, 1), {"windows": 1, "levels": 1, "window": min(options.window, SHORT)})
    if options.windows != "auto":
        return volume, {"chosen": "as given"}
    cost = pilot(work, model, options, held_out)
    pilot_seconds = time.perf_counter() - start
    most = max(1, min(PUBLISHED["windows"], room(model, options) - held_out))
    windows, levels = share_out(cost.copies(blocks, seconds), options.levels, held_out, most)
    volume |= {"windows": windows, "levels": levels}
    estimate = cost.seconds(blocks, (windows + held_out) * levels)
    return volume, {
        "chosen": "by a pilot", "pilot_seconds": pilot_seconds, "budget_seconds": seconds, "estimate_seconds": estimate,
        "cost": asdict(cost),
    }  # fmt: skip


def describe_volume(volume: dict, held_out: int, choice: dict, seconds: float, blocks: int) -> dict:
    """The volume of a run as plain data, compared with the published one, whose time is extrapolated.

    Args:
        choice: from `choose_volume`.
        seconds: of the run; the extrapolation adds the missing copies at the pilot's cost.
    """
    tokens, published = (each["windows"] * each["window"] * each["levels"] for each in (volume, PUBLISHED))
    full = None
    if "cost" in choice:
        missing = (published - tokens) / volume["window"]  # copies of this length
        full = seconds + blocks * max(0.0, missing) * choice["cost"]["copy"]
    return volume | choice | {
        "held_out": held_out, "tokens": tokens, "published": PUBLISHED, "share_of_published": tokens / published,
        "took_seconds": seconds, "extrapolated_full_seconds": full, "noise_steps": STEPS,
    }  # fmt: skip
