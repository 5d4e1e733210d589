"""Tables of small results: what is bold, what a single seed prints; pages filled between markers; tables of keys."""

import copy
import json
import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from structprune.config import Config, Section
from structprune.evaluation.settings import EvaluationConfig

SCRIPTS = Path(__file__).parents[2] / "scripts"
MACHINE = {"processor": "P", "cores": 2, "torch": "2.13"}
SPREAD = {"median": 2.0, "low": 1.5, "high": 2.5}


def row(mean, half, shown, **keys):
    ends = {"low": None, "high": None} if half is None else {"low": mean - half, "high": mean + half}
    return {**keys, "mean": mean, **ends, "shown": shown}


def mask_results(seeds=3):
    """Two methods with a refit and one change of it, some rows shown; `seeds` of 1 has no intervals."""
    half = None if seeds == 1 else 0.25
    losses = [
        row(0.5, half, seeds > 1, variant=name, ratio="0.5")
        for name in ("sparsegpt, clean", "sparsegpt, masked", "sparsegpt, masked, refit", "sparsegpt, masked, owl")
    ]
    losses.append(row(0.75, half, seeds > 1, variant="sparsegpt, clean", ratio="2:4"))
    pairs = [("masked calibration", "sparsegpt, masked", "sparsegpt, clean", -0.5, True)]
    pairs += [("refit", "sparsegpt, masked, refit", "sparsegpt, masked", 0.5, False)]
    pairs += [("one change", "sparsegpt, masked, owl", "sparsegpt, masked", 0.125, False)]
    contrasts = [
        row(mean, half, shown and seeds > 1, question=question, variant=name, against=base, ratio="0.5")
        for question, name, base, mean, shown in pairs
    ]
    settings = {"seeds": list(range(seeds)), "windows": 192, "length": 128}
    return {"settings": settings, "losses": losses, "contrasts": contrasts, "dense": [4.0, 4.5]}


def test_masks_are_bold_where_shown_not_where_an_interval_excludes_0(scripts):
    """The refit's interval excludes 0, but it is not shown: its seeds disagree."""
    text = scripts("readme_studies").masks(mask_results())
    assert "| sparsegpt, clean | +0.500 ± 0.250 | +0.750 ± 0.250 |" in text
    assert "| **sparsegpt, masked, refit** (the default) | +0.500 ± 0.250 | - |" in text
    assert "| sparsegpt, masked - sparsegpt, clean | **-0.5000 ± 0.2500** | - |" in text
    assert "| sparsegpt, masked, refit - sparsegpt, masked | +0.5000 ± 0.2500 | - |" in text
    assert "\n| sparsegpt, masked, owl | " not in text and "| sparsegpt, masked, owl - sparsegpt, masked | " in text
    assert "against dense (4.25)" in text and "t interval over the means of the seeds" in text and "3 seeds" in text


def test_a_single_seed_prints_means_alone(scripts):
    text = scripts("readme_studies").masks(mask_results(seeds=1))
    assert "| sparsegpt, masked - sparsegpt, clean | -0.5000 | - |" in text
    assert "±" not in text and "one seed, so without an interval" in text


def test_factors_print_every_ratio_and_bold_differences_that_are_shown(scripts):
    runs = [("32 x 5", "0.3", 0.25), ("32 x 5", "0.5", 0.5), ("160 x 1", "0.3", 0.125), ("160 x 1", "0.5", 0.25)]
    losses = [
        row(mean, 0.125, True, variant=name, ratio=ratio, seconds=[2.0, 4.0], kept=["refit"] * 2)
        for name, ratio, mean in runs
    ]
    gaps = [
        row(mean, 0.0625, shown, variant="160 x 1", against="32 x 5", ratio=ratio)
        for ratio, mean, shown in (("0.3", -0.125, False), ("0.5", -0.25, True))
    ]
    settings = {"seeds": [0, 1], "windows": 192, "length": 128}
    result = {"settings": settings, "machine": MACHINE, "heads": {"0.3": 2, "0.5": 14}}
    text = scripts("readme_studies").factors(result | {"losses": losses, "contrasts": gaps})
    assert "| 160 x 1 | +0.125 ± 0.125 | +0.250 ± 0.125 | 3 s |" in text
    assert "| 160 x 1 - 32 x 5 | -0.1250 ± 0.0625 | **-0.2500 ± 0.0625** |" in text
    assert "2 of 40 at 0.3, 14 of 40 at 0.5" in text


