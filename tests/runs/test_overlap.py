"""memory.overlap through whole runs: over lanes that copy as late or as early as may be, the model is the same."""

import pytest
import torch

from structprune import UserError
from structprune.config import Config
from structprune.models import placement
from structprune.models.loading import load_model
from structprune.models.transfer import BUFFERS, Lane
from structprune.runs.prune import prune
from structprune.statistics import hidden

pytestmark = pytest.mark.slow


class Queue:
    """Copies that run when somebody waits for them, or (`eager`) at once; events are positions."""

    def __init__(self, eager: bool):
        self.eager, self.copies, self.done = eager, [], 0
        self.buffers = [torch.zeros(5000, dtype=torch.uint8) for _ in range(2 * BUFFERS)]

    def empty(self, shape, dtype):
        return torch.full(shape, torch.nan, dtype=dtype)

    def copy(self, target, source) -> int:
        self.copies.append((target, source))
        if self.eager:
            self.wait(len(self.copies))
        return len(self.copies)

    @torch.inference_mode()  # some of the copies were begun in it
    def wait(self, event: int) -> None:
        for target, source in self.copies[self.done : event]:
            target.copy_(source)
        self.done = max(self.done, event)

    def compute_after(self, event: int, uses: torch.Tensor) -> None:
        self.wait(event)

    def computed(self) -> None:
        pass

    def copy_after(self, event: None) -> None:
        pass


RUNS = {
    "obs": {"structured.ratio": 0.4, "structured.split_candidates": 2, "structured.split_windows": 2},
    "layer targets": {"structured.ratio": 0.4, "structured.split": "equal", "reconstruct.target": "layer"},
    "masks": {"method": "unstructured", "masking.score": "sink-sparsegpt"},
    "masks, one pass": {"method": "nm", "masking.score": "wanda", "masking.order": "one-shot"},
}


def run(checkpoint, text_path, case: str, **more) -> dict[str, torch.Tensor]:
    keys = RUNS[case] | more | {
        "calibration.source": str(text_path), "calibration.windows": 3, "calibration.held_out": 2,
        "calibration.length": 16, "calibration.interval": 25,
    }  # fmt: skip
    return prune(load_model(checkpoint), Config.load(overrides=keys)).model.state_dict()


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("case", RUNS)
def test_a_run_over_lanes_gives_the_same_model(case, offload, tiny_checkpoint, text_path, monkeypatch, cpu_accelerator):
    checkpoint, asked = tiny_checkpoint(), []
    plain = run(checkpoint, text_path, case)
    for eager in (False, True):
        queue = Queue(eager)
        lane = Lane(queue)
        monkeypatch.setattr(hidden, "lane_to", lambda device, lane=lane: asked.append("states") or lane)
        monkeypatch.setattr(placement, "lane_to", lambda device, lane=lane: asked.append("weights") or lane)
        result = run(checkpoint, text_path, case, **{"memory.offload": offload, "memory.overlap": True})
        assert all(torch.equal(result[name], plain[name]) for name in plain)
        assert len(queue.copies) > 50
    assert set(asked) == ({"states", "weights"} if offload else {"states"})
    asked.clear()
    result = run(checkpoint, text_path, case, **{"memory.offload": offload})  # off unless asked for
    assert all(torch.equal(result[name], plain[name]) for name in plain) and asked == []


@pytest.mark.parametrize("method", ["structured", "unstructured"])
def test_without_an_accelerator_overlap_is_refused(method, tiny_checkpoint):
    config = Config.load(overrides={"method": method, "model.device": "cpu", "memory.overlap": True})
    with pytest.raises(UserError, match="memory.overlap = True has no effect without an accelerator"):
        prune(load_model(tiny_checkpoint()), config)
