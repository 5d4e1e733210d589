"""The tables of losses: the demo's, and those of the studies over seeds."""

from statistics import median

from scripts.readme.readme_common import machine, table

SHOWN = (
    "Positive: the first loses more. Bold: the interval over seeds excludes 0 and all seeds agree in sign, which about"
    " one in twenty would do by chance."
)
DEFAULTS = {"obs, masked+sink, refit": "the default score and arm", "sparsegpt, masked, refit": "the default"}


def interval(row: dict | None, paired: bool = False) -> str:
    """A mean and half its 95% interval over seeds, where there is one; `paired`: finer, and bold where it is shown."""
    if row is None:
        return "-"
    places = 4 if paired else 3
    half = "" if row["low"] is None else f" ± {(row['high'] - row['low']) / 2:.{places}f}"
    text = f"{row['mean']:+.{places}f}{half}"
    return f"**{text}**" if paired and row["shown"] else text


def over_seeds(settings: dict) -> str:
    """What means and intervals of a study are over."""
    count, drawn = len(settings["seeds"]), "calibration text, noise and evaluation text drawn anew"
    windows = f"{settings['windows']} held-out windows under common noise"
    if count == 1:
        return f"mean over {windows} of one seed, so without an interval"
    return (
        f"mean over {count} seeds ({drawn}; in each, {windows}) ± half the 95% t interval over the means of the seeds"
    )


def title(variant: str) -> str:
    """A variant's name, marked where it is a default."""
    return f"**{variant}** ({DEFAULTS[variant]})" if variant in DEFAULTS else variant


def demo(results: dict) -> str:
    """The dense model, and every method at the saved ratios.

    Args:
        results: of `structprune demo`.
    """
    dense, run = results["dense"], results["run"]
    header = [
        "model",
        "parameters",
        "MACs",
        "on disk",
        "NELBO, nats/token",
        "loss against dense",
        "forward",
        "speed-up",
    ]
    rows = [_demo_cells("dense", dense)]
    for row in sorted((row for row in results["rows"] if "bytes" in row), key=lambda row: row["ratio"]):
        name = f"{row['method']}, {row['ratio']}"
        rows.append(_demo_cells(f"**{name}**" if row["method"] == "structprune" else name, row))
    note = (
        f"`structprune demo`, from [`demo.json`](scripts/results/demo.json): {run['seconds']:.0f} s in all and"
        f" {run['peak_memory_bytes']['host'] / 1e9:.1f} GB at its peak ({machine(results['machine'])}). NELBO:"
        f" masked-diffusion bound, lower is better, mean ± standard error over {dense['windows']} held-out windows of"
        f" {dense['length']} tokens under common noise, so that the loss is a paired difference. Forward: 16 windows,"
        " fp32, median. FLAP: fluctuation score, one ranking, bias compensation. Magnitude: the same share everywhere,"
        " no refit."
    )
    return f"{table(header, rows)}\n\n{note}"


def _demo_cells(name: str, row: dict) -> list[str]:
    loss, speed = row.get("loss"), row.get("speedup")
    return [
        name,
        f"{row['parameters'] / 1e6:.2f} M",
        f"{row['macs'] / 1e6:.0f} M",
        f"{row['bytes'] / 1e6:.1f} MB",
        f"{row['nelbo']:.3f} ± {row['standard_error']:.3f}",
        f"{loss['mean']:+.3f} ± {loss['standard_error']:.3f}" if loss else "",
        f"{row['latency_ms']:.0f} ms",
        f"{speed['median']:.2f}x" if speed else "",
    ]


