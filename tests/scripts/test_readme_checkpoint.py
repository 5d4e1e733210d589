"""The tables of the study of a checkpoint, from small results: what is averaged, bold, or not known."""

import pytest

MACHINE = {"processor": "P", "cores": 1, "torch": "2.13"}
VARIANTS = {"160 x 1": {}, "Wanda-sp": {"reconstruct.enabled": False}}


def results(seeds=2):
    """Two variants on two texts at two ratios."""
    spread = {"low": None, "high": None} if seeds == 1 else {"low": 0.25, "high": 0.75}
    count = slice(0, seeds)
    losses, contrasts = [], []
    for text in ("docs", "wiki"):
        for ratio in ("0.3", "0.5"):
            for name in VARIANTS:
                losses.append({
                    "variant": name, "text": text, "ratio": ratio, "mean": 0.5, **spread, "shown": seeds > 1,
                    "kl": [0.25, 0.5][count], "agreement": [0.75, 0.5][count], "heads_removed": [0, 30][count],
                    "seconds": [{"scores": 100.0, "rest": 20.0}, {"scores": 100.0, "rest": 60.0}][count],
                    "peak_bytes": [2e9, 2.5e9][count], "kept": ["refit", "plain removal"][count],
                })  # fmt: skip
            gap = {"variant": "Wanda-sp", "against": "160 x 1", "text": text, "ratio": ratio, "mean": 0.5, **spread}
            contrasts.append(gap | {"shown": seeds > 1 and (text, ratio) == ("wiki", "0.5")})
    settings = {
        "seeds": [0, 1][count], "windows": 64, "length": 128, "base": {"calibration.source": "train.txt"},
        "checkpoint": {"name": "small-dlm", "fingerprint": "0" * 16},
        "texts": {"docs": "valid.txt", "wiki": "test.txt"},
    }  # fmt: skip
    dense = [{"nelbo": 4.5, "accuracy": 0.25}, {"nelbo": 5.0, "accuracy": 0.5}][count]
    return {
        "settings": settings, "machine": MACHINE, "variants": VARIANTS, "losses": losses, "contrasts": contrasts,
        "dense": {"docs": dense, "wiki": dense}, "first": "0.5",
    }  # fmt: skip


@pytest.fixture
def checkpoint(scripts):
    return scripts("readme_checkpoint").checkpoint


def test_every_text_has_losses_and_fidelity_and_costs_are_told_once(checkpoint):
    text = checkpoint(results())
    assert text.count("| 160 x 1 | +0.500 ± 0.250 | 0.375 | 62.5% | +0.500 ± 0.250 | 0.375 | 62.5% |") == 2
    assert "`wiki`, where the dense model has 4.75 nats and 37.5% of masked tokens right:" in text
    assert text.count("| Wanda-sp | 0 / 30 | 0 / 30 | 140 s | 2.5 GB |") == 1
    assert "--name small-dlm --text train.txt --eval docs=valid.txt --eval wiki=test.txt --seeds 2 --factors`" in text
    assert "beside other work (P, 1 core, torch 2.13)" in text and "2 seeds" in text and "64 held-out windows" in text


def test_generation_has_a_table_where_it_was_measured(checkpoint):
    rows = [
        {"variant": "Wanda-sp", "ratio": ratio, "tokens_kept": [0.25, 0.5], "generated_nelbo": [2.0, 3.0 + extra]}
        for ratio, extra in (("0.3", 0.0), ("0.5", 1.0))
    ]
    generation = {"rows": rows, "dense": [1.5, 2.0], "openings": 8, "tokens": 32}
    text = checkpoint(results() | {"generation": generation})
    assert "| variant | tokens kept at 0.3 | NELBO of generated at 0.3 | tokens kept at 0.5 |" in text
    assert "| Wanda-sp | 37.5% | 2.50 | 37.5% | 3.00 |" in text and "whose own has 1.75 nats per token" in text
    assert "of 32 after each of 8 openings" in text and "(scripts/results/checkpoint.json)" in text
    without = checkpoint(results())
    assert "NELBO of generated" not in without and "--seeds 2 --factors`" in without
    assert "(scripts/results/checkpoint_factors.json)" in without


def test_differences_have_a_column_for_every_text_and_ratio(checkpoint):
    text = checkpoint(results())
    assert "| first - second | docs, 0.3 | docs, 0.5 | wiki, 0.3 | wiki, 0.5 |" in text
    line = "| Wanda-sp - 160 x 1 | +0.5000 ± 0.2500 | +0.5000 ± 0.2500 | +0.5000 ± 0.2500 | **+0.5000 ± 0.2500** |"
    assert line in text


def test_a_refit_that_was_undone_is_told_but_not_of_methods_without_one(checkpoint):
    text = checkpoint(results())
    assert "undone, as no gain on held-out text: 160 x 1 at 0.3 (1 of 2 seeds), 160 x 1 at 0.5 (1 of 2 seeds)." in text
    assert "undone" not in checkpoint(results(seeds=1))


def test_one_seed_is_told_plainly(checkpoint):
    text = checkpoint(results(seeds=1))
    assert "of one seed, so without an interval" in text and "no difference below is shown" in text
    assert "±" not in text.partition("Paired differences.")[2] and "| Wanda-sp - 160 x 1 | +0.5000 | +0.5000 |" in text
    assert "With one seed" not in checkpoint(results())


def test_a_peak_that_is_not_known_is_left_open(checkpoint):
    result = results()
    for row in result["losses"]:
        row["peak_bytes"] = [None, None]
    assert "| 160 x 1 | 0 / 30 | 0 / 30 | 140 s | ? |" in checkpoint(result)


def test_a_search_from_kept_heads_stands_beside_the_row_that_keeps_them(scripts):
    pages = scripts("readme_checkpoint")
    row = {"ratio": "0.3", "text": "a", "kl": [0.2, 0.2], "agreement": [0.5, 0.7], "heads_removed": [0, 0]}
    before = row | {"variant": pages.BEFORE, "mean": 0.3, "low": 0.2, "high": 0.4, "by_seed": [0.2, 0.4]}
    searched = row | {"variant": "search", "mean": 0.2, "low": 0.1, "high": 0.3, "by_seed": [0.11, 0.29]}
    searched |= {"heads_removed": [3, 5]}
    other = before | {"ratio": "0.5"}
    text = pages.kept_heads({"dense": {"a": []}, "losses": [searched]}, {"losses": [before, other]})
    assert "| search | +0.200 ± 0.100 | 0.200 | 60.0% | 3 / 5 |" in text
    assert "| 160 x 1, producers, stream | +0.300 ± 0.100 | 0.200 | 60.0% | 0 / 0 |" in text
    assert "| search - 160 x 1, producers, stream | -0.1000 ± 0.1271 |" in text
