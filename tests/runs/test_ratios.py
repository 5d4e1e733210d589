"""Several ratios in one run, and later runs on the levels of an earlier one."""

import shutil

import pytest
import torch

from structprune.cli.main import main
from structprune.config import Config
from structprune.errors import UserError
from structprune.levels import build, losses
from structprune.levels.evolve import Space
from structprune.levels.library import Library, counts_of
from structprune.levels.search import nearest_levels, nearest_plan
from structprune.models.loading import load_model
from structprune.runs.pruner import Pruner
from structprune.structured.plan import Plan

BASE = {
    "calibration.windows": 8, "calibration.held_out": 4, "calibration.length": 24, "calibration.steps": 2,
    "calibration.interval": 1, "calibration.batch": 4, "structured.split": "joint", "structured.round_to": 8,
    "reconstruct.damping": [0.1], "model.device": "cpu",
}  # fmt: skip
SEARCH = {"search.enabled": True, "search.rounds": 1, "search.method": "knapsack", "search.sequences": 8}
A, B = (0, "attention"), (0, "channels")


@pytest.fixture
def config(text_path):
    def make(**keys) -> Config:
        return Config.load(overrides=BASE | SEARCH | {"calibration.source": str(text_path)} | keys)

    return make


@pytest.fixture
def refits(monkeypatch) -> list[tuple[int, int]]:
    """Every block that is refitted at several levels, and how many."""
    calls, original = [], build.kind_levels

    def counted(place, steps, *rest):
        calls.append((place.dense.index, len(steps)))
        return original(place, steps, *rest)

    monkeypatch.setattr(build, "kind_levels", counted)
    return calls


def test_ratios_share_the_levels_of_the_first_round(tiny_checkpoint, config, refits, tmp_path):
    """Each block is refitted once for all of them; every ratio starts at its own ranked plan and is met."""
    pruner = Pruner(load_model(tiny_checkpoint()), config(), levels=tmp_path / "levels")
    plans = {ratio: pruner._choose(search_request(pruner, ratio)).counts for ratio in (0.3, 0.5)}
    results = list(pruner.prune_each([0.5, 0.3]))
    assert sorted({index for index, _ in refits}) == [0, 1, 2] and len(refits) == 6
    library = Library(tmp_path / "levels" / "first", {}, {}, {})
    assert library.plan == plans[0.5]  # of two plans the middle one is the narrower
    for ratio, pruned in zip((0.3, 0.5), results):
        assert all(plans[ratio][key] in levels for key, levels in library.grids.items())
        assert abs(pruned.report["ratio"] - ratio) < 0.04
        assert pruned.report["config"]["structured"]["ratio"] == ratio
        assert counts_of(pruned.report["search"]["rounds"][0]["plan"]).keys() == plans[ratio].keys()
    names = sorted(path.name for path in (tmp_path / "levels").iterdir())
    assert names == ["first", "ratio-0.3", "ratio-0.5"]


def search_request(pruner, ratio):
    from structprune.runs.resolve import at_ratio

    return at_ratio(pruner.request, ratio)


def test_a_later_ratio_or_budget_refits_no_level(tiny_checkpoint, config, refits, tmp_path):
    source, levels = tiny_checkpoint("dream"), tmp_path / "levels"
    Pruner(load_model(source), config(**{"structured.ratio": 0.5}), levels=levels).prune()
    made = len(refits)
    assert made == 6
    later = Pruner(load_model(source), config(**{"structured.ratio": 0.4}), levels=levels).prune()
    assert 0.36 <= later.report["ratio"] <= 0.44
    macs = config(**{"structured.ratio": 0.5, "search.budget": "macs"})
    Pruner(load_model(source), macs, levels=levels).prune()
    assert len(refits) == made
    assert sorted(path.name for path in levels.iterdir()) == ["first", "ratio-0.4", "ratio-0.5", "ratio-0.5-macs"]


def test_a_plan_stitched_from_levels_of_another_is_measured_with_its_own_head(tiny_checkpoint, config, tmp_path):
    """The library's LM head is refitted for the plan that is stitched, not for the one it was made around."""
    heads, original = [], build.refit_head

    def watch(walk, run, small):
        original(walk, run, small)
        heads.append(small.output_head.weight.clone())

    build.refit_head = watch
    try:
        pruner = Pruner(load_model(tiny_checkpoint()), config(**{"reconstruct.head": True}), levels=tmp_path / "levels")
        list(pruner.prune_each([0.3, 0.5]))
    finally:
        build.refit_head = original
    # 0.3 is stitched beside the library's own plan, which is that of 0.5
    assert len(heads) == 3 and not torch.equal(heads[0], heads[1]) and torch.equal(heads[0], heads[2])


