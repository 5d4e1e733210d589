"""One measured pruning call of structprune, for bench_masking.py; run by that script, not by hand.

    python masking_worker.py REQUEST.json [BATCH]

As published_worker.py, in structprune's own environment. The method `encode` is also sink-Wanda, with a bare forward
pass after each of its own: one for every window and level, the minimum that it needs.
"""

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from scripts.bench.published_worker import Request, finish, measure
from structprune.calibration.batches import Calibration
from structprune.config import Config
from structprune.models.adapter import Adapter
from structprune.models.loading import load_model
from structprune.models.modeling_structprune import DiffusionLM
from structprune.progress import Track, untracked
from structprune.runs.mask import mask
from structprune.statistics.inputs import block_inputs

PRESETS = Path(__file__).parents[2] / "configs" / "published"


def read_data(path: str) -> Calibration:
    """The windows and noisy copies, the same as for the release; none are held out."""
    data = load_file(path)
    return Calibration(data["ids"], data["noisy"], None, {}, held_out=0)


def call_ours(model: DiffusionLM, request: Request, calibration: Calibration, batch: int, track: Track = untracked):
    """The pruning call of a request, with the published settings, so that outputs can be compared."""
    changes = {"masking.ratio": request.ratio, "calibration.batch": batch}
    config = Config.load(PRESETS / f"llada-{request.method}.yaml", changes)
    return lambda: mask(model, config, calibration, track, in_place=True)


@torch.inference_mode()
def bare_pass(adapter: Adapter, ids: torch.Tensor) -> None:
    """A forward pass of ids (b, T) up to the last linear's input, the least that any statistic needs."""
    x, context = adapter.model.embedding(ids), adapter.model.context(ids.shape, adapter.device)  # (b, T, C)
    for view in adapter.blocks[:-1]:
        x = view.module(x, *context)  # (b, T, C)
    block_inputs(adapter.blocks[-1], x, context)


class Interleaved:
    """A `track` that runs a bare pass over each batch of noisy copies directly after sink-Wanda's own pass.

    Both meet the same load of the machine, so that their ratio does not depend on it.
    """

    def __init__(self, model: DiffusionLM, calibration: Calibration, batch: int):
        self._adapter, self._ids, self._batch = Adapter(model), calibration.noisy_ids.flatten(0, 1), batch  # (N*S, T)
        self.seconds, self.copies = 0.0, 0

    def __call__(self, items, title):
        for item in items:
            yield item
            if title.startswith("norms"):
                start, ids = time.perf_counter(), self._ids[item : item + self._batch]  # (b, T)
                bare_pass(self._adapter, ids)
                self.seconds += time.perf_counter() - start
                self.copies += len(ids)


def measure_passes(model: DiffusionLM, request: Request, calibration: Calibration, batch: int, warm_up) -> dict:
    """Seconds of sink-Wanda, and of the bare passes between its own passes.

    Raises:
        RuntimeError: the number of bare passes is not the number of copies.
    """
    track = Interleaved(model, calibration, batch)
    figures = measure(call_ours(model, request, calibration, batch, track), model, warm_up)
    if track.copies != calibration.noisy_ids.flatten(0, 1).shape[0]:
        raise RuntimeError(f"{track.copies} bare passes: one_shot_norms no longer tracks 'norms'")
    return {"seconds": figures["seconds"] - track.seconds, "forwards": track.seconds}


def main(request: Request, batch: int) -> None:
    torch.set_num_threads(request.threads)
    model, calibration = load_model(request.checkpoint, torch.float32), read_data(request.data)
    warm_up = partial(model, calibration.input_ids[:1])
    if request.method == "encode":
        request = replace(request, method="sink-wanda", out=None)
        figures = measure_passes(model, request, calibration, batch, warm_up)
    else:
        figures = measure(call_ours(model, request, calibration, batch), model, warm_up)
    finish(figures, model.blocks, request.out)


if __name__ == "__main__":
    main(Request.read(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