def test_row_weights_print_their_losses_and_what_they_change(scripts):
    names = ("whole refit", "by certainty")
    losses = [
        row(0.25, 0.125, True, variant=name, ratio=ratio, seconds=[2.0, 4.0])
        for name in names
        for ratio in ("0.5", "0.7")
    ]
    gaps = [row(0.5, 0.0625, True, variant=names[1], against=names[0], ratio=ratio) for ratio in ("0.5", "0.7")]
    settings = {"seeds": [0, 1, 2], "windows": 192, "length": 128}
    result = {"settings": settings, "machine": MACHINE, "heads": {"0.5": 14, "0.7": 22}}
    text = scripts("readme_studies").weightings(result | {"losses": losses, "contrasts": gaps})
    assert "| by certainty | +0.250 ± 0.125 | +0.250 ± 0.125 |" in text
    assert "| by certainty - whole refit | **+0.5000 ± 0.0625** | **+0.5000 ± 0.0625** |" in text
    assert "mean over 3 seeds" in text and "14 of 40 at 0.5, 22 of 40 at 0.7" in text


def speed_results(published=True):
    settings = {"blocks": 8, "width": 512, "length": 512, "windows": 8, "levels": 10, "dtype": "float32"}
    rows = [
        {"method": name, "seconds": {"ours": SPREAD}, "peak_bytes": {"ours": SPREAD | {"median": 63e6}}}
        for name in ("sink-wanda", "sparsegpt")
    ]
    rows[0]["over_forwards"] = {"median": 1.25, "low": 1.0, "high": 1.5}
    if published:
        settings["release_sha256"] = "ac5dc571271a9f35"
        for each in rows:
            each["seconds"]["release"], each["peak_bytes"]["release"] = {"median": 4.0}, {"median": 90e6}
            agreement = {"masks_differ": 0.0156, "first_block_differs": 3.5e-6, "agree": True}
            each |= {"times_faster": SPREAD, "memory_ratio": 0.7, "agreement": agreement}
        rows[1]["agreement"]["release_itself"] = {"masks_differ": 0.0107, "first_block_differs": 0.0}
    return {"machine": MACHINE, "settings": settings, "rows": rows}


def test_speed_prints_what_the_json_says_of_the_release(scripts):
    result, speed = speed_results(), scripts("readme_costs").speed
    text = speed(result)
    line = "4.0 s | 2.0 s | 2.00x (1.50 to 2.50) | 90 MB | 63 MB | 0.70x | 1.6e-02 | 3.5e-06 |"
    assert f"| sink-wanda | {line}" in text and f"| sparsegpt | {line}" in text
    assert "sink-wanda takes 1.25x (1.00 to 1.50) the forward passes" in text
    assert "differs from itself in 1.1e-02 of the masks (0.0e+00 in block 0)" in text
    assert "(SHA-256 ac5dc571271a)" in text and "commit" not in text and "Apart" not in text
    changed = copy.deepcopy(result)
    changed["settings"]["release_commit"] = "0123456789abcdef"
    changed["rows"][1]["agreement"] |= {"agree": False}
    del changed["rows"][1]["agreement"]["release_itself"], changed["rows"][0]["over_forwards"]
    text = speed(changed)
    assert "(commit 0123456)" in text and "SHA-256" not in text
    assert "itself" not in text and "forward passes" not in text
    assert text.endswith("Apart by more than the benchmark allows for rounding: `sparsegpt`.")


def test_speed_of_ours_alone(scripts):
    text = scripts("readme_costs").speed(speed_results(published=False))
    assert "| sparsegpt | - | 2.0 s | - | - | 63 MB | - | - | - |" in text
    assert "--published" not in text and "release" not in text.partition("\n\n")[2]


PAGE = "# Title\n<!-- demo -->\nold\n<!-- /demo -->\n<!-- masks -->\nold masks\n<!-- /masks -->\nend\n"
MADE = {"demo": lambda: "new [a](scripts/results/a.json)", "masks": lambda: r"\1 |W|"}


