"""Figures that the prose of the pages states are those of scripts/results."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RATIOS = ("0.3", "0.5", "0.7")


def results(name):
    return json.loads((ROOT / "scripts" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def prose(name):
    """A page as one line, without what is generated."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def test_what_is_said_of_the_demo():
    loss = {(row["method"], row["ratio"]): f"{row['loss']['mean']:.3f}" for row in results("demo")["rows"]}
    said = f"costs {loss['structprune', 0.5]} nats per token, where FLAP loses {loss['FLAP', 0.5]}"
    assert said in prose("README.md")


def test_what_is_said_of_latency():
    figures = results("bench_cpu")
    speed = {
        (part, row["model"]): f"{row['speedup']['median']:.2f}x"
        for part in ("forward", "generation")
        for row in figures[part]
        if "speedup" in row and row.get("cache", "none") == "none"
    }
    forward, generation = (
        [speed[part, f"pruned-{ratio}"] for ratio in (0.3, 0.5)] for part in ("forward", "generation")
    )
    text = prose("docs/benchmarks.md")
    assert f"{forward[0]} at 0.3 and {forward[1]} at 0.5 for forward passes, {' and '.join(generation)} for" in text
    assert f"{forward[1]} for forward passes and {generation[1]} for generation at 0.5" in prose("README.md")
    shares = [
        row["ideal_share"]["median"]
        for part in ("forward", "generation")
        for row in figures[part][1:]
        if "ideal_share" in row
    ]
    least = int(100 * min(shares))
    assert f"at least {least}% of the ideal saving" in text
    assert f"on CPU reaches {least}% or more of the saving" in prose("README.md")


def test_what_is_said_of_masks_and_the_release():
    rows = results("masking_speed")["rows"]
    faster, memory = [row["times_faster"]["median"] for row in rows], [row["memory_ratio"] for row in rows]
    assert f"{min(faster):.2f} to {max(faster):.2f} times as fast in about half the memory" in prose("README.md")
    assert 0.5 < min(memory) < max(memory) < 0.6


@pytest.mark.parametrize("ratio", ["0.5", "0.75", "2:4"])
def test_masked_text_halves_the_loss_and_a_refitted_magnitude_beats_all_without(ratio):
    """At 2:4 nearly so."""
    figures = results("masks")
    changes = {row["variant"] for row in figures["contrasts"] if row["question"] == "one change"}
    loss = {row["variant"]: row["mean"] for row in figures["losses"] if row["ratio"] == ratio}
    plain = [value for name, value in loss.items() if "refit" not in name and name not in changes]
    assert len(plain) == 14 and loss["magnitude, refit"] < min(plain)
    assert loss["sparsegpt, masked"] / loss["sparsegpt, clean"] < (0.6 if ratio == "2:4" else 0.55)


def test_what_is_shown_of_masked_text_and_sinks_in_masks():
    contrasts = results("masks")["contrasts"]
    shown = {(row["variant"], row["against"], row["ratio"]): row["mean"] for row in contrasts if row["shown"]}
    gains = [value for (name, base, _), value in shown.items() if name == f"{base}+sink" and value < 0]
    assert 0 < max(map(abs, gains)) < 0.00045 and shown["wanda, masked+sink", "wanda, masked", "0.75"] > 0
    assert {at for name, base, at in shown if (name, base) == ("ria, masked", "ria, clean")} == {"0.5", "0.75", "2:4"}
    assert not [key for key in shown if key[:2] == ("wanda, masked", "wanda, clean")]


