"""The stage of scripts/gpu/gpu_report.py that checks memory.overlap, on the CPU over lanes that copy late."""

import argparse

import pytest
import torch

from structprune.models import placement
from structprune.models.transfer import BUFFERS, Lane
from structprune.statistics import hidden

pytestmark = pytest.mark.slow

OPTIONS = {"device": "cpu", "dtype": None, "levels": 2, "window": 16, "held_out": 1, "split": "equal"}


class Queue:
    """Copies of a host, which run when somebody waits for them; `spoilt`: one of them never does."""

    def __init__(self, spoilt: int | None = None):
        self.copies, self.done, self.spoilt = [], 0, spoilt
        self.buffers = [torch.zeros(5000, dtype=torch.uint8) for _ in range(2 * BUFFERS)]

    def empty(self, shape, dtype):
        return torch.zeros(shape, dtype=dtype)

    def copy(self, target, source) -> int:
        self.copies.append((target, source))
        return len(self.copies)

    @torch.inference_mode()
    def wait(self, event: int) -> None:
        for number, (target, source) in enumerate(self.copies[self.done : event], self.done):
            if number != self.spoilt:
                target.copy_(source)
        self.done = max(self.done, event)

    def compute_after(self, event, uses) -> None:
        self.wait(event)

    def computed(self) -> None:
        pass

    def copy_after(self, event) -> None:
        pass


@pytest.fixture
def stage(scripts, monkeypatch, tmp_path, cpu_accelerator):
    """`stage(queue)` -> what the stage found over a lane, with the CPU for an accelerator."""
    module, checkpoint = scripts("gpu_overlap"), scripts("random_checkpoint")
    checkpoint.write_random(
        tmp_path / "dense", checkpoint.llada_values(checkpoint.LLaDAShape(64, 4, 3, 128, 256, 128), "float32")
    )

    def run(queue):
        lane = Lane(queue)
        for each in (module, hidden, placement):
            monkeypatch.setattr(each, "lane_to", lambda device: lane)
        options = argparse.Namespace(work=tmp_path, **OPTIONS)
        return module.overlap(options, lambda items, title: items)

    return run


def test_every_case_is_compared(stage, scripts):
    queue = Queue()
    result = stage(queue)
    assert result["refused"] is None and result["blocks"] == 2
    assert result["volume"] == {"windows": 3, "levels": 2, "window": 16, "held_out": 1}
    assert [(run["case"], run["equal"], run["largest_difference"]) for run in result["runs"]] == [
        ("structured", True, 0.0), ("structured, states in files, offload", True, 0.0), ("sparsegpt", True, 0.0),
    ]  # fmt: skip
    assert all(min(run["seconds"].values()) > 0 for run in result["runs"]) and len(queue.copies) > 100
    text = scripts("readme_gpu")._overlap(result)
    assert "| `memory.overlap`, 2 blocks | off | on | weights, bit by bit |" in text and "| sparsegpt |" in text
    assert text.count("| equal |") == 3 and "apart" not in text
    assert all("weights bit-equal" in line for line in scripts("gpu_overlap").overlap_lines(result))


def test_a_copy_that_is_lost_shows(stage, scripts):
    queue = Queue()
    stage(queue)
    lost = Queue(spoilt=len(queue.copies) - 2)  # of the last run's states
    result = stage(lost)
    assert [run["equal"] for run in result["runs"]] == [True, True, False]
    assert result["runs"][2]["largest_difference"] > 0
    assert "| not equal, " in scripts("readme_gpu")._overlap(result)
    assert "WEIGHTS DIFFER" in scripts("gpu_overlap").overlap_lines(result)[2]


def test_comparison_by_hand(scripts):
    compare, one = scripts("gpu_overlap").compare, {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    assert compare(one, dict(one)) == {"equal": True, "largest_difference": 0.0}
    assert compare(one, one | {"b": torch.tensor([3.5])}) == {"equal": False, "largest_difference": 0.5}
    assert compare(one, one | {"b": torch.ones(2)}) == {"equal": False, "largest_difference": None}
    assert compare(one, {"a": one["a"]}) == {"equal": False, "largest_difference": None}
    lost = compare(one, one | {"b": torch.tensor([torch.nan])})
    assert not lost["equal"] and lost["largest_difference"] > 1e300
