"""The study of the whole way: its prunings and trainings, a measurement of a moment, and a paired summary."""

import pytest

from scripts.studies import recovery_study
from scripts.studies.trainings import Corpus
from structprune.assets import text_file
from structprune.config import Config
from structprune.recovery.settings import RecoverConfig


@pytest.fixture
def study(scripts):
    return scripts("recipe_study")


def test_trained_variants_differ_from_the_others_by_their_training_alone(study):
    for name, ratios in study.VARIANTS.items():
        for ratio, variant in ratios.items():
            config = Config.load(overrides=study.BASE | study.STREAMED | variant["pruning"])
            assert config.search.enabled == name.startswith(study.SEARCHED)
            plain = study.VARIANTS[name.removesuffix(", trained")][ratio]
            assert variant["pruning"] == plain["pruning"] and plain["training"] is None
            if name.endswith(", trained"):
                keys = recovery_study.stages(variant["training"], study.TOKENS)
                trained = RecoverConfig.load(overrides=study.TRAIN | keys)
                assert trained.blocks.tokens + trained.train.tokens == study.TOKENS
                assert trained.train.learning_rate == {"0.5": 5e-4, "0.7": 1e-3}[ratio]
    assert all(name in study.VARIANTS for pair in study.CONTRASTS for name in pair)


@pytest.mark.slow
def test_a_measurement_prunes_and_trains_as_the_variant_says(study, monkeypatch):
    small = {"calibration.windows": 20, "calibration.held_out": 10, "calibration.length": 32}
    monkeypatch.setattr(recovery_study, "STREAMED", recovery_study.STREAMED | small)
    short = {"data.length": 32, "data.held_out": 4, "train.evaluations": 1}
    monkeypatch.setattr(recovery_study, "TRAIN", study.TRAIN | short)
    monkeypatch.setattr(study, "RATIOS", ["0.5"])
    other = small | {"reconstruct.visible": 1.0}  # a search of this size finds nothing
    monkeypatch.setitem(study.VARIANTS[study.SEARCHED]["0.5"], "pruning", other)
    corpus = Corpus(text_file("calibration.txt"), 8 * 32 * 5)
    names = (study.RANKED, study.SEARCHED, f"{study.RANKED}, trained")
    rows = [study.measure(name, 5, 4, 32, corpus, 1) for name in names]
    ranked, searched, trained = (row["ratios"]["0.5"] for row in rows)
    assert ranked["seconds"] == searched["seconds"] == 0 < trained["seconds"]
    assert ranked["loss"] != searched["loss"] and ranked["loss"] != trained["loss"] and len(trained["loss"]) == 4
    assert rows[0]["dense"] == rows[2]["dense"] and trained["generated_nelbo"] > 0


def test_the_summary_is_paired(study):
    runs = {}
    for place, name in enumerate(study.VARIANTS):
        for seed in (0, 1):
            row = {"loss": [seed - place, 2.0], "tokens_kept": 0.25, "generated_nelbo": 3.0, "seconds": 60.0}
            runs[name, seed] = {"dense": {"nelbo": 4.0}, "ratios": dict.fromkeys(study.RATIOS, row)}
    result = study.summarise(runs, [0, 1])
    gaps = {(row["variant"], row["against"]): row["by_seed"] for row in result["contrasts"]}
    assert gaps[study.SEARCHED, study.RANKED] == [-0.5, -0.5] and len(gaps) == 4
    assert gaps[f"{study.SEARCHED}, trained", f"{study.RANKED}, trained"] == [0.5, 0.5]
    assert result["dense"] == [{"nelbo": 4.0}] * 2 and len(study.tables(result)) == 2


def test_no_tokens_are_refused(study, tmp_path, capsys):
    assert study.main(["--tokens", "0", "--out", str(tmp_path / "x.json")]) == 2
    assert "--tokens = 0: give at least 1" in capsys.readouterr().err and not list(tmp_path.iterdir())