def test_what_is_said_of_sinks():
    """Of the trajectories whose figures docs/sinks.md rounds."""
    embedded = {run["kind"]: run for run in results("sinks_embedded")["runs"]}
    (causal,) = results("sinks_smollm2")["runs"]
    figure = lambda summary, key: summary[key]["mean"]  # noqa: E731
    own, other, noise = embedded["reverse"]["summary"], causal["summary"], embedded["forward"]["summary"]
    text = prose("docs/sinks.md")
    assert f"SmolLM2 gives {100 * figure(other, 'mass_of_sinks'):.0f}% of its attention to one position" in text
    assert f"The LLaDA gives {100 * figure(own, 'mass_of_sinks'):.0f}% to five or six positions" in text
    assert round(figure(other, "sinks_per_step")) == 1 and 5 < figure(own, "sinks_per_step") < 6
    assert 0.78 < figure(other, "votes_of_sinks") < 0.85 and 1 / 7 < figure(own, "votes_of_sinks") < 1 / 5.5
    assert 0.3 < figure(noise, "kept") < 0.36 and 0.88 < figure(own, "kept") < 0.95 and figure(other, "kept") == 1
    untrained = next(run for run in results("sinks_untrained")["runs"] if run["causal"])
    assert figure(untrained["summary"], "kept") == 1
    cost = results("sinks_cost")
    assert f"It adds {100 * (cost['ratio']['mass']['median'] - 1):.0f}% to a forward pass of" in text


def test_what_is_said_of_evaluation_and_memory():
    figures, text = results("evaluation_speed"), prose("docs/evaluation.md")
    faster = f"{figures['times_faster']['adaptive']['median']:.2f} times"
    drawn = figures["adaptive_samples"]
    assert f"On {figures['settings']['items']} questions of PIQA" in text and f"was {faster} faster than the" in text
    assert f"drew {drawn['mean']:.0f} of {drawn['full']} samples on average" in text
    assert set(figures["agreement"]["adaptive with full"][name] for name in ("raw", "normalised")) == {1.0}
    assert f"scored 70 questions of PIQA {faster} as fast as the published loop, and" in prose("README.md")
    peaks = results("inspect")["shapes"]["LLaDA-8B"]["predicted_device_peak_bytes"]
    said = f"is {peaks['obs'] / 1e9:.0f} GB with the default score and {peaks['taylor'] / 1e9:.0f} GB with `taylor`"
    assert said in prose("docs/pruning.md")


def test_what_is_said_of_the_factors_on_a_pretrained_checkpoint():
    """Of every text and ratio, on the seeds that the page counts."""
    figures, text = results("checkpoint_factors"), prose("docs/results.md")
    places: dict[tuple[str, str], dict[str, float]] = {}  # (text, ratio) -> variant -> loss
    for row in figures["losses"]:
        places.setdefault((row["text"], row["ratio"]), {})[row["variant"]] = row["mean"]
    plain, both = "160 x 1", "160 x 1, producers, mixed targets"
    gains = [both, "160 x 1, mixed targets", "160 x 1, producers", "160 x 1, layer targets"]
    joint, methods = f"{both}, joint split", ("FLAP", "Wanda-sp", "LLM-Pruner (Taylor)")
    assert len(places) == 4 and len(figures["settings"]["seeds"]) == 1 and "This is one seed" in text
    assert not [row for row in figures["contrasts"] if row["shown"]]
    at_half = places["docs-valid", "0.5"]
    assert f"at 0.5 {at_half[both]:.2f} instead of {at_half[plain]:.2f} nats on `docs-valid`" in text
    shares = []
    for (_, ratio), loss in places.items():
        assert max(loss[name] for name in gains) < loss[plain]
        best = min(loss[name] for name in methods)
        assert max(loss[name] for name in loss if name not in methods) < best
        assert (loss[joint] < loss[both]) is (ratio == "0.5")
        assert (loss[plain] < loss["32 windows x 5 copies"]) is (ratio == "0.3")
        shares.append(100 * loss[both] / best)
    assert f"loses {min(shares):.0f}% to {max(shares):.0f}% of what the best of the three does" in text


