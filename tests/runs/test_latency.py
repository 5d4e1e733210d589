"""Pruning to a latency: the plan by a table known beforehand, the report, tables that are kept, and what is refused."""

import json

import pytest
import torch

from structprune.bench.part_latency import table_identity
from structprune.bench.settings import Size
from structprune.cli.main import main
from structprune.config import Config
from structprune.config.effects import check_search
from structprune.errors import UserError
from structprune.levels import search
from structprune.levels.latency import LatencyTable, LatencyTarget, PartTimes
from structprune.models.adapter import Adapter
from structprune.models.loading import load_model
from structprune.report.tables import inspect_tables, run_table
from structprune.runs import latency as latency_run
from structprune.runs.checkpoints import prune_checkpoint
from structprune.runs.inspect import inspect_checkpoint
from structprune.runs.latency import LATENCY_FILE as TABLE
from structprune.runs.latency import choose_for_latency
from structprune.runs.pruner import Pruner
from structprune.runs.resolve import resolve_structured
from structprune.runs.work import Work
from structprune.structured.paths import static_path
from structprune.structured.sizes import block_size

BASE = {
    "calibration.windows": 8, "calibration.held_out": 4, "calibration.length": 24, "calibration.steps": 2,
    "calibration.interval": 1, "calibration.batch": 4, "structured.split": "joint", "structured.round_to": 8,
    "reconstruct.damping": [0.1], "model.device": "cpu", "search.enabled": True, "search.rounds": 1,
    "search.method": "knapsack", "search.sequences": 8, "search.budget": "latency",
}  # fmt: skip


def by_parameters(model, form, multiple, size, timing=None) -> LatencyTable:
    """A microsecond for every parameter of a block, 1 ms for the rest."""
    parts = []
    for block in Adapter(model).blocks:
        one = block_size(block, form)
        for kind, steps in one.steps.items():
            removed = tuple(range(steps))
            ms = tuple((one.whole[kind] - one.removed(kind, count)) / 1000 for count in removed)
            parts.append(PartTimes(kind, (block.index,), steps, removed, ms))
    dense = 1 + sum(part.ms[0] for part in parts)
    return LatencyTable(dense, 1.0, 1.0, tuple(parts), table_identity(model, form, multiple, size))


@pytest.fixture
def known_times(monkeypatch) -> None:
    monkeypatch.setattr(latency_run, "measure_table", by_parameters)


@pytest.fixture
def config(text_path):
    def make(**keys) -> Config:
        return Config.load(overrides=BASE | {"calibration.source": str(text_path)} | keys)

    return make


def test_the_plan_meets_the_target(tiny_checkpoint, config, known_times):
    """With a microsecond for every parameter the milliseconds are the parameters, of the ranked plan and after all."""
    model = load_model(tiny_checkpoint())
    dense = by_parameters(model, "query_heads", 8, Size(1, 24)).dense
    report = Pruner(model, config(**{"search.target_ms": 0.6 * dense})).prune().report
    latency = report["latency"]
    assert latency["target_ms"] == 0.6 * dense and latency["predicted"]["before"] == pytest.approx(dense)
    assert 0.94 * latency["target_ms"] < latency["predicted"]["after"] <= latency["target_ms"] * (1 + 1e-9)
    left = report["block_parameters"]["after"]
    assert latency["predicted"]["after"] == pytest.approx(1 + left / 1000)
    assert latency["ratio"] == pytest.approx(report["ratio"], abs=0.05)
    Config.model_validate(report["config"])
    assert report["config"]["structured"]["ratio"] == Config().structured.ratio  # so that it can be given again
    assert min(latency["measured"].values()) > 0 and latency["batch"] == 1 and latency["length"] == 24
    json.dumps(report)
    table = run_table(report)
    assert "ms, batch 1 x 24 tokens" in table.columns[0]._cells
    assert f"latency: target {0.6 * dense:g} ms, predicted {latency['predicted']['after']:.3f}" in table.caption


def test_the_ratio_is_the_smallest_that_will_do(tiny_model, known_times, config):
    """Without a search; a split that costs more time than another takes a higher ratio."""
    model = tiny_model()
    table = by_parameters(model, "query_heads", 8, Size(1, 24))
    request = resolve_structured(config(**{"search.target_ms": 1.0}), model)
    paths = {
        (size.index, kind): static_path(torch.ones(steps), [range(steps)])
        for size in request.sizes
        for kind, steps in size.steps.items()
    }
    blocks = table.dense - 1
    for share in (0.3, 0.55, 0.8):
        target = LatencyTarget(1 + share * blocks, table)
        chosen, choice = choose_for_latency(target, request, paths, choose=None)
        assert target.met(choice.counts)
        step = max(size.step["attention"] for size in request.sizes) / 1000
        assert table.total(choice.counts) > target.ms - 2 * step
        assert chosen.settings.ratio == pytest.approx(1 - share, abs=0.06)


