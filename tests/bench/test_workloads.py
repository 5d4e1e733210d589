"""Rows of forward passes and generations: every figure beside the first model's."""

import pytest
import torch

from structprune.bench import workloads as module
from structprune.bench.latency import Latency, Timing
from structprune.bench.settings import Size
from structprune.bench.workloads import GenerationWork, forward_rows, generation_rows, rows_of
from structprune.generation.generate import Options, generate
from structprune.generation.samplers import LLaDAGeneration
from structprune.models.adapter import Adapter
from structprune.structured.sizes import forward_macs


def test_rows_by_hand():
    result = {"dense": Latency((0.2, 0.2, 0.2)), "small": Latency((0.16, 0.16, 0.16))}
    dense, small = rows_of(result, {"dense": 100, "small": 60}, tokens=50).values()
    assert dense == {
        "model": "dense", "ms": {"median": 200, "p25": 200, "p75": 200}, "tokens_per_second": 250, "macs": 100,
        "macs_removed": 0,
    }  # fmt: skip
    assert small["tokens_per_second"] == pytest.approx(312.5) and small["macs_removed"] == pytest.approx(0.4)
    assert small["speedup"]["median"] == pytest.approx(1.25)
    assert small["ideal_share"] == pytest.approx({"median": 0.5, "p25": 0.5, "p75": 0.5})


@pytest.fixture
def pair(tiny_model):
    return {"dense": tiny_model(), "small": tiny_model(mlp_hidden_size=16)}


def test_forward_rows(pair):
    rows = forward_rows(pair, Size(2, 8), Timing(3, 1))
    assert [row["model"] for row in rows] == ["dense", "small"]
    for row, model in zip(rows, pair.values()):
        assert (row["batch"], row["length"]) == (2, 8) and row["macs"] == 2 * forward_macs(Adapter(model), 8)
        assert row["peak_above_weights"] is None or row["peak_above_weights"] >= 0
        assert row["tokens_per_second"] == pytest.approx(16e3 / row["ms"]["median"])
    assert "speedup" not in rows[0] and rows[1]["ideal_share"] is not None
    assert rows[1]["macs_removed"] == pytest.approx(1 - rows[1]["macs"] / rows[0]["macs"])


@pytest.mark.slow
def test_generation_rows(pair, monkeypatch):
    settings, asked = LLaDAGeneration(8, 8, 4), []

    def noted(model, prompts, given, options):
        asked.append((prompts.shape, options.batch, options.cache))
        return generate(model, prompts, given, options=options)

    monkeypatch.setattr(module, "generate", noted)
    full = {}
    work = GenerationWork(Size(2, 20), settings, full)
    plain = generation_rows(pair, work, "none", Timing(2, 0))
    assert set(asked) == {((2, 12), 2, "none")} and len(asked) == 2 * (1 + 2 + 1)  # counted, two rounds, peak
    assert [row["agreement"] for row in plain] == [None, None] and list(full) == ["dense", "small"]
    asked.clear()
    del full["small"]
    rows = generation_rows(pair, work, "dual", Timing(2, 1))
    assert [cache for _, _, cache in asked].count("none") == 1  # the other is known
    assert len(asked) == 1 + 2 * (1 + 1 + 2 + 1) and set(full) == {"dense", "small"}
    for row, full, model in zip(rows, plain, pair.values()):
        assert row["cache"] == "dual" and row["macs"] < full["macs"]
        prompts = module.random_ids(pair["dense"], 2, 12)
        kept, whole = (
            generate(model, prompts, settings, options=Options(cache=name))[:, -8:] for name in ("dual", "none")
        )
        assert row["agreement"] == (kept == whole).double().mean().item()
        assert row["tokens_per_second"] == pytest.approx(16e3 / row["ms"]["median"])


def test_agreement_is_of_generated_tokens_only(pair, monkeypatch):
    def fake(model, prompts, settings, options):
        model(prompts)  # so that there are MACs to count
        tail = torch.arange(8)[None].repeat(2, 1)
        tail[0, :4] += 100 * (options.cache != "none")  # 4 of 16 differ
        return torch.cat((prompts, tail), dim=1)

    monkeypatch.setattr(module, "generate", fake)
    settings = LLaDAGeneration(8, 8, 4)
    rows = generation_rows({"dense": pair["dense"]}, GenerationWork(Size(2, 20), settings), "prefix", Timing(1, 0))
    assert rows[0]["agreement"] == 0.75


def test_peaks_are_of_calls_made_before(pair, monkeypatch):
    """So that neither loading of libraries nor compilation is taken for what a model needs."""
    runs, settings = [], LLaDAGeneration(8, 4, 4)
    pair["small"].register_forward_pre_hook(lambda *_: runs.append("forward"))
    pair["small"].blocks[0].register_forward_pre_hook(lambda *_: runs.append("block"))
    monkeypatch.setattr(module, "peak_above", lambda call, device: runs.append("peak") or call())
    forward_rows(pair, Size(1, 16), Timing(2, 1))
    assert runs[:-2].count("forward") == 1 + 1 + 2 and runs[-3:] == ["peak", "forward", "block"]
    runs.clear()
    generation_rows(pair, GenerationWork(Size(1, 16), settings), "none", Timing(1, 1))
    last = len(runs) - runs[::-1].index("peak")
    assert runs[:last].count("block") == 3 * 4 and runs[last:] == ["block"] * 4