def test_what_is_said_of_the_methods_on_a_pretrained_checkpoint():
    """Of every text, ratio and seed."""
    figures, text = results("checkpoint"), prose("docs/results.md")
    loss = {(row["variant"], row["text"], row["ratio"]): row["by_seed"] for row in figures["losses"]}
    gaps = {(row["variant"], row["against"], row["text"], row["ratio"]): row for row in figures["contrasts"]}
    texts, seeds = list(figures["dense"]), figures["settings"]["seeds"]
    assert seeds == [0, 1, 2] and "These are three seeds" in text
    today, streamed, whole = "32 windows x 5 copies", "160 x 1, producers, stream", "whole refit, stream"
    searched, sinks, greedy = f"{whole}, search", f"{whole}, sink weights", "greedy refit (as OSSCAR, SlimGPT)"
    ours, published = (today, streamed, whole, searched, sinks), ("FLAP", "Wanda-sp", "LLM-Pruner (Taylor)")
    shares, means = [], []
    for place in ((each, ratio) for each in texts for ratio in ("0.3", "0.5")):
        values = {name: loss[(name, *place)] for name in (*ours, greedy, *published)}
        for seed in seeds:
            best = min(values[name][seed] for name in published)
            assert max(values[name][seed] for name in ours) < min(best, values[greedy][seed])
            assert values[streamed][seed] < values[today][seed]
            assert (values[streamed][seed] < values[whole][seed]) or place[1] == "0.5"
            if place[1] == "0.5":
                shares.append(100 * values[searched][seed] / best)
        means.append(100 * sum(values[streamed]) / sum(values[today]))
    assert f"loses {min(shares):.0f}% to {max(shares):.0f}% of what the best published method does" in text
    assert f"{min(means):.0f}% to {max(means):.0f}% of their mean loss" in text
    assert all(gaps[streamed, today, each, ratio]["shown"] for each in texts for ratio in ("0.3", "0.5"))
    worse = [gaps[name, own, each, ratio] for name in (greedy, *published) for own in (whole, searched)
             for each in texts for ratio in ("0.3", "0.5")]  # fmt: skip
    assert all(row["shown"] and row["mean"] > 0 for row in worse)
    assert (
        gaps[streamed, whole, "docs-valid", "0.3"]["shown"] and gaps[streamed, whole, "wikitext2-test", "0.5"]["shown"]
    )
    assert gaps[streamed, whole, "wikitext2-test", "0.5"]["mean"] > 0
    assert not any(gaps[searched, whole, each, "0.3"]["shown"] for each in texts)
    assert all(gaps[searched, whole, each, "0.5"]["by_seed"].count(0.0) == 2 for each in texts)
    gains = [-gaps[searched, whole, each, "0.3"]["mean"] for each in texts]
    assert f"on average {min(gains):.2f} to {max(gains):.2f} nats" in text
    assert all(max(gaps[searched, whole, each, "0.3"]["by_seed"]) < 0 for each in texts)
    weights = [gaps[sinks, whole, each, "0.5"] for each in texts]
    assert all(max(row["by_seed"]) < 0 for row in weights)
    low, high = sorted(-row["mean"] for row in weights)
    gained = f"{low:.2f} to {high:.2f} nats"
    assert all(gained in prose(page) for page in ("README.md", "docs/sinks.md"))
    assert f"by {gained}" in text and gaps[sinks, whole, "wikitext2-test", "0.5"]["shown"]
    assert not any(gaps[sinks, whole, each, "0.3"]["shown"] for each in texts)
    kept = {
        row["variant"]: 100 * sum(row["tokens_kept"]) / len(seeds)
        for row in figures["generation"]["rows"]
        if row["ratio"] == "0.5"
    }
    best, low, high = kept.pop(searched), min(kept.values()), max(kept.values())
    assert f"{best:.0f}% by the search at 0.5, where the others keep {low:.0f}% to {high:.0f}%" in text
    halves = [100 * sum(loss[whole, each, "0.5"]) / sum(loss[today, each, "0.5"]) for each in texts]
    assert f"loses {min(halves):.0f}% to {max(halves):.0f}% of what the consumers alone do" in text
    heads = next(row for row in figures["losses"] if (row["variant"], row["ratio"]) == (whole, "0.5"))["heads_removed"]
    assert f"removes {min(heads)} to {max(heads)} of 270 heads" in text


