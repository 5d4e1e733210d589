"""The tables of trainings, made of small results."""

import pytest

MACHINE = {"processor": "CPU", "cores": 2, "torch": "2.13.0"}
SETTINGS = {"seeds": [0, 1], "windows": 8, "tokens": 1000, "text": "notes.txt", "texts": {"a": "a.txt"}}
SPREAD = {"mean": 0.25, "low": 0.2, "high": 0.3, "shown": True, "by_seed": [0.2, 0.3]}


@pytest.fixture
def pages(scripts):
    return scripts("readme_trainings")


@pytest.fixture
def results():
    """Two variants at two ratios, as the studies of the embedded model write them."""
    row = SPREAD | {"tokens_kept": [0.2, 0.4], "generated_nelbo": [3.0, 4.0], "seconds": [60.0, 80.0]}
    row |= {"removed": [0.3, 0.5]}
    losses = [row | {"variant": name, "ratio": ratio} for name in ("one", "two") for ratio in ("0.5", "0.7")]
    contrasts = [SPREAD | {"variant": "two", "against": "one", "ratio": ratio} for ratio in ("0.5", "0.7")]
    dense = [{"nelbo": 4.0, "generated_nelbo": 2.0}] * 2
    return {
        "settings": SETTINGS, "machine": MACHINE, "losses": losses, "contrasts": contrasts, "dense": dense,
    }  # fmt: skip


def test_a_variant_has_loss_generation_and_time_at_every_ratio(pages, results):
    text = pages.trainings(results)
    assert "| one | +0.250 ± 0.050 | 30.0% | 3.50 | 70 | +0.250 ± 0.050 | 30.0% | 3.50 | 70 |" in text
    assert "`python -m scripts.studies.recovery_study --text notes.txt`" in text and "1,000 tokens in all" in text
    assert "| two - one | **+0.2500 ± 0.0500** | **+0.2500 ± 0.0500** |" in text and "whose own text has 2.00" in text


def test_the_whole_way_says_what_was_trained_on(pages, results):
    text = pages.recipe(results)
    assert "| two | +0.250 ± 0.050 | 30.0% | 3.50 | 70 | +0.250" in text and "Trained: on 1,000 tokens" in text
    assert "`python -m scripts.studies.recipe_study --text notes.txt`, from [`recipe.json`]" in text


def test_a_schedule_also_says_what_is_gone(pages, results):
    text = pages.gradual(results)
    assert "| two | +0.250 ± 0.050 | 30.0% | 3.50 | 70 | 40.0% | +0.250" in text


def test_a_checkpoint_has_a_table_per_text(pages, results):
    row = SPREAD | {"kl": [0.1, 0.3], "agreement": [0.5, 0.7], "text": "a", "ratio": "0.5"}
    trained = "1,000 tokens"
    results["losses"] = [
        row | {"variant": "not trained", "seconds": [{}, {}]},
        row | {"variant": trained, "seconds": [{"training": 600.0}, {"training": 1200.0}]},
    ]
    results["contrasts"] = [SPREAD | {"variant": trained, "against": "not trained", "text": "a", "ratio": "0.5"}]
    results["dense"] = {"a": [{"nelbo": 4.0, "accuracy": 0.2}] * 2}
    results["variants"] = {"not trained": {}, trained: {"blocks.tokens": 400, "train.tokens": 600}}
    results["settings"] = SETTINGS | {"checkpoint": {"name": "mine"}, "base": {"calibration.source": "notes.txt"}}
    results["settings"]["train"] = {"train.precision": "bfloat16"}
    made = {"ratio": "0.5", "tokens_kept": [0.2, 0.4], "generated_nelbo": [3.0, 4.0]}
    rows = [made | {"variant": name} for name in ("not trained", trained)]
    results["generation"] = {"rows": rows, "dense": [2.0, 2.0], "openings": 8, "tokens": 32}
    text = pages.checkpoint_trainings(results, "longer")
    assert "[`longer.json`](scripts/results/longer.json)" in text
    assert "| 1,000 tokens | +0.250 ± 0.050 | 0.200 | 60.0% |" in text
    assert "--name mine --text notes.txt --eval a=a.txt --tokens 1000" in text
    assert " --tokens 1000 --ratio 0.5 --precision bfloat16 --out scripts/results/longer.json --seeds 2`" in text
    assert "1,000 tokens at 0.5 15 min." in text and "| 1,000 tokens | 30.0% | 3.50 |" in text
    assert "| 1,000 tokens - not trained | **+0.2500 ± 0.0500** |" in text


def test_kills_and_plans(pages):
    row = {"moment": 5.0, "killed": True, "kept": "step 8", "again": 7.0, "lost": 2.0}
    row |= {"same_bytes": True, "same_figures": False}
    masks = {"undisturbed": 10.0, "rows": [row, row], "machine": MACHINE}
    text = pages.kills({"commands": {"masks": masks}})
    assert "| masks | 10 s | 2 | step 8 to step 8 | 2 s | 2 of 2 | 0 of 2 |" in text and "; masks: " not in text
    text = pages.kills({"commands": {"search": masks, "masks": masks | {"machine": MACHINE | {"processor": "other"}}}})
    assert "(search: " in text and "; masks: other, " in text
    memory = dict.fromkeys(pages.PARTS, 2e9) | {"peak": 9e9}
    cost = {"operations": {"student": 3e17}, "seconds": {"student": 7200.0}}
    shapes = {"8B": {"config": "x.yaml", "memory": memory, "tokens": 5e6, "cost": cost}}
    text = pages.plans({"ratio": 0.5, "rate": 1e14, "shapes": shapes})
    assert "| 8B, `x.yaml` | 2.0 | 2.0 | 2.0 | 2.0 | 9.0 | 5 M | 3.0e+17 | 2.0 |" in text