def test_a_second_plan_has_the_head_of_a_model_of_its_own(tiny_checkpoint, config, tmp_path):
    """It is refitted from the dense head, not from the one of the plan before."""
    model = load_model(tiny_checkpoint())
    settings = config(**{"reconstruct.head": True, "reconstruct.producers": False, "reconstruct.stream": 0})
    pruner = Pruner(model, settings, levels=tmp_path)
    pruner.prune(0.5)
    library = Library(tmp_path / "first", {}, {}, {})
    context = pruner._search_context(pruner.request)
    recipe = build.Recipe(pruner.request.settings, pruner.request.reconstruct)
    counts = {key: levels[0] for key, levels in library.grids.items()}
    twice, once = context.uncut(), context.uncut()
    build.build_library(context.reconstructor.walk, twice, library, recipe)
    first = twice.output_head.weight.clone()
    build.build_library(context.reconstructor.walk, twice, library, recipe, counts)
    build.build_library(context.reconstructor.walk, once, library, recipe, counts)
    assert torch.equal(twice.output_head.weight, once.output_head.weight)
    assert not torch.equal(first, model.output_head.weight)


def test_losses_do_not_outlive_their_levels(tiny_checkpoint, config, tmp_path):
    """Levels of another refit were made anew, as their own refusal advises: the losses of the old ones are refused."""
    model = load_model(tiny_checkpoint())
    Pruner(model, config(**{"structured.ratio": 0.4}), levels=tmp_path).prune()
    other = config(**{"structured.ratio": 0.4, "reconstruct.damping": [1.0]})
    with pytest.raises(UserError, match="were made with another reconstruct.damping"):
        Pruner(model, other, levels=tmp_path)
    shutil.rmtree(tmp_path / "first")
    with pytest.raises(UserError, match="search.json' were measured with another reconstruct.damping"):
        Pruner(model, other, levels=tmp_path)


def test_levels_of_every_ratio_are_checked_first(tiny_checkpoint, config, refits, tmp_path):
    model = load_model(tiny_checkpoint())
    Pruner(model, config(**{"structured.ratio": 0.5}), levels=tmp_path).prune()
    made = len(refits)
    pruner = Pruner(model, config(**{"structured.ratio": 0.3, "search.sequences": 6}), levels=tmp_path)
    with pytest.raises(UserError, match="ratio-0.5/round-1/search.json' were measured with another search.sequences"):
        next(pruner.prune_each([0.3, 0.5]))
    assert len(refits) == made


def test_a_ratio_of_nothing_takes_no_part(tiny_checkpoint, config, tmp_path):
    pruner = Pruner(load_model(tiny_checkpoint()), config(), levels=tmp_path)
    whole, half = pruner.prune_each([0.5, 0.0])
    assert whole.report["search"] is None and half.report["search"] is not None
    library = Library(tmp_path / "first", {}, {}, {})
    alone = Pruner(load_model(tiny_checkpoint()), config(), levels=tmp_path / "ratio-alone")
    alone.prune(0.5)
    assert library.grids == Library(tmp_path / "ratio-alone" / "first", {}, {}, {}).grids


def test_levels_and_outputs_lie_apart(tiny_checkpoint, text_path, tmp_path, capsys):
    sets = ["--set", "search.enabled=true", "--set", "calibration.length=24", "--calibration", str(text_path)]
    out = tmp_path / "both"
    command = ["prune", str(tiny_checkpoint()), "--out", str(out), *sets]
    for levels in (out, out / "ratio-0.5" / "levels"):
        assert main([*command, "--levels", str(levels), "--ratio", "0.3,0.5"]) == 2
        assert "lie in each other: give them places of their own" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--levels", str(out / "levels")]) == 2
    assert "lie in each other" in capsys.readouterr().err
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert main([*command, "--ratio", "0.3,0.5"]) == 2
    assert f"'{out}' is a checkpoint, which cannot hold others" in capsys.readouterr().err
    assert main([*command, "--plan", "plan.json", "--levels", "levels"]) == 2
    assert "--plan already says what is removed: leave out --levels levels" in capsys.readouterr().err


