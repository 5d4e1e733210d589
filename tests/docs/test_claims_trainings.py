"""Figures that the prose states of trainings, of runs from disk and of a search from kept heads are those of
scripts/results."""

import json
from pathlib import Path
from statistics import fmean, median

ROOT = Path(__file__).parents[2]


def results(name):
    return json.loads((ROOT / "scripts" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def prose(page="results"):
    """A page of docs as one line."""
    return " ".join((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").split())


def test_what_is_said_of_a_search_from_kept_heads():
    kept, others, text = results("checkpoint_kept"), results("checkpoint"), prose()
    loss = {(row["variant"], row["text"]): row["by_seed"] for row in others["losses"] if row["ratio"] == "0.3"}
    own = {row["text"]: row for row in kept["losses"]}
    assert kept["settings"]["seeds"] == others["settings"]["seeds"] == [0, 1, 2]
    for (_, place), values in loss.items():
        assert all(ours < theirs for ours, theirs in zip(own[place]["by_seed"], values))
    heads = own["docs-valid"]["heads_removed"]
    assert f"removes {min(heads)} to {max(heads)} heads" in text
    before = {place: fmean(loss["160 x 1, producers, stream", place]) for place in own}
    means = [f"{own[place]['mean']:.2f} instead of {before[place]:.2f}" for place in ("docs-valid", "wikitext2-test")]
    assert f"{means[0]} nats on `docs-valid`" in text and f"{means[1]} on `wikitext2-test`" in text


def test_what_is_said_of_flushed_numbers_and_of_finished_parts():
    intel, amd = results("training_speed")["runs"]
    assert "Intel" in intel["machine"]["processor"] and "AMD" in amd["machine"]["processor"]
    recovery, pruning = prose("recovery"), prose("pruning")
    assert f"made a training {intel['ratio']:.1f} times as fast on an Intel Xeon" in recovery
    assert f"an AMD EPYC ({amd['ratio']:.2f} times" in recovery
    assert f"`teacher.dtype=bfloat16`: {amd['bfloat16_ratio']:.1f} times as fast on the embedded model" in recovery
    ratios = [row["ratio"] for row in results("work_cost")["runs"].values()]
    keeping, kept = ([f"{each[way]:.2f}" for each in ratios] for way in ("keeping", "kept before"))
    assert f"took {' and '.join(keeping)} times as long" in pruning
    assert max(kept) == "0.02" and "took 2% of the time" in pruning


def test_what_is_said_of_the_disk_that_a_training_takes():
    shape, text = results("recovery_plan")["shapes"]["LLaDA-8B"], prose("recovery")
    weights = shape["parameters"]["pruned"], shape["memory"]["gradients and optimiser"] / 16
    whole, updates = (f"{3 * 12 * count / 1e9:.0f} GB" for count in weights)
    assert f"{updates} with the low-rank updates of `configs/recover/{shape['config']}` at 0.5" in text
    assert f"{whole} where all weights are trained" in text


def test_what_is_said_of_8b_from_disk():
    rows = [row for row in results("offload")["rows"] if row["size"] == "8B"]
    assert max(row["peak_bytes"] for row in rows) < 8e9 and {row["way"] for row in rows} == {"disk", "disk with parts"}
    assert all(0.8 < row["predicted_bytes"] / row["peak_bytes"] < 1.2 for row in rows)
    masked = {"magnitude", "wanda", "sink-wanda", "sparsegpt", "sink-sparsegpt"}
    assert {row["run"] for row in rows} == {"structured", "structured without refit"} | masked
    said = prose("verification")
    assert (
        "was cut (with and without a refit of what reads the units) and masked (magnitude, Wanda, SparseGPT and" in said
    )
    assert "the sink-aware forms of both, without a refit) from disk on a CPU" in said


def test_what_is_said_of_rehearsals():
    result = results("rehearsal")
    assert (result["size"], result["machine"]["threads"], result["machine"]["cores"]) == ("8B", 2, 2)
    assert max(row["until_over"]["seconds"] for row in result["rows"]) < 60
    said = prose("pruning")
    assert "From disk on two CPU cores, at LLaDA-8B's shape, it is over within a minute" in said


def minutes(row):
    return median(row["seconds"]) / 60


def test_what_is_said_of_training_back():
    figures, text = results("recovery"), prose()
    rows = {(row["variant"], row["ratio"]): row for row in figures["losses"]}
    gaps = {(row["variant"], row["against"], row["ratio"]): row for row in figures["contrasts"]}
    untrained, ours, blocks = "not trained", "divergence", "block-wise first"
    long = f"{blocks}, nine times the tokens"
    assert figures["settings"]["seeds"] == [0, 1, 2] and figures["settings"]["tokens"] == 150_000
    mean, seconds = ({key: value(row) for key, row in rows.items()} for value in (lambda r: r["mean"], minutes))
    kept = {key: 100 * fmean(row["tokens_kept"]) for key, row in rows.items()}
    assert f"at 0.7 from {mean[untrained, '0.7']:.3f} to {mean[ours, '0.7']:.3f} nats, which is shown" in text
    assert gaps[ours, untrained, "0.7"]["shown"] and not gaps[ours, untrained, "0.5"]["shown"]
    assert f"At 0.5, from {mean[untrained, '0.5']:.3f} to {mean[ours, '0.5']:.3f}, it gains in two seeds" in text
    assert sorted(gap < 0 for gap in gaps[ours, untrained, "0.5"]["by_seed"]) == [False, True, True]
    for ratio in ("0.5", "0.7"):
        assert gaps["cross-entropy", ours, ratio]["shown"] and gaps["cross-entropy", ours, ratio]["mean"] > 0
        assert mean[ours, ratio] < mean["both, half each", ratio] < mean["cross-entropy", ratio]
        for name in ("moving target from 0.3", blocks, "LoRA of rank 32"):
            assert not gaps[name, ours, ratio]["shown"]
        short = [value for (name, each), value in mean.items() if each == ratio and name != long]
        assert mean[blocks, ratio] == min(short)
        assert gaps[long, blocks, ratio]["shown"] and mean[long, ratio] < 0.57 * mean[untrained, ratio]
        assert f"from {kept[untrained, ratio]:.0f}% to {kept[long, ratio]:.0f}%" in text
        assert gaps["from scratch", ours, ratio]["mean"] > 1.8 and mean["from scratch", ratio] > 2
    assert gaps["divergence by 1 / p", ours, "0.7"]["shown"] and gaps["divergence by 1 / p", ours, "0.7"]["mean"] > 0
    assert f"take {seconds[long, '0.5']:.0f} and {seconds[long, '0.7']:.0f} minutes on one core" in text
    assert f"to {mean[long, '0.5']:.3f} at 0.5 and to {mean[long, '0.7']:.3f} at 0.7" in text


def test_what_is_said_of_search_and_training():
    figures, text = results("recipe"), prose()
    mean = {(row["variant"], row["ratio"]): f"{row['mean']:.3f}" for row in figures["losses"]}
    gaps = {(row["variant"], row["against"], row["ratio"]): row for row in figures["contrasts"]}
    assert figures["settings"]["tokens"] == 1_500_000 and figures["settings"]["windows"] == 384
    pairs = {}
    for widths in ("ranked widths", "searched widths"):
        trained = f"{widths}, trained"
        assert all(gaps[trained, widths, ratio]["shown"] for ratio in ("0.5", "0.7"))
        pairs[widths] = [f"from {mean[widths, ratio]} to {mean[trained, ratio]}" for ratio in ("0.5", "0.7")]
    first, second = pairs["ranked widths"]
    assert f"takes the ranked model {first} nats at 0.5 and {second} at 0.7" in text
    assert f"the searched one {' and '.join(pairs['searched widths'])}. All four are shown." in text
    after = {ratio: gaps["searched widths, trained", "ranked widths, trained", ratio] for ratio in ("0.5", "0.7")}
    assert f"the search is worth {-after['0.7']['mean']:.3f} nats at 0.7, which is shown" in text
    assert after["0.7"]["shown"] and not after["0.5"]["shown"] and after["0.5"]["mean"] > 0
    seconds = [value / 60 for row in figures["losses"] for value in row["seconds"] if value]
    assert f"({min(seconds):.0f} to {max(seconds):.0f} minutes on one core beside other work)" in text


def test_what_is_said_of_a_training_on_a_pretrained_checkpoint():
    result, text = results("checkpoint_recovery"), prose()
    assert list(result["variants"]) == ["not trained", "300,000 tokens"] and result["settings"]["seeds"] == [0, 1, 2]
    rows = {(row["variant"], row["text"], row["ratio"]): row for row in result["losses"]}
    learnt, other = (
        {ratio: [f"{rows[name, place, ratio]['mean']:.3f}" for name in result["variants"]] for ratio in ("0.3", "0.5")}
        for place in ("docs-valid", "wikitext2-test")
    )
    halves = [f"from {pair[0]} to {pair[1]}" for pair in (learnt["0.5"], other["0.5"], learnt["0.3"], other["0.3"])]
    assert f"the loss falls {halves[0]} nats on `docs-valid`, and {halves[1]} on `wikitext2-test`" in text
    gaps = {(row["text"], row["ratio"]): row for row in result["contrasts"]}
    assert all(gap < 0 for row in gaps.values() for gap in row["by_seed"])
    assert [key for key, row in gaps.items() if not row["shown"]] == [("docs-valid", "0.3")]
    ending = "It falls in every seed; all but that at 0.3 on `docs-valid` is shown."
    assert f"At 0.3 it falls {halves[2]} and {halves[3]}. {ending}" in text
    times = {
        ratio: median(each["training"] for each in rows["300,000 tokens", "docs-valid", ratio]["seconds"] if each) / 60
        for ratio in ("0.3", "0.5")
    }
    assert f"in {times['0.5']:.0f} minutes at 0.5 and {times['0.3']:.0f} at 0.3 on one shared core" in text
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{times['0.5']:.0f} minutes on one core took the pretrained one {halves[0]} nats of loss" in readme
    kept = {(row["variant"], row["ratio"]): fmean(row["tokens_kept"]) for row in result["generation"]["rows"]}
    shares = {ratio: [f"{100 * kept[name, ratio]:.1f}%" for name in result["variants"]] for ratio in ("0.3", "0.5")}
    assert f"comes out goes from {shares['0.5'][0]} to {shares['0.5'][1]} at 0.5" in text
    assert len({*shares["0.3"]}) == 1 and f"at 0.3 it stays at {shares['0.3'][0]}" in text


def test_what_is_said_of_more_tokens_on_a_pretrained_checkpoint():
    result, shorter, text = results("checkpoint_recovery_1m"), results("checkpoint_recovery"), prose()
    name, before = "1,000,000 tokens", "300,000 tokens"
    rows = {(row["variant"], row["text"], row["ratio"]): row for row in [*shorter["losses"], *result["losses"]]}
    own, other = (
        [rows[name, place, ratio]["mean"] for ratio in ("0.3", "0.5")] for place in ("docs-valid", "wikitext2-test")
    )
    cost = [rows["not trained", "docs-valid", ratio]["mean"] for ratio in ("0.3", "0.5")]
    shares = [f"{100 * loss / whole:.0f}%" for loss, whole in zip(own, cost)]
    assert f"is {own[0]:.3f} nats at 0.3 and {own[1]:.3f} at 0.5, {shares[0]} and {shares[1]} of what pruning" in text
    assert f"it is {other[0]:.3f} and {other[1]:.3f}" in text
    for loss, ratio in zip(own, ("0.3", "0.5")):
        assert loss < rows[before, "docs-valid", ratio]["by_seed"][0] / 2  # the same seed
    [seconds] = rows[name, "docs-valid", "0.5"]["seconds"]
    assert f"beside other work ({seconds['training'] / 60:.0f} minutes at 0.5" in text
    assert rows[name, "docs-valid", "0.3"]["seconds"] == [{}]  # of an interrupted training
    generated = {(row["variant"], row["ratio"]): row["tokens_kept"][0] for row in result["generation"]["rows"]}
    kept = [f"{100 * generated[name, ratio]:.1f}%" for ratio in ("0.3", "0.5")]
    assert f"Of the greedy text {kept[0]} and {kept[1]} come out" in text
    assert result["generation"]["openings"] * result["generation"]["tokens"] == 256


def test_what_is_said_of_a_gradual_schedule():
    result, text = results("gradual"), prose()
    gaps = {row["ratio"]: row for row in result["contrasts"]}
    assert all(row["against"] == "one shot" for row in gaps.values())
    assert not gaps["0.5"]["shown"] and "at 0.5 no difference is shown" in text
    assert gaps["0.7"]["shown"] and f"at 0.7 it loses {gaps['0.7']['mean']:.2f} nats more than one shot" in text
    assert result["settings"]["tokens"] == results("recovery")["settings"]["tokens"]
    assert "structured.split" not in result["settings"]["base"]  # it is measured, by default