def test_a_page_is_filled_between_its_markers_and_links_from_where_it_is(scripts):
    filled = scripts("readme_tables").filled
    text = filled(PAGE, "docs/results.md", MADE)
    assert "<!-- demo -->\n\nnew [a](../scripts/results/a.json)\n\n<!-- /demo -->\n<!-- masks -->" in text
    assert "\n\\1 |W|\n" in text and "old" not in text and text.startswith("# Title\n") and text.endswith("-->\nend\n")
    assert filled(text, "docs/results.md", MADE) == text
    assert "new [a](scripts/results/a.json)" in filled(PAGE, "README.md", MADE)


def test_sections_and_markers_go_together(scripts):
    filled = scripts("readme_tables").filled
    with pytest.raises(SystemExit, match="README.md has no section marked 'demo'"):
        filled("no markers", "README.md", MADE)
    with pytest.raises(SystemExit, match="README.md marks 'masks', which nothing makes"):
        filled(PAGE, "README.md", {"demo": MADE["demo"]})


class Shape(Section):
    """A section of a configuration."""

    size: int = Field(3, ge=1, lt=2**62)
    """How large;
    |W| is not a bar."""
    kind: Literal["round", "square"] | int = "round"
    """What form."""
    place: Path | None = None
    shares: tuple[Annotated[float, Field(ge=0)], ...] = (0.5, 1)
    """Of each."""
    flat: bool = False
    """Whether it is."""


def test_keys_are_told_with_their_docstrings(scripts):
    lines = scripts("readme_keys").keys("shape", Shape).splitlines()
    assert lines[:2] == ["| key | default | values | meaning |", "| --- | --- | --- | --- |"]
    assert lines[2] == "| `shape.size` | `3` | whole number from 1 below 2^62 | How large; \\|W\\| is not a bar. |"
    assert lines[3] == "| `shape.kind` | `round` | `round`, `square` or whole number | What form. |"
    assert lines[4] == "| `shape.place` | - |  |  |"
    assert lines[5] == "| `shape.shares` | `[0.5, 1]` | list of numbers | Of each. |"
    assert lines[6] == "| `shape.flat` | `false` | `true`, `false` | Whether it is. |"


@pytest.mark.parametrize("model", [Config, EvaluationConfig])
def test_every_key_is_on_a_page_with_a_meaning(scripts, model):
    """But for two, of which the prose speaks."""
    pages = scripts("readme_tables").PAGES
    text = "\n".join((SCRIPTS.parent / page).read_text(encoding="utf-8") for page in pages)
    meanings = dict(re.findall(r"^\| `([a-z]+\.\w+)` \|.*\| (.*) \|$", text, re.MULTILINE))
    assert set(model.known_keys()) - set(meanings) <= {"method"}
    silent = {key for key in model.known_keys() if not meanings.get(key, "?").strip()}
    assert silent <= {"structured.protect_last", "export.max_shard_size"}


def seeds_of(variant, ratio):
    result = json.loads((SCRIPTS / "results" / "quality.json").read_text(encoding="utf-8"))
    return next(row["by_seed"] for row in result["losses"] if (row["variant"], row["ratio"]) == (variant, ratio))


def shown(worse, better, ratio):
    """Whether the kept results show that one variant loses more than another: three seeds, t(2) = 4.302653."""
    gaps = [a - b for a, b in zip(seeds_of(worse, ratio), seeds_of(better, ratio), strict=True)]
    mean = sum(gaps) / 3
    half = 4.302653 * (sum((gap - mean) ** 2 for gap in gaps) / 2 / 3) ** 0.5
    return mean > half and min(gaps) > 0