def test_levels_nearest_to_those_asked_for():
    grids = {A: (0, 1, 4), B: (0, 16, 24, 48)}
    assert nearest_levels(grids, {A: (0, 2, 3), B: (20, 40)}) == {A: (0, 1, 4), B: (16, 48)}


def test_the_plan_of_levels_that_is_nearest(tmp_path):
    """Differences in price count squared, and the budget is kept."""

    def price(key, steps):
        return (5 - steps) * 10.0 if key == A else 48.0 - steps

    grids = {A: (0, 2, 4), B: (0, 16, 40)}
    prices = {key: {steps: price(key, steps) for steps in levels} for key, levels in grids.items()}
    counts = {A: 2, B: 24}  # costs 30 + 24
    assert nearest_plan(Space(grids, prices, 62.0), price, counts, tmp_path) == {A: 2, B: 16}
    assert nearest_plan(Space(grids, prices, 54.0), price, counts, tmp_path) == {A: 2, B: 40}
    assert nearest_plan(Space(grids, prices, 100.0), price, {A: 4, B: 40}, tmp_path) == {A: 4, B: 40}
    with pytest.raises(UserError, match="are all too wide for this ratio: give another directory"):
        nearest_plan(Space(grids, prices, 17.0), price, counts, tmp_path)


def test_losses_of_other_settings_are_refused(tiny_checkpoint, config, tmp_path):
    """Before anything is scored; levels do not depend on those settings."""
    model = load_model(tiny_checkpoint())
    Pruner(model, config(**{"structured.ratio": 0.4}), levels=tmp_path).prune()
    other = config(**{"structured.ratio": 0.4, "search.sequences": 6})
    with pytest.raises(
        UserError, match="were measured with another search.sequences: delete the file, or give another"
    ):
        Pruner(model, other, levels=tmp_path)
    Pruner(model, config(**{"structured.ratio": 0.5, "search.sequences": 6}), levels=tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"losses": {}, "generations": []}', '{"identity": 3}'])
def test_broken_losses_are_named(tmp_path, content):
    (tmp_path / "search.json").write_text(content)
    with pytest.raises(UserError, match=r"search.json cannot be read \(.*\): delete it to search anew"):
        losses.LossFile(tmp_path / "search.json", {})


def test_several_ratios_on_the_command_line(tiny_checkpoint, text_path, tmp_path, capsys):
    """A directory each, in rising order, whatever the order they were given in."""
    source, out = str(tiny_checkpoint()), tmp_path / "out"
    sets = [f"--set={key}={value}" for key, value in BASE.items()]
    command = ["prune", source, "--out", str(out), "--calibration", str(text_path), *sets]
    assert main([*command, "--ratio", "0.5,0.3"]) == 0
    printed = capsys.readouterr().out
    places = [out / "ratio-0.3", out / "ratio-0.5"]
    assert sorted(out.iterdir()) == places
    first, second = (printed.index(f"Wrote {place} ") for place in places)
    assert first < second
    plans = [Plan.load(place / "plan.json") for place in places]
    assert main([*command[:3], str(tmp_path / "alone"), *command[4:], "--ratio", "0.3"]) == 0
    assert Plan.load(tmp_path / "alone" / "plan.json") == plans[0] != plans[1]
    assert main([*command, "--ratio", "0.3,0.4"]) == 2  # the first is there already, so that nothing is computed
    assert "ratio-0.3" in capsys.readouterr().err and not (out / "ratio-0.4").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["prune", "--ratio", "0.3,half"], "'half' is no number: give 0.5, or several as 0.3,0.5"),
        (["prune", "--ratio", "0.3,"], "'' is no number: give 0.5"),
        (["prune", "--ratio", "0.3,0.30"], "--ratio 0.3,0.30 has a ratio twice: give each once"),
        (["prune", "--ratio", "0.3,1.5"], "ratio 1.5 lies outside [0, 1)"),
        (["prune", "--ratio", "0.3,0.5", "--method", "unstructured"], "with --method unstructured give one at a time"),
        (["inspect", "--ratio", "0.3,0.5"], "--ratio 0.3,0.5 has several ratios: give one at a time"),
    ],
)
def test_ratios_that_are_refused(tiny_checkpoint, text_path, tmp_path, capsys, options, message):
    out = [] if options[0] == "inspect" else ["--out", str(tmp_path / "out"), "--calibration", str(text_path)]
    sets = ["--set=calibration.length=24"] if options[0] == "prune" else []
    assert main([options[0], str(tiny_checkpoint()), *out, *options[1:], *sets]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
