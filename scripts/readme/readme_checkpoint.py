"""The tables of the study of a checkpoint: losses and fidelity per text, what runs took, and paired differences."""

from statistics import fmean, median

from scripts.readme.readme_common import machine, table
from scripts.readme.readme_studies import interval, over_seeds, paired
from scripts.studies.studies import seed_interval

Row = dict
BEFORE = "160 x 1, producers, stream"  # keeps every head


def checkpoint(results: dict) -> str:
    """A table per evaluation text, one of costs, and the paired differences.

    Args:
        results: of scripts/studies/checkpoint_study.py.
    """
    settings, texts = results["settings"], list(results["dense"])
    rows = {(row["variant"], row["text"], row["ratio"]): row for row in results["losses"]}
    variants, _, ratios = (list(dict.fromkeys(each)) for each in zip(*rows, strict=True))
    parts = [part for text in texts for part in (heading(results, text), loss_table(rows, variants, text, ratios))]
    parts += [_note(results), _costs(rows, variants, texts[0], ratios, results["first"]), _cost_note(results)]
    columns = [f"{text}, {ratio}" for text in texts for ratio in ratios]
    contrasts = [row | {"ratio": f"{row['text']}, {row['ratio']}"} for row in results["contrasts"]]
    if "generation" in results:
        parts += [generation_table(results["generation"], ratios), generation_note(results["generation"])]
    if len(settings["seeds"]) == 1:
        parts.append("With one seed there is no interval, and no difference below is shown.")
    return "\n\n".join([*parts, paired(contrasts, columns)])


def kept_heads(kept: dict, others: dict) -> str:
    """A search at 0.3 that starts with every head kept, beside the best row without one, and their paired difference.

    Args:
        kept, others: of scripts/studies/checkpoint_study.py, with --kept and without.
    """
    texts, ratio = list(kept["dense"]), next(iter(row["ratio"] for row in kept["losses"]))
    [name] = {row["variant"] for row in kept["losses"]}
    rows = {(row["variant"], row["text"]): row for row in others["losses"] if row["ratio"] == ratio}
    rows |= {(row["variant"], row["text"]): row for row in kept["losses"]}
    header = ["variant", *(each for text in texts for each in (f"{text}, loss at {ratio}", "KL", "agreement"))]
    header += ["heads gone"]
    lines = []
    for variant in (BEFORE, name):
        cells = []
        for row in (rows[variant, text] for text in texts):
            cells += [interval(row), f"{fmean(row['kl']):.3f}", f"{100 * fmean(row['agreement']):.1f}%"]
        lines.append([variant, *cells, " / ".join(map(str, rows[variant, texts[0]]["heads_removed"]))])
    gaps = []
    for text in texts:
        pairs = zip(rows[name, text]["by_seed"], rows[BEFORE, text]["by_seed"], strict=True)
        place = {"variant": name, "against": BEFORE, "ratio": f"{text}, {ratio}"}
        gaps.append(place | seed_interval([ours - theirs for ours, theirs in pairs]))
    note = (
        "The same command with `--kept`, from [`checkpoint_kept.json`](scripts/results/checkpoint_kept.json): text,"
        " noise and windows of a seed are those above."
    )
    return "\n\n".join([table(header, lines), note, paired(gaps, [gap["ratio"] for gap in gaps])])


def heading(results: dict, text: str) -> str:
    dense = results["dense"][text]
    nelbo, accuracy = (fmean(each[key] for each in dense) for key in ("nelbo", "accuracy"))
    return f"`{text}`, where the dense model has {nelbo:.2f} nats and {100 * accuracy:.1f}% of masked tokens right:"


def loss_table(rows: dict[tuple, Row], variants: list[str], text: str, ratios: list[str]) -> str:
    header = ["variant"] + [each for ratio in ratios for each in (f"loss at {ratio}", "KL", "agreement")]
    lines = []
    for name in variants:
        cells = []
        for row in (rows[name, text, ratio] for ratio in ratios):
            cells += [interval(row), f"{fmean(row['kl']):.3f}", f"{100 * fmean(row['agreement']):.1f}%"]
        lines.append([name, *cells])
    return table(header, lines)