def test_what_is_said_of_the_search():
    figures, text = results("search"), prose("docs/results.md")
    rows = {(row["variant"], row["ratio"]): row for row in figures["losses"]}
    gaps = {(row["variant"], row["against"], row["ratio"]): row for row in figures["contrasts"]}
    today, whole, streamed = "today's recipe", "whole refit", "whole refit, stream"
    searched, long = f"{streamed}, knapsack", f"480 windows, 120 held out, {streamed}, knapsack"
    assert all(gaps["producers", today, ratio]["shown"] for ratio in ("0.5", "0.7"))
    for pair in (("producers, head", "producers"), (whole, "producers, head")):
        assert gaps[(*pair, "0.7")]["shown"] and not gaps[(*pair, "0.5")]["shown"]
    stream = [gaps[streamed, whole, ratio] for ratio in ("0.5", "0.7")]
    assert max(stream[0]["by_seed"]) < 0 and not stream[0]["shown"] and abs(stream[1]["mean"]) < 0.002
    mean = {key: row["mean"] for key, row in rows.items()}
    assert f"{mean[streamed, '0.5']:.3f} instead of {mean[whole, '0.5']:.3f} nats, which is not shown" in text
    assert gaps[searched, streamed, "0.7"]["shown"]
    assert f"takes {mean[streamed, '0.7']:.2f} nats at 0.7 to {mean[searched, '0.7']:.2f}, which is shown" in text
    assert sorted(gap < 0 for gap in gaps[searched, streamed, "0.5"]["by_seed"]) == [False, True, True]
    assert rows[searched, "0.5"]["kept"].count("ranked") == 1
    assert f"third: {mean[searched, '0.5']:.3f} instead of {mean[streamed, '0.5']:.3f}." in text
    for name in (long, f"{searched} of parts", f"{searched} and evolution"):
        assert not any(gaps[name, searched, ratio]["shown"] for ratio in ("0.5", "0.7"))
    assert {gaps[f"{searched} of parts", searched, ratio]["mean"] for ratio in ("0.5", "0.7")} == {0.0}
    assert mean[long, "0.5"] == min(value for (_, ratio), value in mean.items() if ratio == "0.5")
    assert gaps[long, today, "0.5"]["shown"] and min(gaps[long, searched, "0.7"]["by_seed"]) > 0
    assert f"at 0.5, {mean[long, '0.5']:.3f} instead of today's {mean[today, '0.5']:.3f} nats" in text
    assert f"in every seed, {mean[long, '0.7']:.2f} instead of {mean[searched, '0.7']:.2f}, which is not shown" in text


def test_what_is_said_of_row_weights():
    gaps = {(row["variant"], row["ratio"]): row for row in results("weightings")["contrasts"]}
    text = prose("docs/results.md")
    assert gaps["visible 1", "0.7"]["shown"] and gaps["visible 1", "0.7"]["mean"] > 0
    assert not [ratio for ratio in ("0.5", "0.7") if gaps["visible 0.25", ratio]["shown"]]
    assert max(abs(gaps["by noise level", ratio]["mean"]) for ratio in ("0.5", "0.7")) < 0.0015
    assert gaps["by certainty", "0.7"]["shown"] and gaps["by gradient", "0.7"]["shown"]
    assert f"{gaps['by gradient', '0.7']['mean']:.2f} nats at 0.7" in text
    states = [gaps["sampler states", ratio] for ratio in ("0.5", "0.7")]
    assert all(row["shown"] for row in states)
    assert f"{states[0]['mean']:.2f} nats more at 0.5 and {states[1]['mean']:.2f} at 0.7" in text
    refit = gaps["sinks in the refit", "0.7"]
    assert refit["shown"] and f"lose {refit['mean']:.3f} nats more at 0.7, which is shown" in text
    assert not [ratio for ratio in ("0.5", "0.7") if gaps["sinks in the scores", ratio]["shown"]]