def test_what_the_results_page_claims_of_the_choices_is_shown():
    """The sentences above the table of qualities: which differences are shown, and which are not."""
    ours = "obs, masked, refit"
    for ratio, expected in ((0.5, [True] * 7), (0.3, [True, True, False, False, True, False, False])):
        worse = ["allocation uniform", "split equal", "obs, masked, no refit", "wanda, masked, refit"]
        worse += ["fluctuation, masked, refit", "rows not relative", "refit on clean"]
        assert [shown(name, ours, ratio) for name in worse] == expected
    assert shown("wanda, masked, no refit", "obs, masked, no refit", 0.3)
    sinks = {
        (score, refit, ratio): shown(f"{score}, masked+sink, {refit}", f"{score}, masked, {refit}", ratio)
        or shown(f"{score}, masked, {refit}", f"{score}, masked+sink, {refit}", ratio)
        for score in ("wanda", "fluctuation", "obs") for refit in ("refit", "no refit") for ratio in (0.3, 0.5)
    }  # fmt: skip
    assert {key for key, result in sinks.items() if result} == {
        ("fluctuation", "refit", 0.3), ("fluctuation", "no refit", 0.5),
    }  # fmt: skip


def test_kept_intervals_are_over_seeds():
    result = json.loads((SCRIPTS / "results" / "quality.json").read_text(encoding="utf-8"))
    for each in result["losses"] + result["contrasts"]:
        mean = sum(each["by_seed"]) / 3
        half = 4.302653 * (sum((value - mean) ** 2 for value in each["by_seed"]) / 2 / 3) ** 0.5
        assert (each["mean"], each["low"], each["high"]) == pytest.approx((mean, mean - half, mean + half), abs=1e-12)
        same_sign = min(each["by_seed"]) > 0 or max(each["by_seed"]) < 0
        assert each["shown"] is (same_sign and abs(mean) > half)


def test_peaks_that_are_not_known_are_left_open(scripts):
    row = {"length": 64, "peak_bytes": {"naive": None, "tiled": 5e6}, "memory_ratio": None, "time_ratio": SPREAD}
    row |= {"median_ms": {"naive": 2.0, "tiled": 1.0}, "forward_ratio": SPREAD}
    shape = {"core_seconds": 4.0, "peak_memory_bytes": 4e8, "parameters": {"before": 8e9, "after": 4e9}}
    shape |= {"predicted_device_peak_bytes": {"obs": 29e9, "taylor": 56e9}}
    sides = {"predicted": 4e6, "measured": 8e6}
    search = {"name": "model", "settings": {"structured.ratio": 0.5}, "machine": MACHINE, "rate": 3e11}
    search |= {"seconds": {"levels": {"predicted": 4.0, "measured": 10.0}}, "disk": sides, "peak_bytes": sides}
    text = scripts("readme_costs").cost({"machine": MACHINE, "shapes": {"LLaDA-8B": shape}}, search, {"rows": [row]})
    assert "| levels | 4 s | 10 s | 2.50x |" in text and "| peak memory | 4 MB | 8 MB | 2.00x |" in text
    assert "| 64 | 1.0 ms | 2.0 ms | 2.00x | 5 MB | ? | ? | 2.00x |" in text
    assert "| LLaDA-8B | 4.0 s | 0.40 GB | 8.000 B → 4.000 B | 29 GB | 56 GB |" in text


def test_runs_from_disk_show_predictions_and_what_the_disk_took(scripts):
    row = {
        "size": "1B", "run": "wanda", "way": "disk", "peak_bytes": 2e9, "predicted_bytes": 2.2e9, "seconds": 100.0,
        "core_seconds": 50.0, "queued_seconds": 40.0, "read_bytes": 3.2e9,
        "machine": {"cores": 2, "processor": "P", "torch": "2"},
    }  # fmt: skip
    pair = {
        "size": "1B", "run": "wanda", "way": "disk", "against": "held", "peak_bytes_ratio": 0.25,
        "core_seconds_ratio": 1.5, "seconds_ratio": 2.0, "same": True,
    }  # fmt: skip
    volume = {"windows": 2, "window": 64, "levels": 2}
    text = scripts("readme_costs").offload({"volume": volume, "rows": [row], "compared": [pair]})
    assert "| 1B | wanda | disk | 2.00 GB | 2.20 GB | 1.10x | 100 s | 50 s | 10% | 3.2 GB |" in text
    assert (
        "| 1B | wanda | disk / held | 0.25x | 1.50x | 2.00x | yes |" in text
        and "2 windows of 64 tokens at 2 levels" in text
    )
