"""One measured pruning call of structprune, for bench_masking.py; run by that script, not by hand.

    python masking_worker.py REQUEST.json [BATCH]

As published_worker.py, in structprune's own environment. The method `encode` prunes nothing: it times the forward
passes that sink-Wanda cannot do without, one for every window and level.
"""

import sys
from pathlib import Path

import torch
from published_worker import Request, finish, measured
from safetensors.torch import load_file

from structprune.calibration.batches import Calibration
from structprune.config import Config
from structprune.mask_pipeline import mask
from structprune.models.loading import load_model
from structprune.models.modeling_structprune import DiffusionLM

PRESETS = Path(__file__).parents[1] / "configs" / "published"


def read_data(path: str) -> Calibration:
    """The windows and noisy copies that the release gets as well, none held out."""
    data = load_file(path)
    return Calibration(data["ids"], data["noisy"], None, {}, held_out=0)


def call_ours(model: DiffusionLM, request: Request, calibration: Calibration, batch: int):
    """The pruning call of a request, with the published choices: ours are made so that the outputs can be compared."""
    changes = {"masking.ratio": request.ratio, "calibration.batch": batch}
    config = Config.load(PRESETS / f"llada-{request.method}.yaml", changes)
    return lambda: mask(model, config, calibration, in_place=True)


def encode_all(model: DiffusionLM, calibration: Calibration) -> None:
    """Every noisy copy through all blocks, one at a time."""
    with torch.inference_mode():
        for ids in calibration.noisy_ids.flatten(0, 1):  # (T,)
            model.encode(ids[None])


def main(request: Request, batch: int) -> None:
    torch.set_num_threads(request.threads)
    model, calibration = load_model(request.checkpoint, torch.float32), read_data(request.data)
    if request.method == "encode":
        call = lambda: encode_all(model, calibration)  # noqa: E731
    else:
        call = call_ours(model, request, calibration, batch)
    figures = measured(call, model, lambda: model(calibration.input_ids[:1]))
    finish(figures, model.blocks, request.out)


if __name__ == "__main__":
    main(Request.read(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
