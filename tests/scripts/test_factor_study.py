"""The study of calibration and refit: every variant can be run, and a comparison changes one factor."""

import pytest

from structprune.assets import model_directory
from structprune.config import Config
from structprune.runs.inspect import inspect_checkpoint


@pytest.fixture
def study(scripts):
    return scripts("factor_study")


HEADS = {"0.3": 2, "0.5": 14, "0.7": 22}


def test_every_variant_can_be_run_with_its_number_of_heads(study):
    for keys in study.VARIANTS.values():
        for ratio, heads in HEADS.items():
            split = {"structured.ratio": float(ratio), "structured.split": heads}
            config = Config.load(overrides=study.STUDY.base | split | keys)
            assert inspect_checkpoint(model_directory(), config)["ratio"] == float(ratio)
            calibration = config.calibration
            assert calibration.held_out * calibration.copies == 40 and calibration.batch * calibration.copies == 20


def test_every_comparison_changes_one_factor(study):
    sizes = {f"calibration.{name}" for name in ("windows", "copies", "held_out", "batch")}
    assert len(set(study.CONTRASTS)) == len(study.CONTRASTS) == 9
    for name, base in study.CONTRASTS:
        ours, theirs = study.VARIANTS[name], study.VARIANTS[base]
        apart = {key for key in ours | theirs if ours.get(key) != theirs.get(key)}
        joint = (name, base) == ("160 x 1, producers, mixed targets", "160 x 1")
        assert apart <= sizes or len(apart) == 1 + joint, (name, base)
        assert apart


def test_the_summary_is_paired(study):
    runs = {}
    for name in study.VARIANTS:
        for seed in (0, 1):
            loss = [1.0 + seed, 3.0] if name == "480 x 1, producers" else [0.0, 1.0]
            ratios = {ratio: {"loss": loss, "seconds": 2.0 + seed, "kept": "refit"} for ratio in HEADS}
            runs[name, seed] = {"dense_nelbo": 4.0, "ratios": ratios}
    result = study.STUDY.summarise(runs, [0, 1])
    gap = next(row for row in result["contrasts"] if row["variant"] == "480 x 1, producers" and row["ratio"] == "0.5")
    assert gap["against"] == "480 x 1" and gap["by_seed"] == [1.5, 2.0] and gap["mean"] == 1.75
    others = [row["mean"] for row in result["contrasts"] if row["variant"] != "480 x 1, producers"]
    assert others == [0.0] * 24
    row = next(row for row in result["losses"] if row["variant"] == "480 x 1, producers")
    assert row["by_seed"] == [2.0, 2.5] and row["seconds"] == [2.0, 3.0] and result["heads"] == HEADS
    losses, gaps = study.STUDY.tables(result)
    assert len(losses.columns) == len(gaps.columns) == 4
    assert len(losses.columns[0]._cells) == len(gaps.columns[0]._cells) == 9
