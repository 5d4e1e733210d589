"""Which devices copy beside the computation, and that the CUDA queue asks torch for the right order."""

from contextlib import contextmanager

import torch

from structprune.models import transfer
from structprune.models.transfer import CudaQueue, Lane, lane_to, send


def test_only_cuda_has_lanes():
    assert lane_to(torch.device("cpu")) is None and lane_to(torch.device("meta")) is None
    there = torch.ones(3)
    assert send(there, torch.device("cpu")) is there and send(there, torch.device("meta")).device.type == "meta"


class Recorded:
    """Stands in for torch.cuda: copies at once, and notes who waits for what on which stream."""

    def __init__(self, monkeypatch, pinned: bool = True):
        self.log, self.now = [], "main"
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.stream("side"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.stream(self.now))
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.note("keep for", stream.name))
        real = torch.empty

        def empty(*shape, pin_memory=False, device=None, **more):
            if pin_memory and not pinned:
                raise RuntimeError("cannot pin")
            self.note("pinned" if pin_memory else "device memory", self.now)
            return real(*shape, **more)

        monkeypatch.setattr(torch, "empty", empty)

    def note(self, *what) -> None:
        self.log.append(what)

    def stream(self, name: str):
        recorded = self

        class Event:
            def synchronize(self):
                recorded.note("host waits", name)

        class Stream:
            def __init__(self):
                self.name = name

            def record_event(self):
                recorded.note("event", name)
                return Event()

            def wait_event(self, event):
                recorded.note("waits", name)

        return Stream()

    @contextmanager
    def on(self, stream):
        before, self.now = self.now, stream.name
        yield
        self.now = before


def test_the_cuda_queue_asks_for_the_right_order(monkeypatch):
    monkeypatch.setattr(transfer, "CHUNK", 64)
    recorded = Recorded(monkeypatch)
    with torch.inference_mode():
        lane = Lane(CudaQueue(torch.device("cuda")))
    assert recorded.log == [("pinned", "main")] * 4
    assert not any(buffer.is_inference() for buffer in lane._queue.buffers)
    recorded.log.clear()
    fetched = lane.fetch(torch.arange(4.0))
    assert recorded.log == [("device memory", "side"), ("event", "side")]  # allocated where it is written
    recorded.log.clear()
    there = lane.land(fetched)
    assert recorded.log == [("waits", "main"), ("keep for", "main")]
    recorded.log.clear()
    deposit, back = lane.deposit(there), torch.zeros(4)
    assert recorded.log == [("event", "main")]
    lane.settle(deposit, back)
    assert recorded.log[1:] == [("waits", "side"), ("event", "side"), ("host waits", "side")]
    assert back.tolist() == [0, 1, 2, 3]


def test_no_pinned_memory_is_no_lane(monkeypatch):
    monkeypatch.setattr(transfer, "CHUNK", 64)
    Recorded(monkeypatch)
    assert isinstance(lane_to.__wrapped__(torch.device("cuda")), Lane)
    Recorded(monkeypatch, pinned=False)
    assert lane_to.__wrapped__(torch.device("cuda")) is None
    monkeypatch.setattr(transfer, "carries", lambda lane, size: False)
    Recorded(monkeypatch)
    assert lane_to.__wrapped__(torch.device("cuda")) is None
