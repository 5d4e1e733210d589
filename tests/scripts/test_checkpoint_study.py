"""The study of a checkpoint: fair variants, a measurement against one by hand, and what it refuses or keeps."""

import json
from dataclasses import replace

import pytest
import torch

from structprune.assets import model_directory, text_file
from structprune.calibration.noise import stratified_noise
from structprune.calibration.windows import cut_windows
from structprune.config import Config
from structprune.errors import UserError
from structprune.evaluation.nelbo import masked_nelbo
from structprune.models.loading import load_model
from structprune.models.tokenizer import load_tokenizer
from structprune.runs.demo import METHODS
from structprune.runs.prune import prune

WINDOWS, LENGTH = 8, 32
HELD_OUT, OTHER = text_file("heldout.txt"), text_file("calibration.txt")


@pytest.fixture
def study(scripts):
    return scripts("checkpoint_study")


@pytest.fixture
def subject(scripts):
    """The embedded model at short windows, two texts."""
    texts = (("held-out", HELD_OUT), ("other", OTHER))
    return scripts("checkpoint_texts").Subject(model_directory(), OTHER, texts, WINDOWS, LENGTH)


@pytest.fixture
def choices(scripts):
    """What the study compares."""
    return scripts("checkpoint_variants")


@pytest.fixture
def few_rows(study, monkeypatch):
    """Calibrations of 60 windows, at which the refit is still a gain."""
    for name, keys in study.ALL.items():
        monkeypatch.setitem(study.ALL, name, keys | {"calibration.windows": 60})


@pytest.fixture
def command(tmp_path):
    """Arguments of the study on the embedded model, and the file that it writes."""
    out = tmp_path / "x.json"
    texts = ["--text", str(OTHER), "--eval", f"held-out={HELD_OUT}", "--eval", f"other={OTHER}"]
    sizes = ["--windows", str(WINDOWS), "--length", str(LENGTH), "--seeds", "1"]
    return ["--checkpoint", str(model_directory()), *texts, *sizes, "--out", str(out)], out


def test_variants_have_passes_of_one_size_and_no_head_goes_but_by_rank(study, choices):
    for name, keys in study.ALL.items():
        config = Config.load(overrides=choices.BASE | keys)
        assert config.calibration.batch * config.calibration.copies == 20 and config.calibration.held_out == 16
        assert config.structured.arm == ("masked+sink" if name == choices.SINKS else "masked"), name
        ranked = name in (*choices.BASELINES, choices.WHOLE, choices.SINKS, choices.SEARCHED) or "joint" in name
        assert (config.structured.split == 0) is not ranked, name


def test_comparisons_differ_by_what_they_name(choices):
    """Of both lists, each compares only variants of its own."""
    whole = [f"reconstruct.{key}" for key in ("producers", "head", "visible", "stream")]
    expected = {
        (choices.STREAMED, choices.WHOLE): {"structured.split", "reconstruct.head", "reconstruct.visible"},
        (choices.SINKS, choices.WHOLE): {"structured.arm"},
        (choices.SEARCHED, choices.WHOLE): set(choices.SEARCH),
        (choices.GREEDY, choices.WHOLE): set(whole),
    }
    rows = {"calibration.windows", "calibration.copies", "calibration.batch"}
    factors = {
        (choices.PLAIN, choices.TODAY): rows,
        (choices.MIXED, choices.PLAIN): {"reconstruct.target"},
        ("160 x 1, layer targets", choices.PLAIN): {"reconstruct.target"},
        ("160 x 1, producers", choices.PLAIN): {"reconstruct.producers"},
        (choices.BOTH, choices.PLAIN): {"reconstruct.producers", "reconstruct.target"},
        (choices.BOTH, "160 x 1, producers"): {"reconstruct.target"},
        (choices.STREAMED, "160 x 1, producers"): {"reconstruct.stream"},
        (f"{choices.BOTH}, joint split", choices.BOTH): {"structured.split"},
    }
    for variants, contrasts, pairs, count in (
        (choices.VARIANTS, choices.CONTRASTS, expected, 13),
        (choices.FACTORS, choices.FACTOR_CONTRASTS, factors, 10),
    ):
        assert len(set(contrasts)) == len(contrasts) == count and pairs.keys() <= set(contrasts)
        assert {name for pair in contrasts for name in pair} == set(variants)
        for (name, base), keys in pairs.items():
            ours, theirs = variants[name], variants[base]
            assert {key for key in ours | theirs if ours.get(key) != theirs.get(key)} == keys, (name, base)


