"""Sink policies and trajectories in whole runs of both pruning paths: each does what it says, and none is ignored."""

from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from structprune import Config, UserError, load_model, prune
from structprune.cli.main import main
from structprune.models.adapter import Adapter
from structprune.report.tables import mask_table, run_table
from structprune.runs.inspect import inspect_checkpoint, inspect_masking
from structprune.statistics.capture import consumers

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TEXT = {"calibration.windows": 3, "calibration.held_out": 2, "calibration.length": 16, "calibration.interval": 17}
STRUCTURED = TEXT | {"structured.ratio": 0.4, "structured.split": 3}
MASKS = TEXT | {"method": "unstructured"}
NM = TEXT | {"method": "nm"}
ONE_SHOT = {"masking.order": "one-shot", "reconstruct.enabled": False}
SOFT = {"sink.alpha": 0.5, "sink.kappa": 0.3}  # so that many rows of a tiny model lose some weight
PATHS = {  # base, the key of the score's arm, and what the score is
    "structured wanda": (STRUCTURED, "structured.arm", {"structured.score": "wanda"}),
    "structured fluctuation": (STRUCTURED, "structured.arm", {"structured.score": "fluctuation"}),
    "structured obs": (STRUCTURED, "structured.arm", {"structured.score": "obs", "structured.rounds": 4}),
    "structured taylor": (STRUCTURED, "structured.arm", {"structured.score": "taylor"}),
    "wanda": (MASKS, "masking.arm", {"masking.score": "wanda"}),
    "wanda, one-shot": (MASKS, "masking.arm", {"masking.score": "wanda"} | ONE_SHOT),
    "ria, summed": (NM, "masking.arm", {"masking.score": "ria", "masking.norms": "summed"} | ONE_SHOT),
    "sparsegpt": (NM, "masking.arm", {"masking.score": "sparsegpt"}),
    "sparsegpt, one-shot": (MASKS, "masking.arm", {"masking.score": "sparsegpt", "masking.order": "one-shot"}),
    "wanda, owl": (MASKS, "masking.arm", {"masking.score": "wanda", "masking.allocation": "owl"}),
}
BOTH = ("structured wanda", "structured obs", "wanda, one-shot", "sparsegpt")


@pytest.fixture(scope="module", params=["llada", "dream"])
def model(request, shared_checkpoint):
    return load_model(shared_checkpoint(request.param))


@pytest.fixture
def run(model, text_path):
    """`run(path, arm, **changes)` -> what was made, by a path of `PATHS`."""

    def make(path: str, arm: str | None, **changes):
        base, key, score = PATHS[path]
        values = {"calibration.source": str(text_path)} | base | score | ({key: arm} if arm else {}) | changes
        return prune(model, Config.load(overrides=values))

    return make


