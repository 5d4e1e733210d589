"""The study of row weights: every variant can be run, and changes one choice of the whole refit."""

import pytest

from structprune.assets import model_directory
from structprune.config import Config
from structprune.runs.inspect import inspect_checkpoint


@pytest.fixture
def study(scripts):
    return scripts("weighting_study")


def test_every_variant_can_be_run_and_changes_one_choice(study):
    both = "by gradient, visible 1"
    for name, keys in study.VARIANTS.items():
        for ratio, heads in (("0.5", 14), ("0.7", 22)):
            split = {"structured.ratio": float(ratio), "structured.split": heads}
            config = Config.load(overrides=study.STUDY.base | split | keys)
            assert inspect_checkpoint(model_directory(), config)["ratio"] == float(ratio)
        whole = study.VARIANTS[study.WHOLE]
        apart = {key for key in keys | whole if keys.get(key) != whole.get(key)}
        assert len(apart) == {study.WHOLE: 0, both: 2}.get(name, 1), name


def test_every_weighting_is_tried_and_compared(study):
    tried = {keys.get("reconstruct.weighting", "uniform") for keys in study.VARIANTS.values()}
    assert tried == {"uniform", "noise", "certainty", "gradient"}
    runs = {}
    for name in study.VARIANTS:
        for seed in (0, 1):
            loss = [1.0 + seed, 3.0] if name == "by certainty" else [0.0, 1.0]
            row = {"loss": loss, "seconds": 2.0, "search_seconds": 0.0, "refit": "refit", "kept": None, "heads": 14}
            runs[name, seed] = {"dense_nelbo": 4.0, "ratios": dict.fromkeys(("0.5", "0.7"), row)}
    result = study.STUDY.summarise(runs, [0, 1])
    gaps = {(row["variant"], row["ratio"]): row["by_seed"] for row in result["contrasts"]}
    assert gaps.pop(("by certainty", "0.5")) == gaps.pop(("by certainty", "0.7")) == [1.5, 2.0]
    assert len(gaps) == 16 and set(map(tuple, gaps.values())) == {(0.0, 0.0)}
