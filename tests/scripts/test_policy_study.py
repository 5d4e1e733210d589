"""The study of sink policies: every variant can be run, comparisons are of two that were, and the summary is right."""

import pytest

from structprune.assets import model_directory
from structprune.config import Config
from structprune.runs.inspect import inspect_checkpoint, inspect_masking


@pytest.fixture
def study(scripts):
    return scripts("policy_study")


def test_every_variant_can_be_run(study):
    for name, keys in study.variants().items():
        config = Config.load(overrides=study.CALIBRATION | keys)
        look = inspect_checkpoint if config.method == "structured" else inspect_masking
        assert look(model_directory(), config)["ratio"] == 0.5, name


def test_policies_and_trajectories_are_crossed(study):
    names = study.variants()
    assert len(names) == 16  # the refit of a run without sinks is the same either way
    for way in ("structured", "sparsegpt"):
        assert all(f"{way}, {run}, {policy}" in names for run in study.TRAJECTORIES for policy in study.POLICIES)
    assert names["structured, refit too, reverse, all"]["reconstruct.arm"] == "masked+sink"


def test_every_comparison_is_of_two_variants_that_differ_in_one_thing(study):
    names = study.variants()
    pairs = [(name, base) for _, name, base in study.contrasts()]
    assert len(set(pairs)) == len(pairs) == 26
    for name, base in pairs:
        ours, theirs = names[name], names[base]
        apart = {key for key in ours | theirs if ours.get(key) != theirs.get(key)} - {"reconstruct.arm"}
        assert apart in ({"sink.policy"}, {"sink.trajectory"}), (name, base)


def test_the_summary_is_paired_and_tells_what_went(study):
    sinks = {
        "policy": "unstable", "sinks": 0.1, "survival": 0.5, "mask_share": [0.2, 0.9],
        "taken": {"all": {"share": 0.3}, "unstable": {"share": 0.2, "by_level": [0.1, 0.3], "of_mask": 0.4}},
    }  # fmt: skip
    done = {}
    for name in study.variants():
        for seed in (0, 1):
            seen = None if name.endswith("none") else sinks
            loss = [1.0 + seed, 3.0] if name == "sparsegpt, forward, unstable" else [0.0, 1.0]
            done[name, seed] = {"dense_nelbo": 4.0, "ratios": {"0.5": {"loss": loss, "sinks": seen}}}
    result = study.summarise(done, [0, 1])
    gap = next(row for row in result["contrasts"] if row["against"] == "sparsegpt, forward, none")
    assert gap["variant"] == "sparsegpt, forward, all" and gap["mean"] == 0
    gap = next(row for row in result["contrasts"] if row["variant"] == "sparsegpt, forward, unstable")
    assert gap["by_seed"] == [1.5, 2.0] and gap["mean"] == 1.75
    rows = {row["variant"]: row for row in result["losses"]}
    assert rows["sparsegpt, forward, none"]["taken"] is None
    assert rows["structured, reverse, unstable"]["taken"] == [0.2, 0.2] and result["dense"] == [4.0, 4.0]
    cells = dict(zip(study.loss_table(result).columns[0].cells, study.loss_table(result).columns[2].cells))
    assert cells["structured, reverse, unstable"] == "20.00 %" and cells["sparsegpt, forward, none"] == ""
    assert len(study.contrast_table(result).columns[3]._cells) == 26
