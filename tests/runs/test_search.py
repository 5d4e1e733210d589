"""Whole runs with a search: what is kept, going on after a kill, and what is refused."""

import json
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from structprune.cli.main import main
from structprune.config import Config, SearchSettings
from structprune.errors import UserError
from structprune.levels import search
from structprune.levels.library import counts_of
from structprune.levels.prices import mac_price
from structprune.models.adapter import Adapter
from structprune.models.loading import load_model
from structprune.report.tables import inspect_tables, run_table
from structprune.runs import pruner as pruner_run
from structprune.runs.checkpoints import prune_checkpoint
from structprune.runs.inspect import inspect_checkpoint
from structprune.runs.prune import prune
from structprune.runs.pruner import Pruner
from structprune.runs.search import weights_digest
from structprune.runs.work import Work
from structprune.structured.plan import Plan
from structprune.structured.sizes import BlockSize, forward_macs


def run_config(text_path, **overrides) -> Config:
    base = {
        "calibration.source": str(text_path), "calibration.windows": 8, "calibration.held_out": 4,
        "calibration.length": 24, "calibration.steps": 2, "calibration.interval": 1, "calibration.batch": 4,
        "structured.ratio": 0.4, "structured.split": "joint", "structured.round_to": 8, "search.enabled": True,
        "search.rounds": 2, "search.generations": 2, "search.offspring": 4, "search.sequences": 8,
        "reconstruct.damping": [0.1], "model.device": "cpu",
    }  # fmt: skip
    return Config.load(overrides=base | overrides)


@pytest.mark.parametrize("method", ["both", "knapsack", "evolution"])
def test_a_search_meets_the_ratio_and_keeps_the_better(tiny_checkpoint, text_path, method):
    model = load_model(tiny_checkpoint())
    options = {"search.method": method} | (
        {"search.generations": 8, "search.offspring": 16} if method == "knapsack" else {}
    )
    report = prune(model, run_config(text_path, **options)).report
    note = report["search"]
    assert 0.38 <= report["ratio"] <= 0.44  # steps of this model are 3% each
    assert note["kept"] == min(note["divergence"], key=note["divergence"].get)
    assert report["held_out_nelbo"]["loss"]["mean"] == note["loss"][note["kept"]]
    steps = {"both": ["start", "knapsack", "evolution"]}.get(method, ["start", method])
    assert [list(each["divergence"]) for each in note["rounds"]] == [steps] * 2
    for each in note["rounds"]:
        assert each["divergence"][steps[-1]] <= each["divergence"]["start"] or method == "knapsack"
    json.dumps(report)


def test_the_better_plan_is_kept(tiny_checkpoint, text_path, monkeypatch):
    model = load_model(tiny_checkpoint())
    for divergences, kept in (([0.5, 0.4], "searched"), ([0.4, 0.5], "ranked")):
        monkeypatch.setattr(pruner_run, "held_out_divergences", lambda *args, values=divergences: values)
        pruned = prune(model, run_config(text_path, **{"search.rounds": 1}))
        assert pruned.report["search"]["kept"] == kept
        counts = pruned.report["choice"]
        removed = [48 - len(block.channels) for block in pruned.plan.blocks]
        assert removed == counts["channels"]
        assert [4 - len(block.query_heads) for block in pruned.plan.blocks] == counts["attention"]


def test_a_run_that_was_killed_goes_on(tiny_checkpoint, text_path, tmp_path, monkeypatch):
    """Every measurement before the kill is used again, and the plan is that of a run without a break."""
    source, config = tiny_checkpoint("dream"), run_config(text_path)
    whole = Pruner(load_model(source), config, levels=tmp_path / "whole").prune()
    count, original = [0], search.StitchedModel.loss

    def killed(self, counts, share=1.0):
        count[0] += 1
        if count[0] == 12:
            raise KeyboardInterrupt
        return original(self, counts, share)

    monkeypatch.setattr(search.StitchedModel, "loss", killed)
    with pytest.raises(KeyboardInterrupt):
        Pruner(load_model(source), config, levels=tmp_path / "part").prune()
    again = [0]

    def counted(self, counts, share=1.0):
        again[0] += 1
        return original(self, counts, share)

    monkeypatch.setattr(search.StitchedModel, "loss", counted)
    resumed = Pruner(load_model(source), config, levels=tmp_path / "part").prune()
    assert resumed.plan == whole.plan and resumed.report["search"] == whole.report["search"]
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.model.state_dict().values(), whole.model.state_dict().values())
    )
    monkeypatch.setattr(search.StitchedModel, "loss", original)
    files = [
        sorted(path.relative_to(top) for path in top.rglob("*.*")) for top in (tmp_path / "whole", tmp_path / "part")
    ]
    # a header and three blocks of each round, losses of each, and the directory of the ratio, which has a dot
    assert len(files[0]) == 2 * 4 + 2 + 1 and files[0] == files[1]
    # a third run measures nothing of the search again
    before = again[0]
    monkeypatch.setattr(search.StitchedModel, "loss", counted)
    Pruner(load_model(source), config, levels=tmp_path / "part").prune()
    assert again[0] == before


