"""Whole runs that remove attention, MLPs and blocks, and runs on what is left."""

import json
from io import StringIO

import pytest
import torch
from rich.console import Console

from structprune import Config, Plan, UserError, load_model, prune
from structprune.models.adapter import Adapter
from structprune.report.tables import run_table
from structprune.runs.inspect import inspect_checkpoint, inspect_masking
from structprune.structured.plan import BlockPlan, identity_plan

TEXT = {"calibration.windows": 3, "calibration.held_out": 2, "calibration.length": 16, "calibration.interval": 25}
NOTHING = BlockPlan((), (), ())
RUNS = {
    "joint": {"structured.split": "joint", "structured.rounds": 4},
    "measured": {"structured.split_candidates": 2, "structured.split_windows": 2, "structured.score": "wanda"},
    "uniform": {"structured.allocation": "uniform", "structured.split": "equal", "structured.score": "fluctuation"},
    "depth": {"structured.allocation": "depth", "structured.split": 1, "structured.score": "magnitude"},
    "protected": {"structured.protect_first": 1, "structured.split": "joint", "structured.score": "taylor"},
    "sinks": {"structured.arm": "masked+sink", "structured.split": "joint", "structured.score": "wanda"},
    "2:4": {"method": "nm"},
    "owl": {"method": "unstructured", "masking.allocation": "owl", "masking.owl_spread": 0.05},
}


@pytest.fixture
def config(text_path):
    return lambda **changes: Config.load(overrides={"calibration.source": str(text_path)} | TEXT | changes)


@pytest.fixture(params=["llada", "dream"])
def removed(request, tiny_checkpoint, config):
    """The dense model, and the result of a run without one MLP, one block, and one attention."""
    sizes = {"num_hidden_layers": 4} if request.param == "dream" else {"n_layers": 4}
    dense = load_model(tiny_checkpoint(request.param, **sizes))
    first, _, third, last = identity_plan(Adapter(dense)).blocks
    blocks = (
        BlockPlan(first.query_heads, first.kv_heads, ()), NOTHING, third, BlockPlan((), (), tuple(range(0, 48, 2))),
    )  # fmt: skip
    return dense, prune(dense, config(), plan=Plan(request.param, blocks))


def test_the_report_names_what_went(removed):
    dense, pruned = removed
    report, small = pruned.report, Adapter(pruned.model)
    assert report["removed"] == {"blocks": [1], "attention": [3], "channels": [0]}
    assert [row["channels"] for row in report["widths"]] == [0, 48, 24] and len(small.blocks) == 3
    keys = [(0, "attention"), *((2, role) for role in ("query", "key", "value", "attention", "gate", "up", "channels"))]
    keys += [(3, role) for role in ("gate", "up", "channels")]
    assert [(fit["block"], fit["kind"]) for fit in report["refit"]] == keys
    projections = [
        sum(p.numel() for b in a.blocks for r in b.names for p in b[r].parameters()) for a in (Adapter(dense), small)
    ]
    assert report["ratio"] == pytest.approx(1 - projections[1] / projections[0])
    assert report["export_class"] == "free"
    console = Console(width=100, file=StringIO())
    console.print(run_table(report))
    assert "removed as a whole: block 1; attention of block 3; MLP of block 0" in console.file.getvalue()


def test_the_ratio_is_that_of_unprotected_blocks(tiny_checkpoint, config):
    """Which the deletion of a block before them does not move."""
    dense = load_model(tiny_checkpoint("llada"))
    whole = identity_plan(Adapter(dense)).blocks
    half = BlockPlan(whole[1].query_heads, whole[1].kv_heads, tuple(range(24)))
    changes = {"structured.protect_first": 1, "reconstruct.enabled": False}
    report = prune(dense, config(**changes), plan=Plan("llada", (NOTHING, half, whole[2]))).report
    assert report["ratio"] == pytest.approx(3 * 32 * 24 / (2 * (4 * 32 * 32 + 3 * 32 * 48)))
    assert report["removed"]["blocks"] == [0]


@pytest.mark.parametrize("name", RUNS)
def test_what_is_left_is_the_input_of_every_method(removed, config, tmp_path, name):
    directory = removed[1].save(tmp_path / "gaps")
    model = load_model(directory)
    changes = RUNS[name] | ({} if "method" in RUNS[name] else {"structured.ratio": 0.3})
    settings = config(**changes)
    result = prune(model, settings)
    again = load_model(result.save(tmp_path / "again"))
    ids = torch.arange(24).view(2, 12)  # (B, T)
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, result.model(ids).logits)
        assert not torch.equal(again(ids).logits, model(ids).logits)
    if "method" in RUNS[name]:
        shares = result.report["sparsity"]["tensors"]
        assert len(shares) == 4 + 7 + 3 and result.report["sparsity"]["total"] == pytest.approx(0.5, abs=0.03)
        shown = inspect_masking(directory, settings)
        assert shown["projections"]["query"]["weights"] < shown["projections"]["gate"]["weights"] * 2
        assert (
            sum(part["weights"] for part in shown["projections"].values()) == result.report["parameters"]["projections"]
        )
    else:
        assert result.report["ratio"] == pytest.approx(0.3, abs=0.04)
        assert [block.kinds for block in result.plan.blocks] == [block.kinds for block in Adapter(model).blocks]
        assert inspect_checkpoint(directory, settings)["ratio"] == 0.3
        assert result.report["removed"] == {"blocks": [], "attention": [], "channels": []}


@pytest.mark.parametrize("compat", ["official", "uniform"])
def test_whole_blocks_are_exported_as_fewer_equal_ones(tiny_checkpoint, config, tmp_path, compat):
    dense = load_model(tiny_checkpoint("llada"))
    whole = identity_plan(Adapter(dense)).blocks
    pruned = prune(dense, config(**{"export.compat": compat}), plan=Plan("llada", (whole[0], NOTHING, whole[2])))
    assert pruned.report["export_class"] == "official"
    directory = pruned.save(tmp_path / "small")
    values = json.loads((directory / "config.json").read_text())
    assert values["n_layers"] == 2 and "per_layer_config" not in values
    assert values["model_type"] == "llada" and "head_dim" not in values
    again = load_model(directory)
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, pruned.model(ids).logits)
    with pytest.raises(UserError, match=f"export.compat = {compat} is not possible: some blocks lack attention or MLP"):
        half = BlockPlan((), (), whole[1].channels)
        prune(dense, config(**{"export.compat": compat}), plan=Plan("llada", (whole[0], half, whole[2])))


@pytest.mark.parametrize("name", ["joint", "2:4"])
def test_streamed_weights_give_the_same(removed, config, tmp_path, name, cpu_accelerator):
    directory = removed[1].save(tmp_path / "gaps")
    changes = RUNS[name] | ({} if "method" in RUNS[name] else {"structured.ratio": 0.3})
    results = [prune(load_model(directory), config(**changes, **{"memory.offload": each})) for each in (True, False)]
    ours, theirs = (result.model.state_dict() for result in results)
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())