def test_baselines_read_the_same_rows_by_their_published_settings(study, choices):
    rows = {key: value for key, value in choices.FACTORS[choices.PLAIN].items() if key.startswith("calibration.")}
    for name in choices.BASELINES:
        assert rows.items() <= choices.VARIANTS[name].items()
    assert METHODS["FLAP"].items() <= choices.VARIANTS["FLAP"].items()
    for name, score in (("Wanda-sp", "wanda"), ("LLM-Pruner (Taylor)", "taylor")):
        config = Config.load(overrides=choices.BASE | choices.VARIANTS[name])
        structured = config.structured
        assert (structured.score, structured.allocation, structured.split) == (score, "uniform", "equal")
        assert not config.reconstruct.enabled


@pytest.mark.slow
def test_a_measurement_is_that_of_a_run_and_a_comparison_by_hand(study, subject, few_rows):
    """Loss, KL and agreement on one text, computed anew from a run that scores for itself."""
    name = "160 x 1"
    row = study.measure(name, 3, subject, 1)
    sources = {"calibration.source": str(OTHER), "calibration.length": LENGTH, "calibration.seed": 3}
    keys = study.BASE | sources | study.ALL[name] | {"structured.ratio": 0.5}
    dense = load_model(model_directory(), device="cpu")
    pruned = prune(dense, Config.load(overrides=keys))
    text = HELD_OUT.read_text(encoding="utf-8")
    tokens = torch.tensor(load_tokenizer(model_directory())(text, verbose=False)["input_ids"])  # (M,)
    generator = torch.Generator().manual_seed(1003)
    ids = cut_windows(tokens, WINDOWS, LENGTH, generator)  # (N, T)
    noisy, p = stratified_noise(ids, dense.config.mask_token_id, generator)  # (N, 1, T), (N, 1)
    ours, theirs = (masked_nelbo(model, ids, noisy, p) for model in (pruned.model, dense))
    result = row["ratios"]["0.5"]
    measured = result["texts"]["held-out"]
    assert measured["loss"] == pytest.approx((ours.nelbo - theirs.nelbo).tolist(), abs=2e-5)
    masked = (noisy != ids[:, None])[:, 0]  # (N, T)
    with torch.inference_mode():
        log_q, log_p = (model(noisy[:, 0]).logits[masked].log_softmax(-1) for model in (pruned.model, dense))  # (M, V)
    kl = (log_p.exp() * (log_p - log_q)).sum(1).mean().item()
    assert 0.8 * kl < measured["kl"] <= kl  # of the 256 likeliest tokens and all others
    assert measured["agreement"] == pytest.approx((log_q.argmax(1) == log_p.argmax(1)).double().mean().item())
    assert row["dense"]["held-out"]["nelbo"] == pytest.approx(theirs.mean, abs=1e-5)
    assert (result["heads_removed"], result["kept"]) == (0, "refit")
    assert result["ratio_met"] == pruned.report["ratio"] == pytest.approx(0.5, abs=0.01)
    assert result["peak_bytes"] is None or result["peak_bytes"] > 0


