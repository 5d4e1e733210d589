"""The study of training a checkpoint back: its trainings, a measurement of a moment, and what it refuses."""

import json

import pytest

from structprune.assets import model_directory, text_file
from structprune.recovery.settings import RecoverConfig

HELD_OUT, OTHER = text_file("heldout.txt"), text_file("calibration.txt")


@pytest.fixture
def study(scripts):
    return scripts("checkpoint_recovery")


@pytest.fixture
def command(tmp_path):
    """Arguments of the study on the embedded model, and the file that it writes."""
    out = tmp_path / "x.json"
    texts = ["--text", str(OTHER), "--eval", f"held-out={HELD_OUT}", "--eval", f"other={OTHER}"]
    sizes = ["--windows", "8", "--length", "32", "--seeds", "1", "--tokens", "2560"]
    return ["--checkpoint", str(model_directory()), *texts, *sizes, "--out", str(out)], out


def test_both_stages_of_a_training_learn_its_tokens(study, tmp_path):
    variants = study.variants_of([1000, 4000])
    assert list(variants) == ["not trained", "1,000 tokens", "4,000 tokens"] and not variants["not trained"]
    config = RecoverConfig.load(overrides=study.TRAIN | variants["4,000 tokens"])
    assert (config.blocks.tokens, config.train.tokens) == (1600, 2400)
    assert config.train.batch % config.train.pass_windows == 0
    pairs = [("1,000 tokens", "not trained"), ("4,000 tokens", "not trained"), ("4,000 tokens", "1,000 tokens")]
    made = study.study_of(study.Trainings(variants, ["0.5"], study.TRAIN, tmp_path))
    assert made.summarise.args[1] == pairs and made.ratios == ["0.5"]


@pytest.mark.slow
def test_a_run_prunes_trains_and_compares(study, command, monkeypatch, tmp_path):
    few = {"calibration.windows": 20, "calibration.held_out": 10}
    monkeypatch.setattr(study, "VARIANTS", {name: keys | few for name, keys in study.VARIANTS.items()})
    arguments, out = command
    options = study.arguments_of([*arguments, "--ratio", "0.5"])
    subject = study.subject_of(options)
    trainings = study.Trainings(study.variants_of(options.tokens), options.ratio, study.TRAIN, tmp_path)
    rows = {name: study.measure(trainings, name, 0, subject, 1)["ratios"] for name in trainings.variants}
    assert all(list(ratios) == ["0.5"] for ratios in rows.values())
    before, after = (ratios["0.5"] for ratios in rows.values())
    assert before["texts"]["held-out"]["loss"] != after["texts"]["held-out"]["loss"]
    assert before["heads_removed"] == after["heads_removed"] > 0 and not before["seconds"]
    assert after["seconds"]["training"] > 0 and 0 <= after["generation"]["tokens_kept"] <= 1
    monkeypatch.setattr(study, "recover", None)  # what is there is not made again
    assert study.measure(trainings, "2,560 tokens", 0, subject, 1)["ratios"]["0.5"] == after


@pytest.mark.parametrize("ratios", [["0.3", "0.5"], ["0.5"]])
def test_the_summary_is_paired_and_has_what_both_generate(study, tmp_path, ratios):
    runs: dict = {}
    for name, loss in (("not trained", [1.0, 3.0]), ("1,000 tokens", [0.5, 1.0])):
        for seed in (0, 1):
            row = {
                "texts": {"a": {"loss": loss, "kl": 0.5, "agreement": 0.5}}, "seconds": {}, "heads_removed": 3,
                "generation": {"tokens_kept": 0.25, "generated_nelbo": 3.0},
            }  # fmt: skip
            dense = {"a": {"nelbo": 4.0, "accuracy": 0.2}}
            runs[name, seed] = {
                "variant": name, "seed": seed, "dense": dense, "ratios": dict.fromkeys(ratios, row),
                "generated_nelbo": 2.0,
            }  # fmt: skip
    made = study.study_of(study.Trainings(study.variants_of([1000]), ratios, study.TRAIN, tmp_path))
    result = json.loads(json.dumps(made.summarise(runs, [0, 1])))
    gaps = {row["ratio"]: row["by_seed"] for row in result["contrasts"]}
    assert gaps == dict.fromkeys(ratios, [-1.25, -1.25])
    assert len(result["generation"]["rows"]) == 2 * len(ratios) and len(made.tables(result)) == 3


def test_models_are_known_by_what_decides_them(study, command):
    arguments, _ = command
    subject = study.subject_of(study.arguments_of(arguments))
    settings = study.facts(subject, None, study.BASE) | {"train": study.TRAIN}
    digest = study.models_digest(settings, OTHER.name)
    named = settings | {"checkpoint": settings["checkpoint"] | {"name": "mine"}, "texts": {}}
    assert study.models_digest(named, OTHER.name) == digest
    trained = settings | {"train": study.TRAIN | {"train.batch": 4}}
    assert study.models_digest(trained, OTHER.name) != digest != study.models_digest(settings, HELD_OUT.name)


def test_precision_and_ratios_are_options(study, command):
    arguments, _ = command
    options = study.arguments_of([*arguments, "--precision", "bfloat16", "--ratio", "0.3", "--ratio", "0.3"])
    assert (options.precision, options.ratio) == ("bfloat16", ["0.3"])
    config = RecoverConfig.load(overrides=study.TRAIN | study.PRECISIONS[options.precision])
    assert config.train.precision == config.teacher.dtype == "bfloat16"
    assert study.arguments_of(arguments).ratio == ["0.5", "0.3"]


def test_several_jobs_are_refused(study, command, capsys):
    assert study.main([*command[0], "--jobs", "2"]) == 2
    assert "--jobs = 2: trainings of one seed share its pruned models" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-3"])
def test_no_tokens_are_refused(study, command, capsys, count):
    arguments, out = command
    assert study.main([*arguments, "--tokens", count]) == 2
    assert f"--tokens = {count}: give at least 1" in capsys.readouterr().err and not out.exists()
