"""The scripts that measure a pruned random model and MLP widths, on tiny sizes."""

import json

import pytest
import torch

from structprune.bench.latency import Latency
from structprune.models.layers_structprune import RMSNorm
from structprune.models.loading import load_model


def test_a_random_checkpoint_is_an_official_one(scripts, tmp_path):
    module = scripts("random_checkpoint")
    values = module.llada_values(module.LLaDAShape(32, 2, 2, 96, 64, 128), "bfloat16")
    first, again = (module.write_random(tmp_path / name, values) for name in ("a", "b"))
    model, other = load_model(first), load_model(again)
    assert model.source.dtype == torch.bfloat16 and model.config.mask_token_id == 63
    assert model.blocks[0].part("gate").weight.shape == (96, 32) and model.config.max_sequence_length == 128
    assert torch.equal(model.final_norm.weight, torch.ones(32))
    gate = model.blocks[0].part("gate").weight
    assert gate.std().item() == pytest.approx(32**-0.5, rel=0.05)
    assert model.blocks[0].part("query").weight.std().item() == pytest.approx(2 * 32**-0.5, rel=0.1)
    assert model.embedding.weight.std().item() == pytest.approx(0.06, rel=0.1)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters()))


def test_the_clock_counts_layers_and_nothing_else(scripts, monkeypatch, tiny_model):
    module = scripts("forward_clock")
    now = [0.0]

    def tick():
        now[0] += 1.0  # every look at the clock takes a second, so that a layer counts one
        return now[0]

    monkeypatch.setattr(module.time, "perf_counter", tick)
    model, forward = tiny_model(), RMSNorm.forward
    clock = module.ForwardClock(torch.device("cpu"))
    with torch.no_grad(), clock.running():
        model(torch.arange(6)[None])
        torch.ones(3) @ torch.ones(3)
    # a block: 2 norms, 7 linears, 1 core, 2 rotations; then embedding, last norm and head
    assert clock.seconds == 3 * 12 + 3
    with torch.no_grad():
        model(torch.arange(6)[None])
    assert clock.seconds == 39 and RMSNorm.forward is forward


def test_on_cuda_the_clock_never_waits_while_it_counts(scripts, monkeypatch):
    """With a fake torch.cuda, whose device ends every layer of 2 s when it is asked to."""
    module, state = scripts("forward_clock"), {"queued": 0.0, "done": 0.0, "waits": 0}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == "stream"
            self.at = state["queued"]

        def query(self):
            return self.at <= state["done"]

        def synchronize(self):
            state["waits"] += 1
            state["done"] = max(state["done"], self.at)

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail("the host waits"))
    clock = module.ForwardClock(torch.device("cuda"))

    def layer():
        state["queued"] += 2.0

    timed = clock._timed(layer)
    for _ in range(5):
        timed()
        state["queued"] += 1.0  # of other work, which is not counted
    assert state["waits"] == 0 and len(clock._pending) == 5
    state["done"] = 5.0  # two layers have ended
    timed()
    assert state["waits"] == 0 and len(clock._pending) == 4
    assert clock.seconds == 12.0 and not clock._pending