@pytest.mark.slow
def test_generated_text_is_compared_with_the_dense_models(study, subject, few_rows):
    """Eight openings of the first text, and as many tokens as a window has left."""
    row = study.measure("Wanda-sp", 3, subject, 1)
    continued = study.continued(subject, 3)
    assert row["generated_nelbo"] == continued.dense_nelbo
    assert continued._theirs.shape == (study.OPENINGS, LENGTH)
    generation = row["ratios"]["0.5"]["generation"]
    assert 0 <= generation["tokens_kept"] < 0.5 and generation["generated_nelbo"] > row["generated_nelbo"] + 1


@pytest.mark.slow
def test_variants_that_score_alike_share_scores_and_texts(study, subject, few_rows, monkeypatch):
    scored = []
    plan = study.Pruner.plan
    monkeypatch.setattr(study.Pruner, "plan", lambda self, ratio: scored.append(ratio) or plan(self, ratio))
    for cache in (study.plans_of, study.held_out_texts):
        cache.cache_clear()
    rows = [study.measure(name, 4, subject, 1) for name in ("160 x 1", "160 x 1, layer targets")]
    assert scored == [0.5, 0.3]
    losses = [row["ratios"]["0.3"]["texts"]["other"]["loss"] for row in rows]
    assert losses[0] != losses[1] and rows[0]["dense"] == rows[1]["dense"]
    assert rows[0]["ratios"]["0.3"]["seconds"]["scores"] == rows[1]["ratios"]["0.3"]["seconds"]["scores"] > 0


@pytest.mark.slow
def test_of_two_equal_splits_the_one_with_fewer_heads_is_taken(study, subject, tiny_checkpoint):
    """Three query heads of either KV head: 0.5 is as near to one of them as to two."""
    tiny = replace(subject, checkpoint=tiny_checkpoint("dream"))
    keys = study.BASE | tiny.keys | {"calibration.seed": 0} | study.VARIANTS["Wanda-sp"]
    plans, *_ = study.plans_of(tiny, study.section_keys(keys, "calibration.", "structured."))
    assert [len(block.query_heads) for block in plans["0.5"].blocks] == [4, 4, 4]


def made_up(study, seeds):
    """Runs of every variant in which one loses more on one text."""
    runs = {}
    for name in study.ALL:
        for seed in seeds:
            texts = {
                text: {"loss": [1.0 + seed, 3.0] if (name, text) == ("FLAP", "b") else [0.0, 1.0],
                       "kl": 0.25, "agreement": 0.5}
                for text in ("a", "b")
            }  # fmt: skip
            costs = {"seconds": {"scores": 1.0, "rest": 2.0 + seed}, "peak_bytes": 5, "ratio_met": 0.5}
            result = {"texts": texts, "heads_removed": 2, "kept": "refit", "searched": None} | costs
            dense = {text: {"nelbo": 4.0 + seed, "accuracy": 0.5} for text in texts}
            row = {"variant": name, "dense": dense, "ratios": dict.fromkeys(study.RATIOS, result)}
            if name in study.GENERATING:
                result["generation"] = {"tokens_kept": 0.25, "generated_nelbo": 3.0 + seed}
                row["generated_nelbo"] = 2.0 + seed
            runs[name, seed] = row
    return runs


def test_the_summary_is_paired_on_every_text(study, choices):
    result = study.STUDY.summarise(made_up(study, (0, 1)), [0, 1])
    gaps = {(row["variant"], row["against"], row["text"], row["ratio"]): row for row in result["contrasts"]}
    assert gaps["FLAP", choices.WHOLE, "b", "0.3"]["by_seed"] == [1.5, 2.0]
    assert {row["mean"] for key, row in gaps.items() if (key[0], key[2]) != ("FLAP", "b")} == {0.0}
    row = next(row for row in result["losses"] if (row["variant"], row["text"]) == ("FLAP", "b"))
    assert row["by_seed"] == [2.0, 2.5] and row["kl"] == [0.25, 0.25] and row["heads_removed"] == [2, 2]
    assert row["seconds"] == [{"scores": 1.0, "rest": 2.0}, {"scores": 1.0, "rest": 3.0}] and row["peak_bytes"] == [
        5,
        5,
    ]
    assert [each["nelbo"] for each in result["dense"]["b"]] == [4.0, 5.0]
    tables = study.tables(result)
    assert [len(table.columns) for table in tables] == [9, 4, 9, 4, 4]
    assert list(tables[2].columns[1]._cells)[6].startswith("+2.2500 [")
    assert {(row["variant"], row["ratio"]) for row in result["generation"]["rows"]} == {
        (name, ratio) for name in study.GENERATING for ratio in study.RATIOS
    }
    assert all(row["generated_nelbo"] == [3.0, 4.0] for row in result["generation"]["rows"])
    assert "own has 2.50 nats" in str(tables[4].title) and list(tables[4].columns[2]._cells)[0] == "25.0 %"