def same(one, other) -> bool:
    """Whether two made models are equal bit for bit."""
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    return all(value.shape == theirs[name].shape and torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("arm", ["masked", "clean"])
def test_none_is_the_arm_without_sinks_bit_for_bit(run, path, arm):
    if (path, arm) == ("structured taylor", "clean"):
        pytest.skip("taylor has no clean arm")
    none, without = run(path, f"{arm}+sink", **{"sink.policy": "none"}), run(path, arm)
    assert same(none, without)
    assert none.report["sinks"] is None and without.report["sinks"] is None


@pytest.mark.parametrize("path", BOTH)
def test_none_of_a_refit_is_a_refit_without_sinks(run, path):
    if "one-shot" in path:
        path = "wanda"
    none = run(path, "masked", **{"sink.policy": "none", "reconstruct.arm": "masked+sink"})
    assert same(none, run(path, "masked"))


@pytest.mark.parametrize("path", PATHS)
def test_policies_differ(run, path):
    made = {policy: run(path, "masked+sink", **SOFT, **{"sink.policy": policy}) for policy in ("all", "unstable")}
    assert not same(made["all"], made["unstable"])
    assert not same(made["unstable"], run(path, "masked"))
    for policy, pruned in made.items():
        sinks = pruned.report["sinks"]
        assert sinks["policy"] == policy and sinks["windows"] == 3
        assert 0 < sinks["taken"]["unstable"]["share"] < sinks["taken"]["all"]["share"] < 1
        assert len(sinks["taken"]["all"]["by_level"]) == len(sinks["mask_share"]) == 2
    reports = [pruned.report["sinks"]["taken"] for pruned in made.values()]
    assert reports[0]["all"]["share"] == pytest.approx(reports[1]["all"]["share"], rel=1e-4)  # of the same mass


@pytest.mark.parametrize("path", ["structured obs", "sparsegpt"])
def test_a_refit_alone_takes_the_policy(run, path):
    made = [
        run(
            path,
            "masked",
            **SOFT,
            **{"reconstruct.arm": "masked+sink", "sink.policy": policy, "calibration.windows": 12},
        )
        for policy in ("all", "unstable")
    ]
    assert made[0].report["refit"] != made[1].report["refit"] and made[1].report["sinks"]["windows"] == 12


def test_the_measured_split_reports_all_windows(run):
    changes = {"structured.split": "measured", "structured.split_candidates": 2, "structured.split_windows": 1}
    made = run("structured wanda", "masked", **SOFT, **changes, **{"reconstruct.arm": "masked+sink"})
    assert made.report["sinks"]["windows"] == 3


@pytest.mark.parametrize("path", ["structured wanda", "wanda, one-shot"])
def test_the_threshold_may_be_scale_free(run, path):
    made = [run(path, "masked+sink", **SOFT, **{"sink.scale_free": value}) for value in (False, True)]
    assert made[0].report["sinks"]["taken"]["all"]["share"] != made[1].report["sinks"]["taken"]["all"]["share"]


@pytest.mark.parametrize("path", ["wanda, one-shot", "wanda", "sparsegpt", "structured wanda"])
def test_the_batch_does_not_matter(run, path):
    changes = SOFT | {"sink.policy": "unstable"}
    taken = [run(path, "masked+sink", **changes, **{"calibration.batch": size}).report["sinks"] for size in (1, 3)]
    assert taken[0]["taken"]["unstable"]["share"] == pytest.approx(taken[1]["taken"]["unstable"]["share"], rel=1e-4)


@pytest.mark.parametrize("path", BOTH)
def test_a_reverse_run_is_replayed(run, path, tmp_path):
    changes = SOFT | {"sink.policy": "unstable"}
    reverse = run(path, "masked+sink", **changes, **{"sink.trajectory": "reverse"})
    assert reverse.report["calibration"]["trajectory"] == "reverse"
    assert not same(reverse, run(path, "masked+sink", **changes))
    saved = reverse.save(tmp_path / "made") / "calibration.safetensors"
    card = (saved.parent / "README.md").read_text(encoding="utf-8")
    assert "masked+sink (unstable)" in card and "those to fit on continued by the model itself after 4" in card
    text = dict.fromkeys(("calibration.windows", "calibration.held_out", "calibration.length", "calibration.interval"))
    base, key, score = PATHS[path]
    values = {name: value for name, value in (base | score | changes).items() if name not in text}
    for more in ({}, {"sink.trajectory": "reverse"}):
        config = Config.load(overrides=values | more | {key: "masked+sink", "calibration.source": str(saved)})
        again = prune(load_model(reverse.model.source.directory), config)
        assert same(again, reverse) and again.report["sinks"] == reverse.report["sinks"]


@pytest.mark.parametrize("path", ["structured obs", "structured taylor", "wanda, one-shot", "sparsegpt"])
@pytest.mark.parametrize("policy", ["all", "unstable"])
def test_a_run_on_few_copies_is_replayed(run, path, policy, tmp_path):
    """1 of 2 levels for a window, or 2 of 3 where the policy compares them, and a replay judges by all of them."""
    copies = {"calibration.copies": 1} if policy == "all" else {"calibration.copies": 2, "calibration.interval": 16}
    changes = SOFT | {"sink.policy": policy}
    few, every = run(path, "masked+sink", **changes, **copies), run(path, "masked+sink", **changes)
    count = copies["calibration.copies"]
    assert few.calibration.noisy_ids.shape == (5, count, 16) and few.calibration.check_samples == count + 1
    assert len(few.report["sinks"]["taken"]["all"]["by_level"]) == count and not same(few, every)
    saved = few.save(tmp_path / "made") / "calibration.safetensors"
    base, key, score = PATHS[path]
    values = {name: value for name, value in (base | score | changes).items() if name not in TEXT}
    config = Config.load(overrides=values | {key: "masked+sink", "calibration.source": str(saved)})
    again = prune(load_model(few.model.source.directory), config)
    assert same(again, few) and again.report["sinks"] == few.report["sinks"]
    assert again.report["held_out_nelbo"] == few.report["held_out_nelbo"]


@pytest.mark.parametrize("path", ["structured obs", "sparsegpt"])
def test_a_reverse_run_without_sinks(run, path):
    """The trajectory decides what noisy copies are, so an arm without sinks takes it as well."""
    reverse = run(path, "masked", **{"sink.trajectory": "reverse"})
    assert not same(reverse, run(path, "masked"))
    assert same(reverse, run(path, "masked+sink", **{"sink.trajectory": "reverse", "sink.policy": "none"}))


def test_a_reverse_run_without_held_out_windows(run):
    made = run("wanda, one-shot", "masked+sink", **{"sink.trajectory": "reverse", "calibration.held_out": 0})
    assert made.calibration.windows == 3 and made.report["held_out_nelbo"] is None


def printed(table) -> str:
    console = Console(width=200, file=StringIO())
    console.print(table)
    return " ".join(console.file.getvalue().split())  # a caption is as wide as its table


def test_the_closing_tables_tell_what_went(run):
    for path, table in (("structured wanda", run_table), ("wanda, one-shot", mask_table)):
        for changes, expected in (
            ({"sink.policy": "unstable", "sink.trajectory": "reverse"}, "sinks (unstable, reverse): "),
            ({}, "sinks (all): "),
        ):
            report = run(path, "masked+sink", **SOFT, **changes).report
            shown = printed(table(report))
            share = report["sinks"]["taken"][report["sinks"]["policy"]]["share"]
            assert f"{expected}{100 * share:.2f} % of row weight removed" in shown
            assert ("(policy all:" in shown) == ("unstable" in expected)
        assert "sinks" not in printed(table(run(path, "masked").report))


SETS = {
    "one level": (["sink.policy=unstable", "calibration.interval=50"], "calibration.interval = 50 leaves 1"),
    "one copy": (["sink.policy=unstable", "calibration.copies=1"], "calibration.copies = 1 leaves 1: raise it"),
    "more copies than levels": (["calibration.copies=11"], "copies = 11 exceeds the number of noise levels, 10: lower"),
    "copies of a saved set": (
        ["calibration.copies=1", "calibration.source=x.safetensors"], "copies = 1 has no effect without text",
    ),
    "short": (["sink.trajectory=reverse", "calibration.length=8"], "calibration.length = 8 leaves 6 tokens"),
    "none beside a threshold": (["sink.policy=none", "sink.kappa=1"], "sink.kappa = 1.0 has no effect without sink"),
    "unknown": (["sink.policy=stable"], "config key sink.policy = 'stable'"),
}  # fmt: skip
ARMS = {"structured": "structured.arm", "unstructured": "masking.arm", "nm": "masking.arm"}


@pytest.mark.parametrize("method", ARMS)
@pytest.mark.parametrize("case", SETS)
def test_refused_in_seconds(case, method, tiny_checkpoint, capsys):
    sets, message = SETS[case]
    given = [f"--set={text}" for text in (f"{ARMS[method]}=masked+sink", "calibration.length=64", *sets)]
    assert main(["inspect", str(tiny_checkpoint()), "--method", method, *given]) == 2
    assert message in capsys.readouterr().err


IDLE = {
    "sink.policy = none has no effect without an arm with .sink": ("masked", {"sink.policy": "none"}),
    "sink.policy = unstable has no effect without an arm with .sink": ("clean", {"sink.policy": "unstable"}),
    "sink.trajectory = reverse has no effect without an arm that is masked": (
        "clean",
        {"sink.trajectory": "reverse", "reconstruct.arm": "clean"},
    ),
}


@pytest.mark.parametrize("path", ["structured wanda", "sparsegpt"])
@pytest.mark.parametrize("message", IDLE)
def test_what_would_be_ignored_is_refused(run, path, message):
    arm, changes = IDLE[message]
    with pytest.raises(UserError, match=message):
        run(path, arm, **changes)


def test_a_replay_of_another_trajectory_is_refused_before_weights(tiny_checkpoint, run, tmp_path, monkeypatch, capsys):
    made = run("wanda, one-shot", "masked+sink", **{"sink.trajectory": "reverse"})
    saved = tmp_path / "saved.safetensors"
    made.calibration.save(saved)
    monkeypatch.setattr("structprune.models.loading._read_shard", lambda path: pytest.fail("weights were read"))
    given = ["--out", str(tmp_path / "out"), "--calibration", str(saved), "--set", "sink.trajectory=forward"]
    assert main(["prune", str(tiny_checkpoint()), *given]) == 2
    assert "sink.trajectory = forward has no effect" in capsys.readouterr().err


def test_predicted_memory_knows_the_policy(tiny_checkpoint):
    """What holds a batch's inputs until its weights are known is there where they are known late only."""
    source = tiny_checkpoint()
    sizes = {}
    for policy in ("all", "unstable", "none"):
        changes = {"structured.score": "wanda", "structured.arm": "masked+sink", "sink.policy": policy}
        memory = inspect_checkpoint(source, Config.load(overrides=TEXT | changes))["memory"]
        sizes["structured", policy] = memory["scoring (wanda)"]
        changes = {"masking.score": "sink-wanda", "sink.policy": policy} | ONE_SHOT
        memory = inspect_masking(source, Config.load(overrides=MASKS | changes))["memory"]
        sizes["masks", policy] = memory["statistics (sink-wanda)"]
    assert sizes["structured", "all"] == sizes["structured", "unstable"] > sizes["structured", "none"]
    held = 2 * 16 * 4 * sum(module.in_features for module in consumers(Adapter(load_model(source)).blocks).values())
    assert sizes["structured", "all"] - sizes["structured", "none"] == held  # of a window's 2 levels
    # a batch of sequences need not hold all levels of a window: there the mass is measured first
    assert sizes["masks", "all"] > sizes["masks", "unstable"] == sizes["masks", "none"] == 0


@pytest.mark.parametrize("file", sorted((ROOT / "configs/sinks").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_shipped_config_runs(file, model, text_path):
    small = {"structured.split_candidates": 2, "structured.split_windows": 2, "structured.rounds": 8}
    shipped = Config.load(file)
    config = Config.load(file, TEXT | small | {"calibration.source": str(text_path)})
    made = prune(model, config)
    assert made.report["sinks"]["policy"] == shipped.sink.policy == "unstable"
    assert made.report["calibration"].get("trajectory", "forward") == shipped.sink.trajectory