def test_a_kept_table_is_used_again(tiny_checkpoint, config, known_times, tmp_path, monkeypatch):
    """Another measurement would change the plan. Another target reads the same table, another workload is refused."""
    model, levels = load_model(tiny_checkpoint("dream")), tmp_path / "levels"
    dense = by_parameters(model, "query_heads", 8, Size(1, 24)).dense
    first = Pruner(model, config(**{"search.target_ms": 0.6 * dense}), levels=levels).prune()

    def measured(*args):
        raise AssertionError("the table is there")

    monkeypatch.setattr(latency_run, "measure_table", measured)
    again = Pruner(model, config(**{"search.target_ms": 0.6 * dense}), levels=levels).prune()
    assert again.plan == first.plan and again.report["latency"]["table"] == first.report["latency"]["table"]
    other = Pruner(model, config(**{"search.target_ms": 0.7 * dense}), levels=levels).prune()
    assert other.report["latency"]["predicted"]["after"] <= 0.7 * dense * (1 + 1e-9)
    names = {f"latency-{share * dense}" for share in (0.6, 0.7)}
    assert {path.name for path in levels.iterdir()} == {"first", "latency.json", *names}
    with pytest.raises(UserError, match=r"latency.json was measured for another batch \(1, now 2\): give another"):
        Pruner(model, config(**{"search.target_ms": 0.65 * dense, "search.latency_batch": 2}), levels=levels).prune()
    (levels / "latency.json").write_text("{}")
    with pytest.raises(UserError, match="latency.json is no table of latencies"):
        Pruner(model, config(**{"search.target_ms": 0.5 * dense}), levels=levels).prune()
    (levels / "latency.json").unlink()
    with pytest.raises(UserError, match="lacks the times that it was measured with: delete"):
        Pruner(model, config(**{"search.target_ms": 0.6 * dense}), levels=levels)


def test_protected_blocks_take_their_time(tiny_checkpoint, config, known_times):
    model = load_model(tiny_checkpoint())
    table = by_parameters(model, "query_heads", 8, Size(1, 24))
    first = sum(part.ms[0] for part in table.parts if part.blocks == (0,))
    keys = {"structured.protect_first": 1, "search.target_ms": 0.7 * table.dense}
    pruned = Pruner(model, config(**keys)).prune()
    assert len(pruned.plan.blocks[0].query_heads) == 4 and len(pruned.plan.blocks[0].channels) == 48
    assert 0.64 * table.dense < pruned.report["latency"]["predicted"]["after"] <= 0.7 * table.dense * (1 + 1e-9)
    with pytest.raises(UserError, match="cannot be met: the narrowest plan takes"):
        Pruner(model, config(**keys | {"search.target_ms": 1 + first})).prune()


def test_a_run_that_was_killed_goes_on_with_its_table(tiny_checkpoint, config, known_times, tmp_path, monkeypatch):
    source = tiny_checkpoint()
    dense = by_parameters(load_model(source), "query_heads", 8, Size(1, 24)).dense
    settings, count, original = config(**{"search.target_ms": 0.6 * dense}), [0], search.StitchedModel.loss
    whole = Pruner(load_model(source), settings, levels=tmp_path / "whole").prune()

    def killed(self, counts, share=1.0):
        count[0] += 1
        if count[0] == 8:
            raise KeyboardInterrupt
        return original(self, counts, share)

    with monkeypatch.context() as patch:
        patch.setattr(search.StitchedModel, "loss", killed)
        with pytest.raises(KeyboardInterrupt):
            Pruner(load_model(source), settings, levels=tmp_path / "part").prune()
    table = (tmp_path / "part" / "latency.json").read_bytes()
    monkeypatch.setattr(latency_run, "measure_table", None)
    resumed = Pruner(load_model(source), settings, levels=tmp_path / "part").prune()
    assert resumed.plan == whole.plan and resumed.report["search"] == whole.report["search"]
    assert (tmp_path / "part" / "latency.json").read_bytes() == table


