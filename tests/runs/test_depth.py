"""Whole runs with a search for blocks to drop: what goes, what is kept, how it loads, and what is refused."""

import json
import re

import pytest
import torch

from structprune.cli.main import main
from structprune.config import Config
from structprune.errors import UserError
from structprune.models.loading import load_model
from structprune.report.tables import inspect_tables, run_table
from structprune.runs import pruner as pruner_run
from structprune.runs.checkpoints import prune_checkpoint
from structprune.runs.inspect import inspect_checkpoint
from structprune.runs.prune import prune
from structprune.runs.pruner import Pruner
from structprune.runs.work import Work
from structprune.structured.plan import Plan

OFFICIAL = {"export.compat": "official", "structured.split": 0}


def keys(text_path, **overrides) -> dict:
    return {
        "calibration.source": str(text_path), "calibration.windows": 8, "calibration.held_out": 4,
        "calibration.length": 24, "calibration.steps": 2, "calibration.interval": 1, "calibration.batch": 4,
        "structured.ratio": 0.4, "structured.allocation": "uniform", "structured.round_to": 8,
        "structured.split_windows": 4, "search.enabled": True, "search.sequences": 8, "export.compat": "uniform",
        "reconstruct.damping": [0.1], "model.device": "cpu",
    } | overrides  # fmt: skip


def run_config(text_path, **overrides) -> Config:
    return Config.load(overrides=keys(text_path, **overrides))


def without_effect(model, index: int):
    """The model with a block that adds nothing to the stream."""
    block = model.blocks[index]
    with torch.no_grad():
        for role in ("attention_output", "down"):
            block.part(role).weight.zero_()
    return model


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("family", ["llada", "dream", "a2d-qwen3"])
def test_a_block_without_effect_is_the_one_that_goes(tiny_checkpoint, text_path, family, index):
    model = without_effect(load_model(tiny_checkpoint(family)), index)
    pruned = prune(model, run_config(text_path, **OFFICIAL))
    report = pruned.report
    note = report["search"]
    assert note["order"] == [{"block": index, "divergence": pytest.approx(0, abs=1e-6)}]
    assert note["kept"] == "searched" and report["removed"]["blocks"] == [index]
    assert pruned.plan.remaining == tuple(block for block in range(3) if block != index)
    assert report["export_class"] == "official" and len(pruned.model.blocks) == 2
    assert len({tuple(width.items()) for width in report["widths"]}) == 1
    assert [each["dropped"] for each in note["candidates"]] == [[], [index]]
    remaining = next(block for block in pruned.plan.blocks if block.kinds)
    channels = 48 - len(remaining.channels)
    assert note["candidates"][1] == {
        "dropped": [index], "attention": 0, "channels": channels,
        "divergence": note["candidates"][1]["divergence"],
    }  # fmt: skip
    assert note["candidates"][1]["divergence"] < note["candidates"][0]["divergence"]
    assert note["divergence"]["searched"] < note["divergence"]["ranked"]
    assert report["held_out_nelbo"]["loss"]["mean"] == note["loss"]["searched"]
    text = " ".join(run_table(report).caption.split())
    assert f"kept: the searched plan removed as a whole: block {index}" in text


def test_an_official_result_loads_with_fewer_layers(tiny_checkpoint, text_path, tmp_path):
    source = tiny_checkpoint()
    model = without_effect(load_model(source), 1)
    pruned = prune(model, run_config(text_path, **OFFICIAL))
    out = pruned.save(tmp_path / "out")
    before, after = (json.loads((place / "config.json").read_text()) for place in (source, out))
    width = after["mlp_hidden_size"]
    assert after["n_layers"] == 2 and width < 48 and after["n_heads"] == before["n_heads"]
    assert after["model_type"] == "llada" and after["architectures"] == before["architectures"]
    again, ids = load_model(out), torch.arange(40)[None]
    assert len(again.blocks) == 2 and again.blocks[0].part("down").in_features == width
    with torch.no_grad():
        assert torch.equal(again(ids).logits, pruned.model(ids).logits)
    plan, report = Plan.load(out / "plan.json"), json.loads((out / "report.json").read_text())
    assert plan == pruned.plan and plan.blocks[1].channels == ()
    assert report["search"]["kept"] == "searched"
    card = " ".join((out / "README.md").read_text().split())
    assert "Removed as a whole, by the numbers of its blocks: block 1." in card and "Export class: `official`" in card
    assert "then a search for whole blocks to drop" in card
    # the plan holds under its class when it is given, too
    given = Config.load(overrides=keys(text_path, **OFFICIAL) | {"search.enabled": False, "search.sequences": 32})
    assert prune(load_model(source), given, plan=plan).report["export_class"] == "official"


def test_heads_are_searched_for_under_uniform(tiny_checkpoint, text_path):
    """Every plan that was measured has the ratio, equal blocks, and a number of heads of its own; the run repeats."""
    source, config = tiny_checkpoint(), run_config(text_path, **{"structured.ratio": 0.6})
    pruned = Pruner(load_model(source), config).prune()
    trials = pruned.report["search"]["candidates"]
    assert len({(len(each["dropped"]), each["attention"]) for each in trials}) == len(trials) >= 3
    step, block = {"attention": 4 * 8 * 32, "channels": 3 * 32}, 4 * 32 * 32 + 3 * 32 * 48
    for each in trials:
        gone, left = len(each["dropped"]), 3 - len(each["dropped"])
        removed = gone * block + left * sum(each[kind] * size for kind, size in step.items())
        assert removed == pytest.approx(0.6 * 3 * block, abs=left * 4 * 96)  # half of eight channels a block
    assert pruned.report["export_class"] in ("uniform", "official")
    assert len({block.widths for block in pruned.plan.blocks if block.kinds}) == 1
    again = Pruner(load_model(source), config).prune()
    assert again.plan == pruned.plan and again.report["search"] == pruned.report["search"]


