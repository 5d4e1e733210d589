"""The dry run's prediction of memory, by hand at the true shape of LLaDA-8B."""

import pytest
import torch

from structprune import Config
from structprune.calibration.batches import Calibration
from structprune.models.loading import load_model
from structprune.runs.inspect import inspect_checkpoint, inspect_masking

PROJECTIONS, TOTAL = 4 * 4096**2 + 3 * 4096 * 12288, 8_015_581_184  # parameters of a block's projections, of the model


def test_8b_at_the_published_volume_needs_8_gb_above_its_weights(monkeypatch, published_config):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    volume = {"calibration.windows": 128, "calibration.length": 4096, "structured.ratio": 0.5}
    result = inspect_checkpoint(published_config("llada"), Config.load(None, volume))["memory"]
    assert 5e9 < result["peak device"] - result["dense weights"] - result["pruned weights"] <= 8e9


@pytest.mark.slow
def test_predicted_peak(published_config):
    directory = published_config("llada")

    def memory(**options):
        keys = {"structured.ratio": 0.5, "structured.split": "equal", "model.device": "cpu"} | options
        return inspect_checkpoint(directory, Config.load(None, keys))["memory"]

    default = memory()
    assert default["dense weights"] == 4 * TOTAL  # fp32 on CPU whatever is stored
    assert default["pruned weights"] == 4 * 32 * (PROJECTIONS // 2 + 2 * 4096)
    assert default["peak host"] >= 4 * TOTAL + 5e9  # while loading: a shard beside what was read
    assert default["peak host"] >= default["dense weights"] + default["pruned weights"] + default["refit"]
    assert memory(**{"model.dtype": "bfloat16"})["dense weights"] == 2 * TOTAL
    assert memory(**{"reconstruct.enabled": False})["refit"] == 0
    assert memory(**{"structured.score": "magnitude"})["scoring (magnitude)"] == 0
    assert memory(**{"memory.budget_gb": 1.0})["peak host"] < default["peak host"]
    stream = 4 * 4096 * 144 * 10 * 2048  # of 144 windows at 10 levels, 2,048 tokens each
    assert default["temporary files"] == 2 * stream and memory(**{"memory.budget_gb": 1000})["temporary files"] == 0
    assert memory(**{"reconstruct.enabled": False})["temporary files"] == stream
    assert memory(**{"calibration.batch": 2}) == default  # a pass has 8,192 tokens already
    assert default["held-out check"] == 4 * 8192 * (3 * 12288 + 4 * 4096) + 8 * 126464 * 265


@pytest.mark.parametrize("method", ["structured", "unstructured"])
def test_a_saved_calibration_counts_with_its_own_sizes(tiny_checkpoint, tiny_calibration, tmp_path, method):
    directory, path = tiny_checkpoint(), tmp_path / "calibration.safetensors"
    tiny_calibration(load_model(directory), windows=7, length=24).save(path)
    saved = Calibration.load(path)
    inspect = inspect_checkpoint if method == "structured" else inspect_masking

    def memory(**calibration):
        keys = {f"calibration.{key}": value for key, value in calibration.items()} | {"memory.budget_gb": 1e-6}
        return inspect(directory, Config.load(None, keys | {"method": method, "model.device": "cpu"}))["memory"]

    sizes = {"windows": saved.fit.windows, "held_out": saved.held_out, "length": 24}
    text = sizes | {"steps": saved.levels, "interval": 1, "copies": saved.levels}
    assert memory(source=str(path)) == memory(**text) != memory(**text | {"windows": 40})


def test_predicted_peak_on_an_accelerator(monkeypatch, published_config):
    """Weights and working memory on the device, hidden states on the host; offload swaps the weights' place."""
    directory = published_config("llada")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def memory(**options):
        keys = {"structured.ratio": 0.5, "structured.split": "equal", "memory.budget_gb": 8.0} | options
        return inspect_checkpoint(directory, Config.load(None, keys))["memory"]

    whole, streamed = memory(), memory(**{"memory.offload": True})
    assert whole["dense weights"] == 2 * TOTAL and whole["hidden states"] == 16e9
    pass_ = 2 * 8192 * (5 * 12288 + 6 * 4096)  # 4 sequences of 2,048 tokens
    assert whole["held-out check"] == pass_ + 10 * 126464 * 265  # 265 rows of logits
    inverted = 24 * 12288**2 + 16 * 12288 * 4096
    assert whole["scoring (obs)"] == 4 * (12288**2 + 4096**2) + inverted > pass_
    working = max(whole["scoring (obs)"], whole["refit"])
    assert working == whole["refit"] == 8 * 12288 * (12288 + 4096) + 16 * 12288**2 + 40 * 12288 * 4096
    assert whole["batches under way"] == whole["layers under way"] == whole["pinned buffers"] == 0
    assert whole["peak device"] == whole["dense weights"] + whole["pruned weights"] + working
    head = 2 * 126464 * 4096  # the largest layer
    assert streamed["peak device"] == head + working
    assert streamed["peak host"] - whole["peak host"] == whole["dense weights"] + whole["pruned weights"]
    ahead = memory(**{"memory.offload": True, "memory.overlap": True})
    under_way = 2 * 2 * (8192 * 2 * 4096)  # the next and the last batch of either store
    assert ahead["batches under way"] == under_way and ahead["layers under way"] == 2 * head  # and the next layer
    assert ahead["peak device"] == 2 * head + under_way + working
    assert ahead["peak host"] - streamed["peak host"] == 4 * 2**26 == ahead["pinned buffers"]


def test_predicted_peak_covers_what_a_block_may_keep(published_config):
    """Under `global` a block may keep all channels; the measured split holds targets beside the final refit's."""
    directory = published_config("llada")

    def refit(**options):
        keys = {"structured.ratio": 0.5, "model.device": "cpu", "memory.budget_gb": 100.0} | options
        keys |= {"calibration.windows": 4, "calibration.held_out": 4, "calibration.length": 64}
        return inspect_checkpoint(directory, Config.load(None, keys))["memory"]["refit"]

    tokens, equal = 8 * 10 * 64, {"structured.split": "equal"}
    targets, one = tokens * 4 * 2 * 32 * 4096, tokens * 4 * 12288
    assert refit(**equal) == 24 * 12288**2 + 48 * 12288 * 4096 + targets + one
    fewer = 24 * 12288**2 + 48 * 12288 * 4096 + (targets + one) // 5
    assert refit(**{"calibration.copies": 2} | equal) == fewer  # of 10 copies
    assert refit(**{"structured.split_windows": 1}) - refit(**equal) == targets * 5 // 8
    uniform = {"structured.allocation": "uniform", "reconstruct.producers": False} | equal
    assert refit(**uniform) == 24 * 6144**2 + 48 * 6144 * 4096 + targets + one // 2


def test_predicted_peak_of_sums_beside_a_long_pass(published_config):
    """fp64 sums of fitted and held-out rows, a pass of 8,192 tokens and one fp32 copy need more than the solve."""
    keys = {"structured.ratio": 0.5, "model.device": "cpu", "memory.budget_gb": 100.0, "structured.split": "equal"}
    keys |= {"calibration.windows": 2, "calibration.held_out": 2, "calibration.length": 2048}
    keys |= {"structured.allocation": "uniform", "reconstruct.producers": False}
    refit = inspect_checkpoint(published_config("llada"), Config.load(None, keys))["memory"]["refit"]
    sums, tokens = 6144 * (6144 + 4096), 4 * 10 * 2048
    targets, one = tokens * 4 * 2 * 32 * 4096, tokens * 4 * 6144
    assert refit == 16 * sums + 4 * 8192 * (3 * 12288 + 4 * 4096) + 4 * 6144**2 + targets + one


def test_predicted_peak_of_the_refit_of_producers(published_config):
    """Where every block keeps 6,144 channels, their solve needs more than the consumer's and its input."""
    directory = published_config("llada")

    def memory(producers, **options):
        keys = {"structured.ratio": 0.5, "model.device": "cpu", "memory.budget_gb": 100.0} | options
        keys |= {"calibration.windows": 4, "calibration.held_out": 4, "calibration.length": 64}
        keys |= {"structured.split": "equal", "reconstruct.producers": producers}
        return inspect_checkpoint(directory, Config.load(None, keys))["memory"]

    uniform, tokens = {"structured.allocation": "uniform"}, 8 * 10 * 64
    targets = tokens * 4 * 2 * 32 * 4096
    assert memory(True, **uniform)["refit"] == 48 * 4096**2 + 64 * 4096 * 6144 + targets
    assert memory(True, **uniform)["refit"] > memory(False, **uniform)["refit"]
    assert memory(True)["refit"] == memory(False)["refit"]  # a block may keep all channels: the consumer needs more
    assert memory(True)["held-out check"] == memory(False)["held-out check"]


@pytest.mark.slow
def test_whole_windows_where_a_score_needs_them(published_config):
    """Windows of 4,096 tokens: two at a time, but for moments under sinks, which take all 10 levels."""
    directory = published_config("llada")

    def scoring(score, **options):
        keys = {"structured.ratio": 0.5, "structured.split": "equal", "model.device": "cpu", "structured.score": score}
        keys |= {"calibration.length": 4096, "memory.budget_gb": 100.0} | options
        return inspect_checkpoint(directory, Config.load(None, keys))["memory"][f"scoring ({score})"]

    window, features, unweighted = 4 * 10 * 4096, 3 * 12288 + 4 * 4096, {"structured.arm": "masked"}
    assert scoring("wanda") == window * (features + 32 * (4096 + 12288))
    assert scoring("wanda", **unweighted) == window * features
    assert scoring("wanda", **{"calibration.batch": 2} | unweighted) == 2 * window * features
    block = 4 * 4096**2 + 3 * 4096 * 12288  # weights of the seven linears
    held = 4 * (6 * 4096 + 4 * 12288) + 8 * 4097 + 4 * 32  # bytes a token, for the backward pass
    sums, head, tokens = 4 * 32 * block + 4 * 4096 * 12288, 2**28, 2 * 4096
    assert scoring("taylor") == sums + head + tokens * 33 * held
    assert scoring("taylor", **{"memory.budget_gb": 8.0}) == sums + head + tokens * (33 * 4096 * 4 + 2 * held)
    assert scoring("obs") == scoring("obs", **{"calibration.length": 2048})