def test_a_single_seed_has_no_interval(study):
    result = study.STUDY.summarise(made_up(study, (0,)), [0])
    assert all(row["low"] is None and not row["shown"] for row in result["losses"] + result["contrasts"])


@pytest.mark.parametrize(
    "change, named",
    [
        ({f"held-out={HELD_OUT}": "held-out"}, "--eval 'held-out' is not a name and a file: write --eval NAME=FILE"),
        ({f"held-out={HELD_OUT}": f"other={HELD_OUT}"}, "--eval names 'other' twice"),
        ({f"other={OTHER}": "other=missing.txt"}, "--eval: no text at 'missing.txt'"),
        ({str(OTHER): "missing.txt"}, "--text: no text at 'missing.txt'"),
        ({str(model_directory()): "nowhere"}, "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(study, command, capsys, change, named):
    arguments, out = command
    assert study.main([change.get(each, each) for each in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("checkpoint_study: error: ") and error.count("\n") == 1 and named in error
    assert not list(out.parent.iterdir())


def test_too_short_a_text_names_both_sizes(study, subject):
    model = study.dense_model(subject.checkpoint)
    with pytest.raises(UserError, match=r"tokens, too few for 100000 windows of 32: .* lower --windows"):
        replace(subject, windows=100_000).cut(HELD_OUT, model, 0)


def test_the_result_names_files_and_no_place(study, command, monkeypatch):
    """What decides the results is told by name and content, so that a copy elsewhere is the same study."""
    arguments, out = command
    given = []

    def run_all(measure, tasks, settings, partial, jobs):
        given.append((tasks, settings))
        return made_up(study, (0,))

    monkeypatch.setattr("scripts.studies.studies.run_all", run_all)
    assert study.main([*arguments, "--name", "small"]) == 0
    text = out.read_text(encoding="utf-8")
    settings = json.loads(text)["settings"]
    assert str(OTHER.parent) not in text and str(out.parent) not in text
    assert settings["checkpoint"]["name"] == "small" and len(settings["checkpoint"]["fingerprint"]) == 16
    assert settings["texts"] == {"held-out": "heldout.txt", "other": "calibration.txt"}
    assert settings["base"]["calibration.source"] == "calibration.txt" and settings["seeds"] == [0]
    assert set(settings["sha256"]) == {"heldout.txt", "calibration.txt"}
    (tasks, decisive), = given  # fmt: skip
    assert [task[:2] for task in tasks] == [(name, 0) for name in study.VARIANTS]
    assert decisive["checkpoint"] == settings["checkpoint"] and decisive["sha256"] == settings["sha256"]


def test_factors_are_a_study_of_their_own(study, choices, command, monkeypatch):
    arguments, out = command
    monkeypatch.setattr("scripts.studies.studies.run_all", lambda *given: made_up(study, (0,)))
    assert study.main([*arguments, "--factors"]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert {row["variant"] for row in result["losses"]} == set(result["variants"]) == set(choices.FACTORS)
    assert "generation" not in result
    given = arguments[: arguments.index("--out")]
    assert study.arguments_of([*given, "--factors"]).out.name == "checkpoint_factors.json"
    assert study.arguments_of(given).out.name == "checkpoint.json"
