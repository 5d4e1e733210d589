"""The study of the refit's parts and of the search: every variant can be run, and the summary is paired."""

import pytest

from structprune.assets import model_directory
from structprune.config import Config
from structprune.runs.inspect import inspect_checkpoint


@pytest.fixture
def study(scripts):
    return scripts("search_study")


def test_every_variant_can_be_run(study):
    for name, keys in study.VARIANTS.items():
        for ratio in study.RATIOS:
            split = {"structured.ratio": float(ratio), "structured.split": study.HEADS[ratio]}
            config = Config.load(overrides=study.STUDY.base | split | keys)
            assert inspect_checkpoint(model_directory(), config)["ratio"] == float(ratio)
            assert config.search.enabled == ("knapsack" in name)


def test_comparisons_change_what_they_name(study):
    assert len(set(study.CONTRASTS)) == len(study.CONTRASTS) == 11
    windows = {"calibration.windows", "calibration.held_out", "search.sequences"}
    search = {f"search.{key}" for key in ("enabled", "sequences", "method")}
    refit = {f"reconstruct.{key}" for key in ("producers", "head", "visible", "stream")}
    streamed, today = "whole refit, stream", "today's recipe"
    expected = {
        ("producers", today): {"reconstruct.producers"},
        ("producers, head", "producers"): {"reconstruct.head"},
        ("whole refit", "producers, head"): {"reconstruct.visible"},
        (streamed, "whole refit"): {"reconstruct.stream"},
        (streamed, today): refit,
        (study.SEARCHED, streamed): search,
        (study.SEARCHED, today): refit | search,
        (study.LONG, study.SEARCHED): windows,
        (study.LONG, today): refit | search | windows,
        (f"{study.SEARCHED} of parts", study.SEARCHED): {"search.whole"},
        (f"{study.SEARCHED} and evolution", study.SEARCHED): {"search.method"},
    }
    assert list(expected) == study.CONTRASTS
    for (name, base), keys in expected.items():
        ours, theirs = study.VARIANTS[name], study.VARIANTS[base]
        assert {key for key in ours | theirs if ours.get(key) != theirs.get(key)} == keys, (name, base)


def test_the_summary_is_paired(study):
    runs = {}
    for name in study.VARIANTS:
        for seed in (0, 1):
            loss = [1.0 + seed, 3.0] if name == "whole refit" else [0.0, 1.0]
            row = {"loss": loss, "seconds": 2.0 + seed, "search_seconds": 1.0, "kept": None, "heads": 14}
            runs[name, seed] = {"dense_nelbo": 4.0, "ratios": dict.fromkeys(study.RATIOS, row)}
    result = study.STUDY.summarise(runs, [0, 1])
    gap = next(
        row for row in result["contrasts"] if (row["variant"], row["against"]) == ("whole refit", "producers, head")
    )
    assert gap["by_seed"] == [1.5, 2.0] and gap["mean"] == 1.75
    row = next(row for row in result["losses"] if row["variant"] == "whole refit")
    assert row["by_seed"] == [2.0, 2.5] and row["seconds"] == [2.0, 3.0] and row["heads"] == [14, 14]
    losses, gaps = study.STUDY.tables(result)
    assert len(losses.columns) == len(gaps.columns) == 3
    assert len(losses.columns[0]._cells) == len(study.VARIANTS) and len(gaps.columns[0]._cells) == len(study.CONTRASTS)