def test_targets_out_of_reach_are_refused_before_scores(tiny_checkpoint, config, known_times, tmp_path, monkeypatch):
    source = str(tiny_checkpoint())
    monkeypatch.setattr(Pruner, "_ranked", None)
    for ms, message in (
        (1000.0, "leaves nothing to remove, the dense model takes"),
        (1.001, "cannot be met: the narr"),
    ):
        with pytest.raises(UserError, match=message):
            work = Work(levels=tmp_path / "levels")
            prune_checkpoint(source, tmp_path / "out", config(**{"search.target_ms": ms}), work=work)
    # the table is kept, so that a target that is mended meets the same times
    assert not (tmp_path / "out").exists() and [each.name for each in (tmp_path / "levels").iterdir()] == [TABLE]


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, "search.budget = latency needs milliseconds: set search.target_ms"),
        ({"search.target_ms": 5.0, "structured.ratio": 0.3}, "structured.ratio = 0.3 has no effect"),
        ({"search.target_ms": 5.0, "search.budget": "macs"}, "search.target_ms = 5.0 has no effect"),
        ({"search.target_ms": 5.0, "search.latency_length": 9000}, "search.latency_length = 9000 exceeds the model's"),
    ],
)
def test_what_contradicts_a_latency(tiny_checkpoint, config, change, message):
    with pytest.raises(UserError, match=message):
        Pruner(load_model(tiny_checkpoint()), config(**change))


def test_offloaded_weights_are_not_timed(config):
    message = "would time copies of weights with memory.offload = true: turn one of them off"
    with pytest.raises(UserError, match=message):
        check_search(config(**{"search.target_ms": 5.0, "memory.offload": True}))


def test_a_ratio_beside_a_latency_is_refused(tiny_checkpoint, config):
    with pytest.raises(UserError, match="search.budget = latency decides how much goes: leave out ratio 0.3"):
        Pruner(load_model(tiny_checkpoint()), config(**{"search.target_ms": 5.0})).prune(0.3)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--ratio", "0.3"], "--target-latency 5 decides how much goes: leave out --ratio 0.3"),
        (["--ratio", "0.3,0.5"], "--target-latency 5 decides how much goes: leave out --ratio 0.3"),
        (["--set", "export.compat=uniform"], "set export.compat = free, not uniform"),
        (["--method", "unstructured"], "--target-latency 5 has no effect with method unstructured"),
        (["--set", "search.enabled=false"], "--target-latency 5 is met by a search: leave out search.enabled = false"),
        (["--set", "search.target_ms=4"], "--target-latency 5 and --set search.target_ms both say how much goes"),
        (["--plan", "plan.json"], "--plan already says what is removed: leave out --target-latency 5"),
    ],
)
def test_options_that_contradict_a_latency(tiny_checkpoint, tmp_path, capsys, options, message):
    command = ["prune", str(tiny_checkpoint()), "--out", str(tmp_path / "out"), "--target-latency", "5"]
    assert main([*command, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_ratio_on_the_command_line_beside_a_latency_budget(tiny_checkpoint, tmp_path, capsys):
    """Also one that equals the default."""
    sets = ["--set", "search.enabled=true", "--set", "search.budget=latency", "--set", "search.target_ms=5"]
    command = ["prune", str(tiny_checkpoint()), "--out", str(tmp_path / "out"), *sets, "--ratio", "0.5"]
    assert main(command) == 2
    assert "search.budget = latency decides how much goes: leave out --ratio 0.5" in capsys.readouterr().err


def test_a_dry_run_says_that_times_decide(tiny_checkpoint, config):
    result = inspect_checkpoint(tiny_checkpoint(), config(**{"search.target_ms": 5.0, "search.latency_batch": 2}))
    assert result["latency"] == {"target_ms": 5.0, "batch": 2, "length": 24}
    assert any("5 ms" in str(table.title) + str(table.caption) for table in inspect_tables(result))


def test_a_latency_table_of_levels_on_the_command_line(tiny_checkpoint, text_path, tmp_path, capsys):
    """A table that lies there, since times measured on a busy machine can make any target one that cannot be met."""
    source, out, levels = tiny_checkpoint(), tmp_path / "out", tmp_path / "levels"
    table = by_parameters(load_model(source), "query_heads", 8, Size(4, 64))
    target = table.rest + 0.6 * (table.dense - table.rest)
    sets = [f"--set={key}={value}" for key, value in BASE.items() if key not in ("search.enabled", "search.budget")]
    sets += ["--set=search.latency_batch=4", "--set=search.latency_length=64"]
    levels.mkdir()
    (levels / "latency.json").write_text(json.dumps(table.plain()))
    command = ["prune", str(source), "--out", str(out), "--calibration", str(text_path), *sets]
    assert main([*command, "--levels", str(levels), "--target-latency", str(target)]) == 0
    latency = json.loads((out / "report.json").read_text())["latency"]
    assert latency["predicted"]["after"] <= target * (1 + 1e-9) and latency["target_ms"] == target
    assert f"latency: target {target:g} ms" in " ".join(capsys.readouterr().out.split())
    assert "ms per forward pass (batch 4 x 64 tokens" in (out / "README.md").read_text()
