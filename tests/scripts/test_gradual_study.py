"""The study of gradual schedules: equal tokens, a measurement of a moment, and a paired summary."""

from pathlib import Path

import pytest

from scripts.studies.trainings import Corpus
from structprune.assets import text_file


@pytest.fixture
def study(scripts):
    return scripts("gradual_study")


def test_both_variants_end_at_the_ratio_with_the_same_tokens(study):
    for ratio in study.RATIOS:
        once, gradual = (
            study.schedule_of(name, ratio, 3, Corpus(Path("notes.txt"), 5000)) for name in (study.ONCE, study.GRADUAL)
        )
        assert once.ratios == (float(ratio),) and gradual.ratios[-1] == float(ratio) and gradual.ratios[0] == 0.3
        assert (once.gradual, gradual.gradual) == (False, True)
        assert (
            once.recovery == gradual.recovery and once.config == gradual.config and once.recovery.train.tokens == 5000
        )
        once.completed(), gradual.completed()


@pytest.mark.slow
def test_a_measurement_goes_through_the_schedule(study, monkeypatch):
    small = {"calibration.windows": 8, "calibration.held_out": 4, "calibration.length": 32}
    monkeypatch.setattr(study, "STREAMED", study.STREAMED | small)
    monkeypatch.setattr(study, "RATIOS", ["0.5"])
    monkeypatch.setattr(study, "TRAIN", study.TRAIN | {"data.length": 32, "data.held_out": 4, "train.evaluations": 1})
    once, gradual = (
        study.measure(name, 5, 4, 32, Corpus(text_file("calibration.txt"), 16 * 32 * 4), 1)["ratios"]["0.5"]
        for name in (study.ONCE, study.GRADUAL)
    )
    assert once["tokens"] == gradual["tokens"] == 16 * 32 * 4
    assert abs(once["removed"] - 0.5) < 0.02 and abs(gradual["removed"] - 0.5) < 0.02
    assert len(once["loss"]) == len(gradual["loss"]) == 4 and once["loss"] != gradual["loss"]
    assert once["seconds"] > 0 and gradual["generated_nelbo"] > 0


def test_the_summary_is_paired(study):
    runs = {}
    for name in study.VARIANTS:
        for seed in (0, 1):
            loss = [1.0 + seed, 3.0] if name == study.ONCE else [0.0, 1.0]
            row = {
                "loss": loss, "tokens_kept": 0.25, "generated_nelbo": 3.0, "seconds": 60.0, "removed": 0.49,
                "tokens": 2000,
            }  # fmt: skip
            runs[name, seed] = {"dense": {"nelbo": 4.0}, "ratios": dict.fromkeys(study.RATIOS, row)}
    result = study.summarise(runs, [0, 1])
    gaps = {(row["variant"], row["against"], row["ratio"]): row["by_seed"] for row in result["contrasts"]}
    assert gaps == {(study.GRADUAL, study.ONCE, ratio): [-1.5, -2.0] for ratio in study.RATIOS}
    (table,) = study.tables(result)
    assert list(table.columns[3]._cells) == ["49.0 %"] * 4 + [""] * 2 and len(table.columns[0]._cells) == 6


def test_no_tokens_are_refused(study, tmp_path, capsys):
    assert study.main(["--tokens", "0", "--out", str(tmp_path / "x.json")]) == 2
    assert "--tokens = 0: give at least 1" in capsys.readouterr().err and not list(tmp_path.iterdir())