def quality(results: dict) -> str:
    """Losses of every variant of the study, then the paired differences that sink weights make.

    Args:
        results: of scripts/studies/quality_study.py.
    """
    variants = by_variant(results["losses"])
    ratios = sorted({row["ratio"] for row in results["losses"]})
    header = ["variant"] + [text for ratio in ratios for text in (f"loss at {ratio}", "heads removed")]
    rows = []
    for name, losses in variants.items():
        cells = [(interval(losses[ratio]), " / ".join(map(str, losses[ratio]["heads_removed"]))) for ratio in ratios]
        rows.append([title(name), *(text for pair in cells for text in pair)])
    lines = []
    for row in (row for row in results["contrasts"] if "sink" in row["variant"]):
        ends = "" if row["low"] is None else f" [{row['low']:+.4f}, {row['high']:+.4f}]"
        gap = f"{row['mean']:+.4f}{ends}"
        lines.append([row["variant"], row["against"], str(row["ratio"]), f"**{gap}**" if row["shown"] else gap])
    note = (
        "`python -m scripts.studies.quality_study`, from"
        " [`quality.json`](scripts/results/quality.json): loss of NELBO on the"
        f" embedded model against dense, nats per token, {over_seeds(results['settings'])}. Heads removed: of 40, per"
        " seed. The rows below the grid change one thing of `obs, masked, refit`."
    )
    sink_table = table(["variant", "against", "ratio", "difference [95% interval]"], lines)
    paired = f"What weighting by sinks changed, paired. {SHOWN}"
    return f"{table(header, rows)}\n\n{note}\n\n{paired}\n\n{sink_table}"


def masks(results: dict) -> str:
    """Losses of every method, arm and ratio, then paired what masked text, sinks, the refit and single changes do.

    Args:
        results: of scripts/studies/mask_study.py.
    """
    ratios = list(dict.fromkeys(row["ratio"] for row in results["losses"]))
    changed = {row["variant"] for row in results["contrasts"] if row["question"] == "one change"}
    lines = [
        [title(name), *(interval(losses.get(ratio)) for ratio in ratios)]
        for name, losses in by_variant(results["losses"]).items()
        if name not in changed
    ]
    dense = results["dense"]
    note = (
        "`python -m scripts.studies.mask_study`, from [`masks.json`](scripts/results/masks.json): loss of NELBO on the"
        f" embedded model against dense ({sum(dense) / len(dense):.2f}), nats per token, by removed"
        f" share, {over_seeds(results['settings'])}. Clean is what Wanda and SparseGPT were published with;"
        " `sparsegpt, clean+sink` is the published sink-SparseGPT."
    )
    return f"{table(['method, arm', *ratios], lines)}\n\n{note}\n\n{paired(results['contrasts'], ratios)}"


def factors(results: dict) -> str:
    """Losses of every calibration and refit, then the paired differences of one factor each.

    Args:
        results: of scripts/studies/factor_study.py.
    """
    heads = results["heads"]
    lines = []
    for name, losses in by_variant(results["losses"]).items():
        seconds = [time for row in losses.values() for time in row["seconds"]]
        lines.append([name, *(interval(losses[ratio]) for ratio in heads), f"{median(seconds):.0f} s"])
    note = (
        "`python -m scripts.studies.factor_study`, from [`factors.json`](scripts/results/factors.json): loss of NELBO"
        f" on the embedded model against dense, nats per token, {over_seeds(results['settings'])}. A calibration is"
        " windows x noisy copies of each, with 40 held-out sequences. Heads gone in every run, so that nothing else"
        f" differs: {', '.join(f'{count} of 40 at {ratio}' for ratio, count in heads.items())}. Seconds of a run,"
        f" median, on one thread beside other work ({machine(results['machine'])})."
    )
    header = ["calibration, refit", *(f"loss at {ratio}" for ratio in heads), "run"]
    return f"{table(header, lines)}\n\n{note}\n\n{paired(results['contrasts'], list(heads))}"


def search(results: dict) -> str:
    """Losses of every part of the refit and of every search, then the paired differences of one step each.

    Args:
        results: of scripts/studies/search_study.py.
    """
    heads = results["heads"]
    lines = []
    for name, losses in by_variant(results["losses"]).items():
        gone = [" / ".join(map(str, losses[ratio]["heads"])) for ratio in heads]
        cells = [text for ratio, steps in zip(heads, gone) for text in (interval(losses[ratio]), steps)]
        seconds = [time for row in losses.values() for time in row["seconds"]]
        lines.append([name, *cells, f"{median(seconds):.0f} s"])
    start = ", ".join(f"{count} of 40 at {ratio}" for ratio, count in heads.items())
    note = (
        "`python -m scripts.studies.search_study`, from [`search.json`](scripts/results/search.json): loss of NELBO on"
        f" the embedded model against dense, nats per token, {over_seeds(results['settings'])}. 160 calibration windows"
        " with one noisy copy each where not said otherwise, and 40 held-out ones, which a search reads. Whole refit:"
        f" producers, head, visible 0.5. Stream: share 1. Heads gone before a search: {start}; the columns have them"
        " after it, per seed. Seconds of a run, median, on one thread beside other work"
        f" ({machine(results['machine'])})."
    )
    header = ["variant", *(text for ratio in heads for text in (f"loss at {ratio}", "heads gone")), "run"]
    return f"{table(header, lines)}\n\n{note}\n\n{paired(results['contrasts'], list(heads))}"


