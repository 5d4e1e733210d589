"""Clocks, turns and ratios of latencies, by hand."""

import pytest
import torch

from structprune.bench import latency as module
from structprune.bench.latency import (
    Latency,
    Timing,
    elapsed,
    ideal_share,
    interleaved,
    measure_latency,
    random_ids,
    speedup,
)

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass only as calls say."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: float):
        def call():
            self.now += seconds

        return call


def test_every_call_gets_its_own_time_and_the_turns_go_there_and_back():
    clock, order = Clock(), []

    def noted(name, seconds):
        call = clock.taking(seconds)
        return lambda: (order.append(name), call())

    result = interleaved({"a": noted("a", 1.0), "b": noted("b", 3.0)}, CPU, Timing(rounds=3, warmup=2, clock=clock))
    assert order == ["a", "a", "b", "b"] + ["a", "b", "b", "a", "a", "b"]
    assert result == {"a": Latency((1.0, 1.0, 1.0)), "b": Latency((3.0, 3.0, 3.0))}


def test_progress_counts_rounds():
    seen = []
    interleaved({"a": lambda: None}, CPU, Timing(4, track=lambda items: seen.append(len(items)) or items))
    assert seen == [4]


def test_quartiles_by_hand():
    latency = Latency((0.004, 0.001, 0.005, 0.002, 0.003))
    assert latency.quartiles_ms() == pytest.approx({"median": 3, "p25": 2, "p75": 4})
    assert latency.median_ms == pytest.approx(3)


def test_speedup_is_of_rounds_not_of_medians():
    result = speedup(Latency((1.0, 4.0, 9.0)), Latency((1.0, 1.0, 3.0)))  # 1, 4, 3
    assert result == {"median": 3.0, "p25": 2.0, "p75": 3.5}


def test_ideal_share_by_hand():
    """40 % of the MACs gone; 1.25 times as fast saves 20 %, half of that."""
    result = ideal_share({"median": 1.25, "p25": 1.0, "p75": 5 / 3}, (100, 60))
    assert result == pytest.approx({"median": 0.5, "p25": 0.0, "p75": 1.0})
    assert ideal_share({"median": 1.25}, (100, 100)) is None


def test_cuda_is_timed_between_events_on_the_stream(monkeypatch):
    """With a fake torch.cuda: what counts is what the device needs, whatever the host's clock says."""
    done, device = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == "stream"
            self.at = device[0]
            done.append("record")

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")

    def call():
        done.append("call")
        device[0] += 0.25

    assert elapsed(call, torch.device("cuda")) == pytest.approx(0.25)
    assert done == ["record", "call", "record", "wait"]


def test_a_clock_waits_for_the_device_on_both_sides(monkeypatch):
    done = []
    monkeypatch.setattr(module, "synchronise", lambda device: done.append("wait"))
    assert elapsed(lambda: done.append("call"), CPU, clock=lambda: done.append("clock") or 1.0) == 0.0
    assert done == ["wait", "clock", "call", "wait", "clock"]


def test_ids_are_seeded_and_never_the_mask(tiny_model):
    model = tiny_model(vocab_size=5, embedding_size=5, mask_token_id=2)
    ids = random_ids(model, 8, 50)
    assert ids.shape == (8, 50) and set(ids.unique().tolist()) == {0, 1, 3, 4}
    assert torch.equal(ids, random_ids(model, 8, 50))


def test_models_see_the_same_ids(tiny_model):
    seen = {}
    models = {name: tiny_model(seed=seed) for seed, name in enumerate(("a", "b"))}
    for name, model in models.items():
        model.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
    result = measure_latency(models, 7, 2, Timing(rounds=2, warmup=1))
    assert all(len(latency.seconds) == 2 and min(latency.seconds) > 0 for latency in result.values())
    assert all(len(ids) == 3 and ids[0].shape == (2, 7) for ids in seen.values())
    assert all(torch.equal(one, two) for one, two in zip(seen["a"], seen["b"]))