def test_a_budget_of_macs(tiny_checkpoint, text_path):
    """A head takes more of it than of the parameters; the plan stays within what the ranking's leaves."""
    model = load_model(tiny_checkpoint())
    config = run_config(text_path, **{"search.budget": "macs", "calibration.length": 48})
    pruner = Pruner(model, config)
    ranked = Adapter(pruner._cut(pruner.plan()[0]))
    pruned = pruner.prune()
    searched = [each["plan"] for each in pruned.report["search"]["rounds"]][-1]
    price = mac_price(pruner.request.sizes, pruner.adapter, 48)
    budget = forward_macs(ranked, 48) / 48 - 2048 * 32
    assert budget * 0.9 < sum(price(key, steps) for key, steps in counts_of(searched).items()) <= budget * (1 + 1e-9)


def test_a_streamed_model_is_placed_for_the_whole_round(tiny_checkpoint, text_path, monkeypatch):
    """With offload the copy that a library leaves computes on the accelerator too, until its round has ended."""
    opened, original = [], Pruner.streamed

    @contextmanager
    def streamed(self, model):
        with original(self, model):
            opened.append(model)
            yield
            opened.remove(model)

    def loss(self, counts, share=1.0):
        assert self._model in opened
        return measure(self, counts, share)

    measure = search.StitchedModel.loss
    monkeypatch.setattr(Pruner, "streamed", streamed)
    monkeypatch.setattr(search.StitchedModel, "loss", loss)
    report = prune(load_model(tiny_checkpoint()), run_config(text_path)).report
    assert len(report["search"]["rounds"]) == 2 and opened == []


def test_plans_without_any_mlp_are_never_chosen():
    sizes = [BlockSize(i, 20, {"attention": 5, "channels": 5}, {"attention": 2, "channels": 2}, {}) for i in range(2)]
    task, watches = search.Task(SearchSettings(), sizes, 1, None, 1.0, 0, watch=lambda: watches.append(1)), []
    measure = search.finite_losses(lambda counts, share: math.nan if counts[0, "attention"] else share, task)
    counts = {(i, kind): 0 for i in range(2) for kind in ("attention", "channels")}
    assert measure(counts, 0.5) == 0.5 and measure(counts | {(0, "channels"): 2}, 0.5) == 0.5
    assert measure(counts | {(0, "channels"): 2, (1, "channels"): 2}, 0.5) == math.inf
    assert measure(counts | {(0, "attention"): 1}, 1.0) == math.inf
    assert len(watches) == 4  # a signal ends the search before any of its losses


def test_levels_of_another_run_are_refused(tiny_checkpoint, text_path, tmp_path):
    model = load_model(tiny_checkpoint())
    Pruner(model, run_config(text_path, **{"search.rounds": 1}), levels=tmp_path / "levels").prune()
    for key, value, name in (
        ("calibration.seed", 1, "calibration"), ("search.spread", 0.5, "search.spread"),
        ("sink.kappa", 1.0, "sink.kappa"),
    ):  # fmt: skip
        other = run_config(text_path, **{"search.rounds": 1, "structured.arm": "masked+sink", key: value})
        with pytest.raises(UserError, match=f"were made with another {name}"):
            Pruner(model, other, levels=tmp_path / "levels")  # before anything is scored
    Pruner(model, run_config(text_path, **{"search.rounds": 2}), levels=tmp_path / "levels")
    without = Config.load(overrides={"calibration.source": str(text_path), "calibration.length": 24})
    with pytest.raises(UserError, match="are for a search: set search.enabled = true, or leave them out"):
        Pruner(model, without, levels=tmp_path / "levels")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"reconstruct.enabled": False}, "search.enabled = true needs reconstruct.enabled = true"),
        ({"reconstruct.mode": "bias"}, "needs reconstruct.mode = least-squares"),
        ({"structured.allocation": "uniform", "structured.split": 1}, "needs structured.allocation = global"),
        ({"export.compat": "official"}, "with export.compat = official needs structured.allocation = uniform"),
        ({"search.enabled": False}, "search.sequences = 8 has no effect without search.enabled = true"),
        (
            {"search.method": "knapsack"},
            "search.generations = 2 has no effect without search.method = both or evolution",
        ),
        ({"method": "nm"}, "search.enabled = true has no effect on masks"),
    ],
)
def test_what_contradicts_a_search(tiny_checkpoint, text_path, change, message):
    with pytest.raises(UserError, match=message):
        prune(load_model(tiny_checkpoint()), run_config(text_path, **change))