@pytest.mark.parametrize("divergences, kept", [([0.5, 0.4], "searched"), ([0.4, 0.5], "ranked")])
def test_the_better_plan_is_kept(tiny_checkpoint, text_path, monkeypatch, divergences, kept):
    monkeypatch.setattr(pruner_run, "held_out_divergences", lambda *args: divergences)
    pruned = prune(load_model(tiny_checkpoint()), run_config(text_path, **OFFICIAL))
    assert pruned.report["search"]["kept"] == kept
    assert len(pruned.report["removed"]["blocks"]) == (kept == "searched")
    choice = pruned.report["choice"]
    assert choice["channels"] == [48 - len(block.channels) for block in pruned.plan.blocks]
    assert choice["attention"] == [4 - len(block.query_heads) for block in pruned.plan.blocks]
    assert choice["ratio"] == pytest.approx(pruned.report["ratio"])
    assert f"kept: the {kept} plan" in run_table(pruned.report).caption


@pytest.mark.parametrize(
    "change, message",
    [
        ({"search.whole": False}, "search.enabled = true with export.compat = uniform needs search.whole = true"),
        ({"structured.allocation": "global"}, "with export.compat = uniform needs structured.allocation = uniform"),
        ({"reconstruct.enabled": False}, "with export.compat = uniform needs reconstruct.enabled = true"),
        ({"reconstruct.constant": True}, "the refit would add biases"),
        ({"search.method": "knapsack"}, "search.method = knapsack has no effect without export.compat = free"),
        ({"search.budget": "macs"}, "search.budget = macs has no effect without export.compat = free"),
        ({"search.rounds": 3}, "search.rounds = 3 has no effect without export.compat = free"),
        ({"search.levels": 3}, "search.levels = 3 has no effect without export.compat = free"),
        ({"search.offspring": 3}, "search.offspring = 3 has no effect without export.compat = free"),
        (
            {"structured.ratio": 0.2},
            "structured.ratio = 0.2 has no room for one of 3, a share of 0.3333: raise the ratio, or",
        ),
        (
            {"structured.split": 2},
            "with structured.split = 2 has no room for one of 3, a share of 0.3333: raise the ratio or",
        ),
    ],
)
def test_what_contradicts_a_search_for_blocks(tiny_checkpoint, text_path, change, message):
    source, config = tiny_checkpoint(), run_config(text_path, **change)
    for run in (lambda: prune(load_model(source), config), lambda: inspect_checkpoint(source, config)):
        with pytest.raises(UserError, match=re.escape(message)) as error:
            run()
        assert "\n" not in str(error.value)


def test_nothing_is_searched_for_at_ratio_0(tiny_checkpoint, text_path):
    report = prune(load_model(tiny_checkpoint()), run_config(text_path, **{"structured.ratio": 0.0})).report
    assert report["search"] is None and report["removed"]["blocks"] == []


def test_levels_are_refused(tiny_checkpoint, text_path, tmp_path, capsys):
    source, levels = tiny_checkpoint(), tmp_path / "levels"
    message = f"--levels {levels} has no effect with export.compat = uniform, whose search makes none: leave it out"
    config = run_config(text_path)
    with pytest.raises(UserError, match=re.escape(message)):
        prune_checkpoint(str(source), tmp_path / "out", config, work=Work(levels=levels))
    with pytest.raises(UserError, match=re.escape(message)):
        Pruner(load_model(source), config, levels=levels)
    sets = [f"--set={key}={json.dumps(value)}" for key, value in keys(text_path).items()]
    assert main(["prune", str(source), "--out", str(tmp_path / "out"), "--levels", str(levels), *sets]) == 2
    assert message in capsys.readouterr().err
    assert not levels.exists() and not (tmp_path / "out").exists()


def test_a_dry_run_predicts_the_search(tiny_checkpoint, text_path):
    """By hand, for one block of three that can go, and heads that all stay."""
    source = tiny_checkpoint()
    config = run_config(text_path, **OFFICIAL, **{"reconstruct.producers": False})
    result = inspect_checkpoint(source, config)
    cost, block, head = result["search"], 4 * 32 * 32 + 3 * 32 * 48, 2048 * 32
    assert set(cost["operations"]) == {"search", "refit"} and cost["disk"] == 0

    def walk(rows):
        widths = (32, 48)
        solve = sum((width * 0.6) ** 3 / 3 + 4 * (width * 0.6) ** 2 * 32 for width in widths)
        return 3 * (4 * rows * block + sum(rows * (width**2 + 2 * width * 32) for width in widths) + solve)

    sequences = 24 * config.calibration.noisy_copies
    assert cost["operations"]["refit"] == pytest.approx(2 * walk(12 * sequences))
    tokens = 8 * 24
    dropping, measuring = 3 * (2 * 2 * block + head), 2 * (2 * 1.8 * block + head)
    assert cost["operations"]["search"] == pytest.approx(tokens * (dropping + measuring) + 2 * walk(8 * sequences))
    memory = result["memory"]
    assert memory["search"] == memory["pruned weights"] + max(memory["refit"], memory["held-out check"])
    table = inspect_tables(result)[-1]
    assert list(table.columns[0].cells) == ["search", "refit"] and table.caption is None