def _note(results: dict) -> str:
    settings = results["settings"]
    file, option = ("checkpoint", "") if "generation" in results else ("checkpoint_factors", " --factors")
    names = " ".join(f"--eval {name}={file}" for name, file in settings["texts"].items())
    name, text = settings["checkpoint"]["name"], settings["base"]["calibration.source"]
    return (
        f"`python -m scripts.studies.checkpoint_study --checkpoint DIR --name {name} --text {text} {names}"
        f" --seeds {len(settings['seeds'])}{option}`, from"
        f" [`{file}.json`](scripts/results/{file}.json): loss of NELBO on {name} against dense, nats per"
        f" token, {over_seeds(settings)}. KL to the dense model, nats, and agreement: of predictions at the masked"
        " positions, the likeliest tokens of both compared. Wanda-sp and LLM-Pruner's Taylor score: the same share"
        " everywhere, no refit; LLM-Pruner's fine-tuning is left out."
    )


def _costs(rows: dict[tuple, Row], variants: list[str], text: str, ratios: list[str], first: str) -> str:
    """Heads gone at every ratio; seconds and memory at the ratio that ran first, as the second shares work with it."""
    header = ["variant", *(f"heads gone at {ratio}" for ratio in ratios), f"run at {first}", "its peak memory"]
    lines = []
    for name in variants:
        heads = [" / ".join(map(str, rows[name, text, ratio]["heads_removed"])) for ratio in ratios]
        row = rows[name, text, first]
        seconds = median(each["scores"] + each["rest"] for each in row["seconds"])
        peaks = [peak for peak in row["peak_bytes"] if peak is not None]
        peak = f"{max(peaks) / 1e9:.1f} GB" if peaks else "?"
        lines.append([name, *heads, f"{seconds:.0f} s", peak])
    return table(header, lines)


def generation_table(generation: dict, ratios: list[str]) -> str:
    """What is kept of the dense model's greedy continuations, and what the dense model thinks of the text."""
    rows = {(row["variant"], row["ratio"]): row for row in generation["rows"]}
    header = [
        "variant",
        *(f"{title} at {ratio}" for ratio in ratios for title in ("tokens kept", "NELBO of generated")),
    ]
    lines = []
    for name in dict.fromkeys(name for name, _ in rows):
        pairs = [rows[name, ratio] for ratio in ratios]
        cells = [(f"{100 * fmean(row['tokens_kept']):.1f}%", f"{fmean(row['generated_nelbo']):.2f}") for row in pairs]
        lines.append([name, *(cell for pair in cells for cell in pair)])
    return table(header, lines)


def generation_note(generation: dict) -> str:
    return (
        f"Tokens kept: of {generation['tokens']} after each of {generation['openings']} openings of the first text,"
        " generated greedily a token a step, those that the dense model's have at the same place; a mean over seeds."
        f" NELBO: of what is generated, under the dense model, whose own has {fmean(generation['dense']):.2f} nats per"
        " token."
    )


def _cost_note(results: dict) -> str:
    refits = {name for name, keys in results["variants"].items() if keys.get("reconstruct.enabled", True)}
    undone = [
        f"{row['variant']} at {row['ratio']} ({row['kept'].count('plain removal')} of {len(row['kept'])} seeds)"
        for row in results["losses"]
        if row["text"] == next(iter(results["dense"])) and row["variant"] in refits and "plain removal" in row["kept"]
    ]
    text = (
        "Heads gone: per seed. Run: scores, refit and check, median over seeds, beside other work"
        f" ({machine(results['machine'])}). Peak memory: above what the process held before,"
        " the dense model and what earlier runs left."
    )
    return text + (f" The refit was undone, as no gain on held-out text: {', '.join(undone)}." if undone else "")