def test_a_given_plan_is_not_searched_for(tiny_checkpoint, text_path, tmp_path):
    source = tiny_checkpoint()
    config = run_config(text_path)
    plan = Pruner(load_model(source), config).plan()[0]
    for call in (
        lambda: prune(load_model(source), config, plan=plan),
        lambda: prune_checkpoint(str(source), tmp_path / "out", config, plan),
    ):
        with pytest.raises(UserError, match="search.enabled = true has no effect on a given plan"):
            call()
    assert isinstance(plan, Plan) and not (tmp_path / "out").exists()


def test_places_that_cannot_hold_levels(tiny_checkpoint, text_path, tmp_path):
    source, config = tiny_checkpoint(), run_config(text_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    for name, message in (("file", "is a file: give a directory"), ("mine", "holds 'notes.txt', which is no level")):
        with pytest.raises(UserError, match=message):
            prune_checkpoint(str(source), tmp_path / "out", config, work=Work(levels=tmp_path / name))
    assert not (tmp_path / "out").exists()


def test_digests_tell_models_and_calibrations_apart(tiny_model, calibration):
    model, other = tiny_model(), tiny_model(seed=1)
    assert weights_digest(model) == weights_digest(tiny_model()) != weights_digest(other)
    changed = calibration.noisy_ids.clone()
    changed[0, 0, 0] += 1

    assert calibration.digest != replace(calibration, noisy_ids=changed).digest
    assert calibration.digest != replace(calibration, held_out=1).digest


def test_a_dry_run_predicts_the_search(tiny_checkpoint, text_path):
    """The table has its parts; its peak is an uncut copy and a refit, or two pruned models and a check."""
    source = tiny_checkpoint()
    with_search = inspect_checkpoint(source, run_config(text_path))
    keys = ("rounds", "generations", "offspring", "sequences")
    plain = {f"search.{key}": SearchSettings.model_fields[key].default for key in keys} | {"search.enabled": False}
    without = inspect_checkpoint(source, run_config(text_path, **plain))
    assert without["search"] is None and "search" not in without["memory"]
    memory, uncut = with_search["memory"], with_search["search"]["memory"]
    beside = memory["pruned weights"] + max(memory["refit"], memory["held-out check"])
    assert memory["search"] == max(uncut + memory["refit"], beside)
    assert memory["peak host"] >= without["memory"]["peak host"]
    tables = inspect_tables(with_search)
    assert len(tables) == len(inspect_tables(without)) + 1
    assert list(tables[-1].columns[0].cells) == ["levels", "search", "refit"]


def test_the_closing_table_says_which_plan_is_kept(tiny_checkpoint, text_path, monkeypatch):
    monkeypatch.setattr(pruner_run, "held_out_divergences", lambda *args: [0.5, 0.25])
    report = prune(load_model(tiny_checkpoint()), run_config(text_path, **{"search.rounds": 1})).report
    assert "search: divergence 0.5000 → 0.2500 nats/token; kept: the searched plan" in run_table(report).caption


def test_levels_on_the_command_line_need_a_search(tiny_checkpoint, tmp_path, capsys):
    levels = str(tmp_path / "levels")
    command = ["prune", str(tiny_checkpoint()), "--out", str(tmp_path / "out"), "--levels", levels]
    assert main(command) == 2
    message = f"--levels {levels} is for a search: add --set search.enabled=true, or leave it out"
    assert message in capsys.readouterr().err and not (tmp_path / "levels").exists()
