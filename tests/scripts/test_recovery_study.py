"""The study of training back: variants that can be run, a measurement of a moment, and a paired summary."""

import pytest

from scripts.studies.trainings import Corpus
from structprune.assets import text_file
from structprune.recovery.settings import RecoverConfig


@pytest.fixture
def study(scripts):
    return scripts("recovery_study")


def test_variants_change_one_choice_of_the_training(study):
    for name, keys in study.VARIANTS.items():
        config = RecoverConfig.load(overrides=study.TRAIN | study.stages(keys, 1000))  # of the keys of every training
        assert config.blocks.tokens + config.train.tokens == 1000
        assert config.train.batch % config.train.pass_windows == 0, name
    sections = {name: {key.partition(".")[0] for key in keys} for name, keys in study.VARIANTS.items()}
    assert sections.pop("LoRA of rank 32") == {"train"} and sections.pop("from scratch") == {"loss", "train"}
    assert sections.pop("block-wise first") == {"blocks"} == sections.pop(study.LONG)
    first = RecoverConfig.load(overrides=study.stages(study.VARIANTS["block-wise first"], 1000))
    assert (first.blocks.tokens, first.train.tokens) == (400, 600)
    assert all(parts <= {"loss"} for parts in sections.values()) and not study.VARIANTS[study.OURS]
    assert (study.OURS, study.UNTRAINED) in study.CONTRASTS and len(set(study.CONTRASTS)) == 9
    assert (study.LONG, study.BLOCKS) in study.CONTRASTS and (study.LONG, study.OURS) not in study.CONTRASTS


@pytest.mark.slow
def test_a_measurement_trains_the_pruned_model_of_its_seed(study, monkeypatch):
    small = {"calibration.windows": 20, "calibration.held_out": 10, "calibration.length": 32}
    monkeypatch.setattr(study, "STREAMED", study.STREAMED | small)
    monkeypatch.setattr(study, "RATIOS", ["0.5"])
    monkeypatch.setattr(study, "TRAIN", study.TRAIN | {"data.length": 32, "data.held_out": 4, "train.evaluations": 1})
    names, original, tokens = (study.UNTRAINED, study.OURS, study.SCRATCH, study.LONG), study.recover, []
    monkeypatch.setattr(study, "recover", lambda *given: tokens.append(original(*given)) or tokens[-1])
    corpus = Corpus(text_file("calibration.txt"), 8 * 32 * 5)
    before, after, scratch, long = (study.measure(name, 5, 4, 32, corpus, 1)["ratios"]["0.5"] for name in names)
    assert before["seconds"] == 0 < after["seconds"] and len(before["loss"]) == len(after["loss"]) == 4
    assert before["loss"] != after["loss"] and after["generated_nelbo"] > 0
    assert min(scratch["loss"]) > max(before["loss"]) + 0.3 and long["loss"] != after["loss"]
    assert [done.report["tokens"] for done in tokens] == [1280, 1280, 11520]


def test_the_summary_is_paired(study):
    runs = {}
    for name in study.VARIANTS:
        for seed in (0, 1):
            loss = [1.0 + seed, 3.0] if name == study.UNTRAINED else [0.0, 1.0]
            row = {"loss": loss, "tokens_kept": 0.25, "generated_nelbo": 3.0, "seconds": 60.0}
            runs[name, seed] = {"dense": {"nelbo": 4.0}, "ratios": dict.fromkeys(study.RATIOS, row)}
    result = study.summarise(runs, [0, 1])
    gaps = {(row["variant"], row["ratio"]): row["by_seed"] for row in result["contrasts"]}
    assert gaps.pop((study.OURS, "0.5")) == gaps.pop((study.OURS, "0.7")) == [-1.5, -2.0]
    assert set(map(tuple, gaps.values())) == {(0.0, 0.0)} and len(gaps) == 16
    first, _ = study.tables(result)
    assert list(first.columns[2]._cells)[0] == "25.0 %" and len(first.columns[0]._cells) == len(study.VARIANTS)


def test_no_tokens_are_refused(study, tmp_path, capsys):
    assert study.main(["--tokens", "0", "--out", str(tmp_path / "x.json")]) == 2
    assert "--tokens = 0: give at least 1" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_text_that_is_no_file_is_refused(study, tmp_path, capsys):
    assert study.main(["--text", str(tmp_path / "no.txt"), "--out", str(tmp_path / "x.json")]) == 2
    assert "no.txt' is no file" in capsys.readouterr().err and not list(tmp_path.iterdir())