@pytest.mark.slow
def test_a_model_is_pruned_and_measured(scripts, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    module, out = scripts("bench_pruned"), tmp_path / "made.json"
    assert module.main(["--quick", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [row["asked"] for row in result["pruning"]] == [0.3, 0.5]
    for row, model in zip(result["pruning"], result["models"][1:]):
        assert abs(row["ratio"] - row["asked"]) < 0.06 and row["ratio"] == pytest.approx(model["removed"])
        assert 0 < row["forward_share"] < 1 and row["forward_seconds"] < row["seconds"]
    assert [row["cache"] for row in result["generation"][::3]] == ["none", "prefix", "dual"]
    assert result["weights"] == "random" and result["shape"]["blocks"] == 2 and result["calibration"]["levels"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "made.json", "made_ideal.png", "made_latency.png", "made_memory.png"
    ]  # fmt: skip
    assert "pruning at 0.3" in capsys.readouterr().out
    note = scripts("readme_bench").note(result)
    equal = [row["agreement"] for row in result["generation"] if row["cache"] != "none"]
    command = "--split by-cost --windows 3 --rounds 2 --generation-rounds 1"
    assert note.startswith(f"`python -m scripts.bench.bench_pruned {command}`, ") and ", batch 1, 32 tokens, " in note
    assert "quartiles of 2 passes and 1 generations of 8 tokens in 4 steps, blocks of 4." in note
    assert f"With a cache {min(equal):.0%} to {max(equal):.0%} of the tokens are those of full recomputation" in note


def test_the_readme_shows_what_widths_cost(scripts):
    module = scripts("readme_bench")
    machine = {"processor": "P", "cores": 2, "torch": "2.13", "threads": 3}
    size = {"tokens": 512, "hidden": 1024, "dtype": "float32"}
    result = {"costs": {"128": 0.0, "8": 0.031}, "settings": size, "machine": machine}
    assert module.widths(result).splitlines()[2:] == ["| 128 | +0.0% |", "| 8 | +3.1% |"]
    assert "512 x 1024 inputs, float32 (P, 2 cores, torch 2.13, 3 threads)" in module.widths_note(result)


def test_costs_by_hand(scripts):
    """Between 10 s at 128 and 20 s at 256, a width of 160 is worth 12.5 s."""
    module = scripts("bench_widths")
    result = {"128": Latency((10.0, 10.0)), "256": Latency((20.0, 20.0)), "160": Latency((15.0, 15.0))}
    assert module.cost(result, 128, 160) == pytest.approx({"median": 0.2, "p25": 0.2, "p75": 0.2})
    assert module.cost(result, 128, 256)["median"] == module.cost(result, 128, 128)["median"] == 0
    assert [module.alignment(width) for width in (1, 12, 96, 192, 256, 1024)] == [1, 4, 32, 64, 128, 128]


def test_the_smallest_free_alignment_stops_at_the_first_dear_one(scripts):
    module = scripts("bench_widths")
    rows = [
        {"alignment": kind, "cost": {"median": value}}
        for kind, value in ((128, 0.0), (64, 0.01), (64, 0.03), (32, 0.2), (16, 0.0))
    ]
    costs, free = module.summarise(rows)
    assert costs == {128: 0.0, 64: 0.02, 32: 0.2, 16: 0.0} and free == 64


def test_widths_are_measured(scripts, tmp_path, capsys):
    module, out = scripts("bench_widths"), tmp_path / "widths.json"
    assert module.main(["--quick", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [row["width"] for row in result["rows"]] == [128, 129, 132, 136, 144, 152, 160, 176, 192, 224, 256]
    assert [row["alignment"] for row in result["rows"]] == [128, 1, 4, 8, 16, 8, 32, 16, 64, 32, 128]
    assert set(result["costs"]) == {"1", "4", "8", "16", "32", "64", "128"} and result["settings"]["dtype"] == "float32"
    assert "round_to" in capsys.readouterr().out
    assert module.main(["--quick"]) == 0


@pytest.mark.parametrize(
    "more, message",
    [
        (["--gen-length", "9"], "gen_length = 9 is not a multiple of block_length = 4"),
        (["--rounds", "0"], "--rounds 0 is not a count: give whole numbers from 1"),
        (["--gen-length", "32"], "--length 32 leaves no room for a prompt"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_pruned(scripts, monkeypatch, capsys, more, message):
    module = scripts("bench_pruned")
    monkeypatch.setattr(module, "prune_once", lambda *args: pytest.fail("pruned"))
    assert module.main(["--quick", *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("bench_pruned", ["--ratios", "0.3;0.5"], "--ratios '0.3;0.5' is not a list of numbers"),
        ("bench_pruned", ["--levels", "60"], "--levels 60: give 1 to 50"),
        ("bench_pruned", ["--quick", "--levels", "60"], "--levels 60: give 1 to 50"),
        ("bench_widths", ["--quick", "--centres", "1000"], "--centres 1000 is not a multiple of 128"),
        ("bench_pruned", ["--width", "100", "--heads", "8"], "each of 8 heads needs an even share"),
        ("bench_widths", ["--centres", "1000"], "--centres 1000 is not a multiple of 128"),
        ("bench_widths", ["--rounds", "0"], "--rounds = 0: give at least 1"),
        ("bench_widths", ["--centers", "128"], "see --help"),
    ],
)
def test_options_that_cannot_be_used(scripts, capsys, name, arguments, message):
    assert scripts(name).main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