def weightings(results: dict) -> str:
    """Losses under every weight of rows, then the paired differences to the refit that each changes.

    Args:
        results: of scripts/studies/weighting_study.py.
    """
    heads = results["heads"]
    lines = [
        [name, *(interval(losses[ratio]) for ratio in heads)] for name, losses in by_variant(results["losses"]).items()
    ]
    start = ", ".join(f"{count} of 40 at {ratio}" for ratio, count in heads.items())
    note = (
        "`python -m scripts.studies.weighting_study`, from [`weightings.json`](scripts/results/weightings.json): loss"
        " of NELBO on the embedded model against dense, nats per token,"
        f" {over_seeds(results['settings'])}. 160 calibration windows with one noisy copy each, and 40 held-out ones."
        " Whole refit: producers, head, visible 0.5; every other row changes one thing of it, or two where it names"
        f" two. Heads gone in every run: {start}."
    )
    header = ["rows", *(f"loss at {ratio}" for ratio in heads)]
    return f"{table(header, lines)}\n\n{note}\n\n{paired(results['contrasts'], list(heads))}"


def classes(results: dict) -> str:
    """Losses of every export class with and without a search, what is left, latency, and the paired differences.

    Args:
        results: of scripts/studies/class_study.py.
    """
    back, lines = {(row["variant"], row["ratio"]): row for row in results["gap_closed"]}, []
    for row in results["losses"]:
        blocks = " / ".join(str(len(widths)) for widths in row["widths"])
        share, key = row["latency_share"], (row["variant"], row["ratio"])
        gap = f"{100 * back[key]['mean']:.0f}%" if key in back else ""
        timed = f"{share['median']:.2f} ({share['p25']:.2f} to {share['p75']:.2f})"
        removed = " / ".join(f"{value:.3f}" for value in row["removed"])
        run = f"{median(row['seconds']):.0f} s"
        lines.append([row["ratio"], row["variant"], interval(row), gap, blocks, removed, timed, run])
    note = (
        "`taskset -c 0 python -m scripts.studies.class_study`, from [`class.json`](scripts/results/class.json): loss of"
        f" NELBO on the embedded model against dense, nats per token, {over_seeds(results['settings'])}. 160"
        " calibration windows with one noisy copy each and 40 held-out ones; q, k, v, gate and up are refitted too; the"
        " split is measured, for `official` 0. Got back: of the gap to `free`. Blocks left and removed share per seed;"
        " widths are rounded to 32 channels. Latency of a forward pass of 128 tokens as a share of the dense model's,"
        " in turns with it: medians over seeds of the median and the quartiles of 60 rounds, on one thread beside other"
        f" work, so only roughly known ({machine(results['machine'])})."
    )
    header = ["ratio", "class", "loss", "got back", "blocks", "removed", "latency, quartiles", "run"]
    ratios = sorted({row["ratio"] for row in results["losses"]})
    return f"{table(header, lines)}\n\n{note}\n\n{paired(results['contrasts'], ratios)}"


def paired(contrasts: list[dict], ratios: list[str]) -> str:
    """The table of paired differences, a row per pair and a column per ratio."""
    gaps: dict[tuple[str, str], dict] = {}
    for row in contrasts:
        gaps.setdefault((row["variant"], row["against"]), {})[row["ratio"]] = row
    rows = [
        [f"{name} - {base}", *(interval(each.get(ratio), True) for ratio in ratios)]
        for (name, base), each in gaps.items()
    ]
    return f"Paired differences. {SHOWN}\n\n{table(['first - second', *ratios], rows)}"


def by_variant(losses: list[dict]) -> dict[str, dict]:
    """Variant -> ratio -> row."""
    variants: dict[str, dict] = {}
    for row in losses:
        variants.setdefault(row["variant"], {})[row["ratio"]] = row
    return variants
