"""How much calibration fits the time there is: a cut model is run three times, and the rest follows from its blocks.

A run over `blocks` blocks and `copies` noisy copies takes start + blocks (each + copies per_copy) seconds. Three short
runs (one block, two blocks, two blocks and twice the windows) of the real model at the real window length give the
three numbers. Nothing of how a run works inside is assumed beyond that.
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
LEVELS = (10, 5, 2, 1)  # what fewer levels are tried where not one window at all of them fits
PILOT_LEVELS, SHORT = 2, 64  # levels of the pilot's windows; tokens of the run before it
HIDDEN_BYTES = 8e9  # of hidden states in host memory (`memory.budget_gb`); what is more lies in temporary files
Work = Callable[[DiffusionLM, dict], object]  # a whole run on a model, at windows, levels, window


@dataclass(frozen=True)
class Cost:
    """Seconds of a run: of the whole, of each block, and of each noisy copy in a block."""

    start: float
    block: float
    copy: float

    @classmethod
    def of(cls, one: float, two: float, twice: float, copies: int, more: int) -> "Cost":
        """From three runs: one block and two on `copies` noisy copies, and two blocks on `more` copies beyond those.

        Noise may turn a part negative; a copy is taken to cost at least a twentieth of its share of a block.
        """
        least = two / 40 / copies
        copy = max((twice - two) / (2 * more), least)
        block = max(two - one - copies * copy, 0.0)
        return cls(max(one - block - copies * copy, 0.0), block, copy)

    def seconds(self, blocks: int, copies: int) -> float:
        return self.start + blocks * (self.block + copies * self.copy)

    def copies(self, blocks: int, seconds: float) -> int:
        """Noisy copies that fit; 0 where none does."""
        return max(0, int(((seconds - self.start) / blocks - self.block) / self.copy))


def share_out(copies: int, levels: int, held_out: int, most: int) -> tuple[int, int]:
    """Windows and levels that use at most `copies` noisy copies, held-out windows counted.

    Levels fall only where not one window at more of them fits; one window at one level is the least.

    Args:
        most: windows at the levels asked for.
    """
    for count in (levels, *(each for each in LEVELS if each < levels)):
        windows = copies // count - held_out
        if windows >= 1:
            return min(windows, most), count
    return 1, 1


def first_blocks(model: DiffusionLM, count: int) -> DiffusionLM:
    """The model's first blocks with its embedding, last norm and head, as a model; tensors are shared."""
    adapter = Adapter(model)
    values = set_widths(model.config.to_dict(), adapter.family, [block.widths for block in adapter.blocks[:count]])
    values |= dict.fromkeys((adapter.family.keys["depth"], "num_hidden_layers"), count)
    config = adapter.family.config_class(**values)
    config.dtype = model.dtype
    with torch.device("meta"):
        small = type(model)(config)
    names = small.state_dict().keys()
    tensors = {name: value for name, value in model.state_dict(keep_vars=True).items() if name in names}
    small.load_state_dict(tensors, assign=True)
    small.source = getattr(model, "source", None)
    return small.eval()


def pilot(work: Work, model: DiffusionLM, options: argparse.Namespace, held_out: int) -> Cost:
    """What `work` costs on this model, from three runs on its first two blocks."""
    levels, device = min(PILOT_LEVELS, options.levels), model.device
    one, two = (first_blocks(model, count) for count in (1, 2))

    def seconds(part: DiffusionLM, windows: int) -> float:
        volume = {"windows": windows, "levels": levels, "window": options.window}
        return elapsed(lambda: work(part, volume), device)

    times = (seconds(one, 1), seconds(two, 1), seconds(two, 2))
    return Cost.of(*times, copies=(1 + held_out) * levels, more=levels)


def room(model: DiffusionLM, options: argparse.Namespace) -> int:
    """Windows whose hidden states have a place, in memory or, for the two streams of a run, on the temporary disk."""
    each = options.levels * options.window * Adapter(model).hidden_size * model.dtype.itemsize
    return int(max(HIDDEN_BYTES, 0.4 * shutil.disk_usage(tempfile.gettempdir()).free) // each)


def choose_volume(
    work: Work, model: DiffusionLM, options: argparse.Namespace, seconds: float, held_out: int, blocks: int
) -> tuple[dict, dict]:
    """The volume to run at, and how it came about: with a number of windows that, else as much as fits `seconds`.

    `work` has been run once by then, on one block and a short window, so that libraries are loaded.

    Args:
        blocks: so many of the model's will be run.
    Returns:
        Windows, levels and window; and, where a pilot was run, what it took, its figures and the estimate.
    """
    volume = {"windows": options.windows, "levels": options.levels, "window": options.window}
    start = time.perf_counter()
    work(first_blocks(model, 1), {"windows": 1, "levels": 1, "window": min(options.window, SHORT)})
    if options.windows != "auto":
        return volume, {"chosen": "as given"}
    cost = pilot(work, model, options, held_out)
    took = time.perf_counter() - start
    most = max(1, min(PUBLISHED["windows"], room(model, options) - held_out))
    fits = share_out(cost.copies(blocks, seconds), options.levels, held_out, most)
    volume |= dict(zip(("windows", "levels"), fits))
    estimate = cost.seconds(blocks, (fits[0] + held_out) * fits[1])
    return volume, {
        "chosen": "by a pilot", "pilot_seconds": took, "budget_seconds": seconds, "estimate_seconds": estimate,
        "cost": asdict(cost),
    }  # fmt: skip


def describe_volume(volume: dict, held_out: int, how: dict, took: float, blocks: int) -> dict:
    """The volume of a run as plain data: beside what was published, and with what all of that would take.

    Args:
        took: seconds of the run; what is extrapolated adds the copies that were left out, at the pilot's price.
    """
    tokens, published = (each["windows"] * each["window"] * each["levels"] for each in (volume, PUBLISHED))
    full = None
    if "cost" in how:
        missing = (published - tokens) / volume["window"]  # copies of this length
        full = took + blocks * max(0.0, missing) * how["cost"]["copy"]
    return volume | how | {
        "held_out": held_out, "tokens": tokens, "published": PUBLISHED, "share_of_published": tokens / published,
        "took_seconds": took, "extrapolated_full_seconds": full, "noise_steps": STEPS,
    }  # fmt: skip