def test_what_is_said_of_equal_blocks():
    figures = results("class")
    rows = {(row["variant"], row["ratio"]): row for row in figures["losses"]}
    text = prose("docs/results.md")
    mean = {key: f"{row['mean']:.2f}" for key, row in rows.items()}
    assert mean["uniform", "0.5"] == mean["official", "0.5"] == "0.41"
    assert f"loses {mean['uniform', '0.5']} nats where free widths lose {mean['free', '0.5']}, and at 0.7" in text
    assert f"at 0.7 {mean['uniform', '0.7']} against {mean['free', '0.7']}." in text
    back = {ratio: [100 * row["mean"] for row in figures["gap_closed"] if row["ratio"] == ratio] for ratio in RATIOS}
    assert f"gets {min(back['0.5']):.0f}% to {max(back['0.5']):.0f}% of the gap back at 0.5" in text
    assert f"and {back['0.7'][0]:.0f}% at 0.7" in text and back["0.3"] == [0, 0] and len(back["0.7"]) == 1
    shown = {(row["variant"], row["against"], row["ratio"]): row["shown"] for row in figures["contrasts"]}
    for ratio, classes in {"0.5": ("uniform", "official"), "0.7": ("uniform",)}.items():
        for name in classes:
            searched = rows[f"{name}, search", ratio]
            assert shown[f"{name}, search", name, ratio] and shown[f"{name}, search", "free, search", ratio]
            (dropped,) = {tuple(each) for each in searched["dropped"]}
            assert len(dropped) == {"0.5": 1, "0.7": 2}[ratio]
    equal = rows["uniform, search", "0.5"]["widths"]
    assert {width["query_heads"] for widths in equal for width in widths} == {8}
    assert rows["uniform, search", "0.5"]["by_seed"] == rows["official, search", "0.5"]["by_seed"]  # one plan
    assert rows["uniform, search", "0.3"]["dropped"] == [[], [], []]
    assert all(shown["uniform", "free", ratio] for ratio in RATIOS)
    removed = [share for name in ("uniform", "official") for share in rows[name, "0.5"]["removed"]]
    assert f"removes {100 * rows['uniform, search', '0.5']['removed'][0]:.1f}%" in text
    assert f"remove {100 * min(removed):.1f}% to {100 * max(removed):.1f}%" in text
    latency = {key: row["latency_share"] for key, row in rows.items()}
    equal, free = latency["uniform, search", "0.7"], latency["free, search", "0.7"]
    assert f"takes {equal['median']:.2f} of the dense latency" in text and f"takes {free['median']:.2f}." in text
    assert equal["p75"] < free["p25"]


def test_what_is_said_of_published_methods():
    figures = results("baselines")
    rows = {(row["variant"], row["ratio"]): row for row in figures["losses"]}
    gaps = {(row["variant"], row["ratio"]): row for row in figures["contrasts"]}
    greedy, ours, searched = "greedy refit (as OSSCAR, SlimGPT)", "whole refit", "whole refit, search"
    others = {(name, ratio) for name, ratio in rows if name not in (greedy, ours, searched)}
    assert {key for key in others if not gaps[key]["shown"]} == {("LLM-Pruner (Taylor)", "0.3")}
    assert all(min(gaps[key]["by_seed"]) > 0 for key in others)
    assert gaps[greedy, "0.5"]["shown"] and gaps[greedy, "0.7"]["shown"] and not gaps[greedy, "0.3"]["shown"]
    times = [rows[greedy, ratio]["mean"] / rows[ours, ratio]["mean"] for ratio in ("0.5", "0.7")]
    text = prose("docs/results.md")
    assert f"loses {times[0]:.1f} times as much at 0.5 and {times[1]:.1f} times at 0.7" in text
    assert gaps[searched, "0.5"]["shown"] and gaps[searched, "0.5"]["mean"] < 0
    assert max(gaps[searched, "0.7"]["by_seed"]) < 0 and not gaps[searched, "0.3"]["shown"]

    def mean(key, row):
        return sum(row[key]) / len(row[key])

    generated = [mean("generated_nelbo", rows[name, "0.5"]) for name in (searched, "FLAP")]
    dense = mean("generated_nelbo", {"generated_nelbo": [each["generated_nelbo"] for each in figures["dense"]]})
    said = f"generates at 0.5 has {generated[0]:.2f} nats under the dense model, whose own text has {dense:.2f}, and"
    assert f"{said} FLAP's {generated[1]:.2f}" in text
    assert all(mean("tokens_kept", row) <= 0.16 for (_, ratio), row in rows.items() if ratio != "0.3")
    names = [name for name, ratio in rows if ratio == "0.5"]
    by_loss = sorted(names, key=lambda name: rows[name, "0.5"]["mean"])
    assert by_loss == sorted(names, key=lambda name: mean("generated_nelbo", rows[name, "0.5"]))
    assert mean("generated_nelbo", rows[greedy, "0.7"]) > mean("generated_nelbo", rows["FLAP", "0.7"])
